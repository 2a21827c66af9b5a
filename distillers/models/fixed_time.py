"""Networks that are called at one time only, rewritten to be called at another."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from distillers.errors import BadInput
from distillers.models.denoiser import Denoiser
from distillers.models.lora import fused, has_lora, plain
from distillers.models.schedule import EDM, VariancePreserving


def check_rewritable(network: nn.Module) -> None:
    """Raise BadInput for a network that `as_first_timestep` cannot rewrite."""
    config: Any = getattr(network, "config", {})
    network = plain(network)
    kind, embedding = type(network).__name__, config.get("time_embedding_type")
    if (
        kind not in ("UNet2DModel", "UNet2DConditionModel")
        or embedding != "positional"
        or config.get("class_embed_type") == "timestep"
    ):
        raise BadInput(
            "teacher", f"{kind} with {embedding} times", "a U-Net of diffusers with positional time embeddings"
        )


@torch.no_grad()
def as_first_timestep(denoiser: Denoiser) -> Denoiser:
    """Rewrite a network of EDM's schedule that predicts x0 and is called at t_min on noise, for diffusers' timestep 0.

    No EDM scheduler of diffusers takes x0, and DDIM's does. At one time all that the network is told of it is a
    constant: the change of the embedding, through the first layer behind it, goes into that layer's bias, and the scale
    of the input into the first convolution. Both are exact.

    Args:
        denoiser: over a `UNet2DModel`; see `check_rewritable`.

    Returns:
        A denoiser with DDPM's linear schedule, whose x0 at t = 0 is the given one's at t_min, for the same unit noise.
    """
    schedule, own = denoiser.schedule, denoiser.network
    network = fused(own) if has_lora(own) else copy.deepcopy(own)
    assert isinstance(schedule, EDM) and denoiser.prediction == "x0"
    check_rewritable(network)
    net: Any = network
    t, first = torch.tensor(schedule.t_min, dtype=torch.float64), net.time_embedding.linear_1
    told = torch.stack([schedule.network_time(t), torch.zeros_like(t)]).to(first.weight)
    now, then = net.time_proj(told).to(first.weight)
    first.bias += first.weight @ (now - then)
    start = schedule.start(torch.ones(1), t)
    net.conv_in.weight *= float(start / (schedule.sigma_data**2 + t**2).sqrt())
    return Denoiser(network, VariancePreserving.from_betas(), "x0")
