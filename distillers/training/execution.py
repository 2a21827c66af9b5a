"""The networks of a training run compiled or eagerly, in one memory format or another, whichever is faster here.

Which of these is faster depends on the processor: on one, compiled passes are twice as fast as eager ones; on another,
where convolutions take two thirds of the time either way, compiling gains nothing and costs minutes. So it is measured
where the training runs, and compiled passes are used only if their losses and gradients agree with the eager ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distillers.models.denoiser import Denoiser
from distillers.models.lora import plain

Compile = Literal["auto", "always", "never"]

PAYS_AFTER = 1200.0  # s of training; compiling forward and backward passes of a U-Net takes one to three minutes
SHORT = 1000  # iterations; below, not even measured
LEAST_GAIN = 1.03  # a faster way by less than this may be noise
LOSS_TOLERANCE = 0.05  # relative; bfloat16 sums in another order differ by up to a hundredth
GRADIENT_TOLERANCE = 0.25  # relative norm of the difference


@dataclass(frozen=True)
class Execution:
    """A way of running networks. A checkpoint records it, for a resumed training must go on in the same arithmetic."""

    compiled: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        return ("compiled" if self.compiled else "eager") + (", channels last" if self.channels_last else "")


def run_as(nets: nn.Module, execution: Execution) -> None:
    """Run every denoiser's network inside `nets` in this way from now on. State dictionaries keep their names."""
    if execution.compiled:  # one variant for each batch size, gradient mode and memory format
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    for network in {plain(module.network): None for module in nets.modules() if isinstance(module, Denoiser)}:
        network.to(memory_format=layout)  # type: ignore[call-overload]
        network._compiled_call_impl = None  # what `Module.compile` sets
        if execution.compiled:
            if next(network.parameters()).device.type == "cpu":
                from torch._inductor import config

                config.layout_optimization = False  # with it, torch 2.13 computes wrong gradients of U-Nets
            network.compile(dynamic=False)


@dataclass(frozen=True)
class DryRun:
    """The turns of one iteration, played without moving any player, and the seconds that they took."""

    turns: Sequence[tuple[str, float, Tensor]]  # player, loss, gradient
    seconds: float

    def disagreement(self, other: DryRun) -> str | None:
        """Say what differs from another dry run of the same iteration by more than rounding explains, if anything."""
        for (player, loss, gradient), (_, other_loss, other_gradient) in zip(self.turns, other.turns, strict=True):
            if not math.isfinite(other_loss) or not bool(other_gradient.isfinite().all()):
                return f"the {player}'s loss or gradient is not finite"
            if abs(other_loss - loss) > LOSS_TOLERANCE * abs(loss) + 1e-4:
                return f"the {player}'s loss is {other_loss:.4g} where it is {loss:.4g}"
            apart = float((other_gradient - gradient).norm() / gradient.norm().clamp_min(1e-12))
            if apart > GRADIENT_TOLERANCE:
                return f"the {player}'s gradient differs by {apart:.0%}"
        return None


def fastest_execution(
    dry_run: Callable[[Execution], DryRun], mode: Compile, iterations: int, accumulation: int
) -> tuple[Execution, str]:
    """Find the fastest way of running networks whose dry run agrees with the eager one, and say why in words.

    Args:
        dry_run: plays one iteration's turns on one micro-batch in this way.
        mode: "auto" leaves trainings eager that are too short for compiling to pay.
        iterations: of the training.
        accumulation: micro-batches in an iteration.
    """
    if mode == "never":
        return Execution(), "as train.compile says"
    short = Execution(), "the training is too short for compiling to pay"
    if mode == "auto" and iterations < SHORT:
        return short
    eager = dry_run(Execution())
    if mode == "auto" and eager.seconds * accumulation * iterations < PAYS_AFTER:
        return short
    times, reasons = {Execution(): eager.seconds}, []
    for candidate in (
        Execution(channels_last=True),
        Execution(compiled=True, channels_last=True),
        Execution(compiled=True),
    ):
        faster = min(times, key=times.__getitem__)
        if candidate.compiled and (any(e.compiled for e in times) or candidate.channels_last > faster.channels_last):
            continue  # compiled in the faster format; in the other one only where that disagreed
        try:
            run = dry_run(candidate)
        except Exception as error:  # no compiler, or code that it cannot compile: many kinds of error
            reasons.append(f"{candidate} failed: {str(error).strip().splitlines()[0]}")
            continue
        if trouble := eager.disagreement(run):
            reasons.append(f"{candidate} disagrees with eager: {trouble}")
            continue
        times[candidate] = run.seconds
        reasons.append(f"{candidate} takes {run.seconds / eager.seconds:.2f} of eager's time")
    compiled = [e for e in times if e.compiled]
    if mode == "always" and compiled:
        return compiled[0], "; ".join(reasons)
    best = min(times, key=times.__getitem__)
    return best if times[best] * LEAST_GAIN < eager.seconds else Execution(), "; ".join(reasons)
