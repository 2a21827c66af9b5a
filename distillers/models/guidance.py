"""Classifier-free guidance (Ho and Salimans 2022) as a wrapper of a denoiser, and its scale as a network's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.clipping import Clipping
from distillers.models.conditions import Cond
from distillers.models.lora import Adapted
from distillers.models.schedule import NoiseSchedule, like


class Guided(nn.Module):
    """A denoiser under classifier-free guidance: uncond + w (cond - uncond), on x0 (Ho and Salimans 2022).

    w = 1 is no guidance (one network call); x0, eps and v are affine in each other at fixed (x_t, t), so it does not
    matter on which of them guidance acts. LCM counts w from 0: its w is ours minus 1. A condition "guidance", float
    (B,), takes the place of the one scale.

    Args:
        denoiser: not clipped.
        clipping: the bound on the guided estimate, where diffusers' samplers put it; None for none.
    """

    def __init__(
        self, denoiser: nn.Module, guidance_scale: float, null_label: int, clipping: Clipping | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.guidance_scale, self.null_label = denoiser, guidance_scale, null_label
        self.clipping = clipping
        self.schedule: NoiseSchedule = denoiser.schedule  # type: ignore[assignment]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        null = {k.removeprefix("null_"): v for k, v in (cond or {}).items() if k.startswith("null_")}
        if not cond or not (null or "label" in cond) or (self.guidance_scale == 1 and "guidance" not in cond):
            x0: Tensor = self.denoiser(x_t, t, cond)
            return x0 if self.clipping is None else self.clipping(x0)
        w = like(cond["guidance"], x_t) if "guidance" in cond else self.guidance_scale
        cond = {k: v for k, v in cond.items() if k != "guidance" and not k.startswith("null_")}
        uncond = {**cond, **(null or {"label": torch.full_like(cond["label"], self.null_label)})}
        both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
        t2 = t if t.ndim == 0 else torch.cat([t, t])
        with_cond, without = self.denoiser(torch.cat([x_t, x_t]), t2, both).chunk(2)
        guided: Tensor = without + w * (with_cond - without)
        return guided if self.clipping is None else self.clipping(guided)


class GuidanceInput(nn.Module):
    """A denoiser whose network is told the guidance scale and was distilled to answer as if guided by it.

    A condition "guidance", float (B,), takes the place of the one scale.
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser, self.guidance_scale = denoiser, guidance_scale
        self.schedule: NoiseSchedule = denoiser.schedule  # type: ignore[assignment]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        scale = torch.full((len(x_t),), float(self.guidance_scale), device=x_t.device)
        x0: Tensor = self.denoiser(x_t, t, {"guidance": scale, **(cond or {})})
        return x0


# --- the guidance scale as a network's input -------------------------------------------------------------------------
class GuidedTime(nn.Module):
    """diffusers' `TimestepEmbedding` of the time and a guidance scale (Luo et al. 2023, sec. 4.2).

    project(features(w)) is added to the time's features before the embedding's first layer, where LCM's `cond_proj`
    adds it. For one fixed w that is a shift of that layer's bias, so `fold_guidance` gives the stock network back.
    The projection starts at zero: a new network ignores w.
    """

    FEATURES = 64

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        inputs = embedding.linear_1.in_features  # type: ignore[union-attr]
        self.embedding, self.project = embedding, nn.Linear(self.FEATURES, inputs, bias=False)  # type: ignore[arg-type]
        nn.init.zeros_(self.project.weight)
        self.scale: Tensor | None = None  # (B,), set by `call_network`; w = 1 where None

    def shift(self, scale: Tensor) -> Tensor:
        """Compute what guidance scales (B,) add to the time's features, (B, inputs)."""
        from diffusers.models.embeddings import get_timestep_embedding

        w = 1000 * (scale - 1).float()  # LCM's convention: 0 is no guidance, and the clock runs to thousands
        shift: Tensor = self.project(get_timestep_embedding(w, self.FEATURES).to(self.project.weight))
        return shift

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        scale = sample.new_ones(len(sample)) if self.scale is None else self.scale
        embedded: Tensor = self.embedding(sample + self.shift(scale).to(sample), condition)
        return embedded


def embed_guidance(network: nn.Module) -> nn.Module:
    """Replace a network's time embeddings by `GuidedTime`, in place.

    Raises:
        BadInput: a network that has none, or a role on a base, whose own layers all roles share.
    """
    if isinstance(network, Adapted):
        raise BadInput("guidance_range", "with lora", "absent: the frozen base has no input for a guidance scale")
    found = [
        (m, k) for m in network.modules() for k, v in m.named_children() if type(v).__name__ == "TimestepEmbedding"
    ]
    if not found:
        raise BadInput("guidance_range", type(network).__name__, "a diffusers network with a TimestepEmbedding")
    for module, name in found:
        setattr(module, name, GuidedTime(getattr(module, name)))
    return network


@torch.no_grad()
def fold_guidance(network: nn.Module, guidance_scale: float) -> nn.Module:
    """Turn a network with `GuidedTime` into the stock network at one fixed guidance scale, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GuidedTime):
                first: Any = child.embedding.linear_1
                scale = torch.full((1,), guidance_scale, device=first.weight.device)
                first.bias += first.weight @ child.shift(scale)[0].to(first.weight)
                setattr(module, name, child.embedding)
    return network
