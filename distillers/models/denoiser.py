"""The preconditioned network x0 = denoiser(x_t, t, cond), the one signature of all losses and samplers.

The wrapper converts whatever the network predicts (noise, data, velocity or flow) and the time it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.clipping import Clipping
from distillers.models.clusters import Clusters
from distillers.models.conditions import Cond
from distillers.models.families import UNET, family_of
from distillers.models.guidance import GuidedTime
from distillers.models.lora import acting, parts_of, plain
from distillers.models.schedule import EDM, PREDICTIONS, NoiseSchedule, Prediction, like

M = TypeVar("M", bound=nn.Module)


class Denoiser(nn.Module):
    """The minimum-mean-square estimate of the clean data, x0 = denoiser(x_t, t, cond).

    Args:
        network: a diffusers `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`, a module called as
            `network(x, time, **cond)`, or a role on such a network: `lora.Adapted`.
        schedule: what x_t = alpha x0 + sigma eps means for this network.
        prediction: what the network outputs: "x0", "eps", "v" (alpha eps - sigma x0), "flow" (eps - x0), "edm" (F of
            Karras et al. 2022) or "edm-v" (-F). On the variance-exploding schedule any of them reads c_in x_t.
        clipping: the bound that the pipeline's own sampler puts on x0; None for none, as with all that is trained.
        text: the text encoder that learns together with the network, from tokens (B, length) in the condition; None
            where the condition holds what an encoder made of them before.

    Shapes: x_t (B, C, H, W) or (B, D); t () or (B,); result like x_t, float32.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction,
        clipping: Clipping | None = None,
        text: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise BadInput("prediction", prediction, ", ".join(PREDICTIONS))
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.clipping, self.text = clipping, text

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Estimate the clean data x0 from x_t at time t."""
        output = self.output(x_t, t, cond)
        x0 = self.schedule.x0_from(self.prediction, output, x_t, t)
        return x0 if self.clipping is None else self.clipping(x0)

    def output(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Run the network and return its output, in its own prediction type, float32."""
        if isinstance(self.schedule, EDM):  # keep the input near unit variance (Karras et al. 2022, c_in)
            x_in = x_t / like((self.schedule.sigma_data**2 + t.double() ** 2).sqrt(), x_t)
        else:
            x_in = x_t
        time = self.schedule.network_time(t)
        if time.ndim == 0 and time.device != x_t.device:  # written there, not copied: a copy would wait for the device
            time = x_t.new_full((x_t.shape[0],), float(time))
        time = time.to(x_t).expand(x_t.shape[0])
        cond = cond or {}
        if self.text is not None and "tokens" in cond:
            cond = {**cond, "text": self.text(cond["tokens"]).last_hidden_state}
        with acting(self.network) as network:
            return call_network(network, x_in, time, cond).float()

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None, layers: Sequence[str] = ("mid_block",)
    ) -> list[Tensor]:
        """Return the activations of the named submodules, for discriminators: each module's (first) output tensor.

        The forward pass ends with the last of them, so that an encoder costs an encoder. "mid_block" stands for the
        layer in the middle of a network, whatever its family calls it.

        Raises:
            BadInput: a layer that the network does not have, or does not call (a list of blocks is never called).
        """
        modules, family = dict(self.layers()), family_of(self.network) or UNET
        if "mid_block" not in modules:
            layers = [family.middle(self.network.config) if name == "mid_block" else name for name in layers]
        missing = [name for name in layers if not name or name not in modules]
        if missing or not layers:
            raise BadInput("layers", missing or list(layers), self._layers())
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                kept[name] = output[family.picture] if isinstance(output, tuple) else output
                if len(kept) == len(set(layers)) and not split:  # what was gathered is given up at the end
                    raise _AllKept

            return hook

        split = hasattr(plain(self.network), "unshard")  # over processes: see `training.sharding`
        if split and (inner := [name for name in layers if not hasattr(modules[name], "unshard")]):
            raise BadInput("layers", inner, "whole blocks with train.shard")
        handles = [modules[name].register_forward_hook(keep(name)) for name in set(layers)]
        try:
            with uncompiled(self):  # compiled code would not call the hooks
                self.output(x_t, t, cond)
        except _AllKept:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(kept) < len(set(layers)):
            raise BadInput("layers", [name for name in layers if name not in kept], self._layers())
        return [kept[name] for name in layers]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """List the network's modules by name; of a role on a shared base, the base's."""
        return plain(self.network).named_modules()

    def _layers(self) -> str:
        """Name the blocks that `features` can be asked for, for messages."""
        blocks = [
            name if not isinstance(child, nn.ModuleList) else f"{name}.0 to {name}.{len(child) - 1}"
            for name, child in plain(self.network).named_children()
            if not isinstance(child, nn.ModuleList) or len(child)
        ]
        return "submodules that the network calls, e.g. " + ", ".join(blocks)


def clipping_of(denoiser: nn.Module) -> Clipping | None:
    """Return the bound on a network's estimates of x0; None where there is none, as for all but a `Denoiser`."""
    return denoiser.clipping if isinstance(denoiser, Denoiser) else None


def unclipped(denoiser: M) -> M:
    """Return a denoiser, of the very same weights, without clipping."""
    if clipping_of(denoiser) is None:
        return denoiser
    free = copy.copy(denoiser)
    free.clipping = None  # type: ignore[assignment]
    return free


class _AllKept(Exception):
    """The exception that ends a forward pass when the wanted activations are there."""


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run the own code of a module and its parts inside the block, whatever `nn.Module.compile` made of them before."""
    compiled = {part: part._compiled_call_impl for part in parts_of(module)}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, code in compiled.items():
            part._compiled_call_impl = code


def call_network(network: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call a diffusers or a plain network, with each condition as the argument that its family takes.

    SAR is concatenated, noise-free, to the noisy image (Bai and Xu 2024); labels are `class_labels`.
    """
    if "sar" in cond:
        x = torch.cat([x, cond["sar"].to(x)], dim=1)
    if not hasattr(network, "config"):
        return network(x, time, **({"label": cond["label"]} if "label" in cond else {}))
    x = x.to(next(network.parameters()).dtype)  # a network opened in half precision
    embeddings = [m for m in network.modules() if isinstance(m, GuidedTime)] if "guidance" in cond else []
    for module in embeddings:
        module.scale = cond["guidance"]
    family = family_of(network) or UNET
    if family.guided_by == "input" and "guidance" not in cond:
        cond = {**cond, "guidance": time.new_full(time.shape, family.guidance)}
    try:
        sample = family.call(network, x, time, cond)
    finally:
        for module in embeddings:
            module.scale = None
    # DiT and improved-DDPM networks also output a learned variance in further channels; the mean comes first.
    channels = x.shape[1] - (cond["sar"].shape[1] if "sar" in cond else 0)
    return sample[:, :channels]


class Routed(nn.Module):
    """Several denoisers as one: the label or prompt of each row of a batch chooses the student that denoises it.

    Args:
        students: denoisers of one schedule and prediction; as all that is trained, they are not clipped.
        shares: the labels of each; together 0 to N-1, each once. Or the clusters of prompts, one for each.

    Shapes as `Denoiser`'s. The result of a row depends on its own condition alone, whatever else is in the batch.
    """

    student_of: Tensor

    def __init__(self, students: Sequence[Denoiser], shares: Sequence[Sequence[int]] | Clusters) -> None:
        super().__init__()
        self.students = nn.ModuleList(unclipped(student) for student in students)
        self.schedule, self.prediction = students[0].schedule, students[0].prediction
        self.clusters = shares if isinstance(shares, Clusters) else None
        if isinstance(shares, Clusters):
            if shares.students != list(range(len(students))):
                raise BadInput("clusters.students", shares.students, f"0 to {len(students) - 1}, one for each student")
            return
        if sorted(label for share in shares for label in share) != list(range(sum(map(len, shares)))):
            raise BadInput("shares", [list(share) for share in shares], "labels from 0 on, each in one share")
        of = {label: k for k, share in enumerate(shares) for label in share}
        self.register_buffer("student_of", torch.tensor([of[label] for label in range(len(of))]))

    @property
    def network(self) -> Any:
        """The first student's network, whose channels, size and classes are those of all."""
        return self.students[0].network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        student = self.student_of[cond["label"]] if self.clusters is None else self.clusters.of(cond)
        x0 = torch.empty_like(x_t)
        for k in student.unique().tolist():
            rows = student == k
            own = {key: value[rows] for key, value in cond.items()}
            x0[rows] = self.students[k](x_t[rows], t if t.ndim == 0 else t[rows], own)
        return x0
