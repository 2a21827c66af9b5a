"""Measure the time of a training iteration beside the network passes that it cannot avoid.

One iteration runs as in the training loop: data, turns, backward, clipping, optimizers, averages. Every call of a
denoiser's network in it is recorded and replayed bare: forward alone where no gradient came back; forward and backward,
to the learning parameters or else to the input, where one did; forward-mode derivatives as such; an encoder as far as
it went. Both are timed in turns. Their ratio is what the loop and the method add; a superfluous pass does not change it
and shows in the count of passes instead. Discriminators' heads and codecs do not count as networks.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from distillers.errors import BadInput
from distillers.evaluation.latency import latencies
from distillers.evaluation.report import Column, markdown_table, setting
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.models.denoiser import Denoiser
from distillers.models.guidance import GuidedTime
from distillers.training.execution import Execution, run_as
from distillers.training.latents import encoded_once
from distillers.training.trainer import begin

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Pass:
    """Record one call of a network as the iteration made it."""

    call: Callable[..., Any]
    leaves: list[Any]  # the arguments, flat; tensors without their graph
    tree: Any  # their nesting
    learning: list[nn.Parameter]  # that required a gradient
    differentiated: list[int]  # positions of the arguments that required one
    tangents: list[int]  # positions of the arguments that carried a tangent: the call was inside torch.func.jvp
    autocast: tuple[str, bool, torch.dtype]
    scales: list[tuple[GuidedTime, Tensor | None]]
    name: str = "forward"  # or "features", where the network was left early
    backward: bool = False  # whether a gradient came back

    @property
    def kind(self) -> str:
        """The name of the pass in the count."""
        if self.tangents:
            return "jvp"
        if not self.backward:
            return self.name
        return f"{self.name}+backward" + ("" if self.learning else " to the input")

    def replay(self) -> None:
        """Run the same call once more, with nothing around it."""
        for module, scale in self.scales:
            module.scale = scale
        leaves = list(self.leaves)
        if self.tangents:
            primals = tuple(leaves[i] for i in self.tangents)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
                torch.func.jvp(partial(self._mean_output, leaves), primals, primals)
            return
        if self.backward and not self.learning:
            for i in self.differentiated:
                leaves[i] = leaves[i].detach().requires_grad_()
        with torch.set_grad_enabled(self.backward):
            output = self._mean_output(leaves)
        if self.backward:
            torch.autograd.grad(output, self.learning or [leaves[i] for i in self.differentiated], allow_unused=True)

    def _mean_output(self, leaves: list[Any], *primals: Tensor) -> Tensor:
        """Run the network and return the mean of its outputs."""
        leaves = list(leaves)
        for i, primal in zip(self.tangents, primals, strict=False):
            leaves[i] = primal
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        device, enabled, dtype = self.autocast
        with torch.autocast(device, dtype, enabled):
            outputs = _outputs(self.call(*args, **kwargs))
        return torch.stack([output.float().mean() for output in outputs]).sum()


@contextmanager
def record_passes(nets: nn.Module) -> Iterator[list[Pass]]:
    """Record every call of a denoiser's network among `nets` while the block runs, and whether a gradient came back."""
    passes: list[Pass] = []
    denoisers = [module for module in nets.modules() if isinstance(module, Denoiser)]
    partway = False  # inside `Denoiser.features`, which is one pass as a whole

    def called(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not partway:
            call = partial(type(network).__call__, network)
            passes.append(_record("forward", network, call, (args, kwargs), output))

    def features(denoiser: Denoiser, *args: Any, **kwargs: Any) -> list[Tensor]:
        nonlocal partway
        call, partway = partial(Denoiser.features, denoiser), True
        try:
            output = call(*args, **kwargs)
        finally:
            partway = False
        passes.append(_record("features", denoiser.network, call, (args, kwargs), output))
        return output

    handles = [
        network.register_forward_hook(called, with_kwargs=True) for network in {d.network: None for d in denoisers}
    ]
    for denoiser in denoisers:
        denoiser.features = partial(features, denoiser)  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
        for denoiser in denoisers:
            del denoiser.features


def _record(name: str, network: nn.Module, call: Callable[..., Any], arguments: Arguments, output: Any) -> Pass:
    """Record a call of a network, and listen for the gradient of its output."""
    leaves, tree = pytree.tree_flatten(arguments)
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    tangents = [i for i, leaf in tensors.items() if forward_ad.unpack_dual(leaf).tangent is not None]
    kept = [_detached(leaf, i in tangents) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
    device = next(leaf.device.type for leaf in tensors.values())
    made = Pass(
        call=call,
        leaves=kept,
        tree=tree,
        name=name,
        tangents=tangents,
        learning=[p for p in network.parameters() if p.requires_grad],
        differentiated=[i for i, leaf in tensors.items() if leaf.requires_grad],
        autocast=(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        scales=[(m, m.scale) for m in network.modules() if isinstance(m, GuidedTime)],
    )

    def note_gradient(_gradient: Tensor) -> None:
        made.backward = True

    for answer in _outputs(output):
        if answer.requires_grad and not tangents:
            answer.register_hook(note_gradient)
    return made


def _detached(leaf: Tensor, dual: bool) -> Tensor:
    """Detach a tensor; a dual one, whose transformation will have ended, is replaced by values of its shape."""
    return torch.rand(leaf.shape, dtype=leaf.dtype, device=leaf.device) if dual else leaf.detach()


def _outputs(output: Any) -> list[Tensor]:
    """List the output tensors: of `features` all, of a network the one that stands alone or first."""
    return output if isinstance(output, list) else [output if isinstance(output, Tensor) else output[0]]


@dataclass(frozen=True)
class IterationCost:
    """Hold the figures of one recipe. Times are medians in ms."""

    recipe: str
    method: str
    iteration_ms: float
    bare_ms: float
    ratio: float
    passes: dict[str, int]  # of one iteration, by kind
    batch: int
    precision: str
    progress: float  # of the training, where curricula stand
    iterations: int  # timed
    execution: str  # eager or compiled, iteration and bare passes alike
    setting: dict[str, Any]


def measure(
    recipe: Recipe, *, iterations: int, progress: float, device: str | None = None, compiled: bool = False
) -> IterationCost:
    """Time whole iterations of a recipe and their bare passes, taking turns. Nothing is written.

    Args:
        iterations: timed; three more come before.
        progress: 0 to 1, which iteration of the training it is.
        device: "cpu", or None for the GPU where there is one.
        compiled: networks run by torch.compile, in the iteration and in the bare passes.

    Raises:
        BadInput: no iterations, a share beyond 0 to 1, a method without a denoiser, or compiled networks whose losses
            or gradients are not those of eager ones, whose times would mean nothing.
    """
    if iterations < 1 or not 0 <= progress <= 1:
        raise BadInput("iterations, progress", (iterations, progress), "1 or more, 0 to 1")
    data, settings = load_data(recipe), recipe.settings()
    teacher, distiller = load_teacher(recipe, data), recipe.distiller()
    data = encoded_once(distiller.data(data, teacher), teacher)
    run = begin(distiller, teacher, settings, Path(tempfile.gettempdir()), device=device)
    i = min(int(progress * settings.iterations), settings.iterations - 1)
    with record_passes(run.nets) as passes:
        run.iteration(i, data)
    if not passes:
        raise BadInput("recipe", recipe.name, f"a method that calls a denoiser; {recipe.method} does not")

    run.execution = Execution(compiled=compiled)
    if compiled and (trouble := run.dry_run(data).disagreement(run.dry_run(data, run.execution))):
        raise BadInput("compiled", True, f"networks that compute the same when they are compiled, but {trouble}")
    run_as(run.nets, run.execution)  # only now: compiled code would not have called the hooks that record passes

    def bare() -> None:
        for one in passes:
            one.replay()

    whole, alone = latencies(
        [partial(run.iteration, i, data), bare], repeats=iterations, warmup=2, device=run.accelerator.device
    )
    return IterationCost(
        recipe=recipe.name,
        method=recipe.method,
        iteration_ms=whole["p50"],
        bare_ms=alone["p50"],
        ratio=whole["p50"] / alone["p50"],
        passes=dict(Counter(one.kind for one in passes)),
        batch=settings.batch,
        precision=settings.precision,
        progress=progress,
        iterations=iterations,
        execution=str(run.execution),
        setting=setting(run.accelerator.device),
    )


def table(costs: Sequence[IterationCost]) -> str:
    """Write a Markdown table with a line for each recipe, the conditions under it."""
    columns: list[Column[IterationCost]] = [
        ("recipe", lambda c: c.recipe, ""),
        ("method", lambda c: c.method, ""),
        ("batch", lambda c: c.batch, ""),
        ("precision", lambda c: c.precision, ""),
        ("passes of one iteration", lambda c: ", ".join(f"{n} {kind}" for kind, n in c.passes.items()), ""),
        ("iteration ms", lambda c: c.iteration_ms, ".1f"),
        ("its bare passes ms", lambda c: c.bare_ms, ".1f"),
        ("ratio", lambda c: c.ratio, ".3f"),
    ]
    one, s = costs[0], costs[0].setting
    conditions = (
        f"Networks run {one.execution}. Medians of {one.iterations} turns each, at {one.progress:g} of the training; "
        f"{s['device']}, {s['threads']} threads, torch {s['torch']}, {s['date']}."
    )
    return f"{markdown_table(columns, costs)}\n\n{conditions}\n"
