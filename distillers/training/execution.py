"""How the networks of a training are run: by torch.compile or eagerly, and in which memory format.

Which of these is faster depends on the processor: on one, compiled passes are twice as fast as eager ones; on another,
where convolutions take two thirds of the time either way, compiling gains nothing and costs minutes. So it is measured
where the training runs, and compiled passes are used only if their losses and gradients agree with the eager ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distillers.models.denoiser import Denoiser

Compile = Literal["auto", "always", "never"]

PAYS_AFTER = 1200.0  # s of training; compiling forward and backward passes of a U-Net takes one to three minutes
SHORT = 1000  # iterations; below, not even measured
LEAST_GAIN = 1.03  # a faster way by less than this may be noise
LOSS_TOLERANCE = 0.05  # relative; bfloat16 sums in another order differ by up to a hundredth
GRADIENT_TOLERANCE = 0.25  # relative norm of the difference


@dataclass(frozen=True)
class Execution:
    """How networks are run. A checkpoint records it, for a resumed training must go on in the same arithmetic."""

    compiled: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        return ("compiled" if self.compiled else "eager") + (", channels last" if self.channels_last else "")


def run_as(nets: nn.Module, execution: Execution) -> None:
    """Run every denoiser's network inside `nets` in this way from now on. State dictionaries keep their names."""
    if execution.compiled:  # one variant for each batch size, gradient mode and memory format
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    for network in {module.network: None for module in nets.modules() if isinstance(module, Denoiser)}:
        network.to(memory_format=layout)  # type: ignore[call-overload]
        network._compiled_call_impl = None  # what `Module.compile` sets
        if execution.compiled:
            if next(network.parameters()).device.type == "cpu":
                from torch._inductor import config

                config.layout_optimization = False  # with it, torch 2.13 computes wrong gradients of U-Nets
            network.compile(dynamic=False)


@dataclass(frozen=True)
class Rehearsal:
    """The turns of one iteration without its moves: (player, loss, gradient) each, and the seconds that they took."""

    turns: Sequence[tuple[str, float, Tensor]]
    seconds: float

    def disagreement(self, other: Rehearsal) -> str | None:
        """What differs between two rehearsals of one iteration by more than rounding explains; None if nothing does."""
        for (player, loss, gradient), (_, loss_there, gradient_there) in zip(self.turns, other.turns, strict=True):
            if not math.isfinite(loss_there) or not bool(gradient_there.isfinite().all()):
                return f"the {player}'s loss or gradient is not finite"
            if abs(loss_there - loss) > LOSS_TOLERANCE * abs(loss) + 1e-4:
                return f"the {player}'s loss is {loss_there:.4g} where it is {loss:.4g}"
            apart = float((gradient_there - gradient).norm() / gradient.norm().clamp_min(1e-12))
            if apart > GRADIENT_TOLERANCE:
                return f"the {player}'s gradient differs by {apart:.0%}"
        return None
