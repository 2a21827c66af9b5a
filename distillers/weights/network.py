"""What a network and its configuration allow: finite weights, classifier-free guidance, the sizes of its pictures."""

from __future__ import annotations

from typing import Any

from torch import nn

from distillers.errors import BadInput
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.denoiser import Denoiser, Routed
from distillers.models.guidance import Guided
from distillers.weights.manifest import Info


def check_finite(network: nn.Module, where: str) -> None:
    """Refuse with BadInput a network with weights that are NaN or infinite, naming the first of them and `where`."""
    for name, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise BadInput(
                f"{where}: {name}", f"{count} values that are NaN or infinite ({value.dtype})", "finite weights"
            )


def class_rows(network: nn.Module) -> int:
    """Count the rows of a network's class embedding. DiT has one more than the classes it counts, the null class."""
    config: Any = network.config
    counted = config.get("num_embeds_ada_norm")
    return counted + 1 if counted else config.get("num_class_embeds") or 0


def guided(denoiser: Denoiser | Routed, info: Info, guidance_scale: float) -> nn.Module:
    """Put a denoiser under classifier-free guidance; scale 1 is the denoiser itself.

    Raises:
        BadInput: a network without a null class to be guided by.
    """
    if guidance_scale == 1:
        return denoiser
    null_label = info.condition(PixelUnshuffle(info.patch)).null_label(class_rows(denoiser.network))
    if null_label is None:
        raise BadInput("guidance_scale", guidance_scale, f"1: {info.name} has no null class to be guided by")
    return Guided(denoiser.unclipped(), guidance_scale, null_label, denoiser.clipping)


def size_multiple(network: nn.Module, codec: ImageCodec) -> int:
    """Return what H and W in pixels must be multiples of: the codec's factor times the network's patch or stride."""
    config: Any = network.config
    return codec.factor * (config.get("patch_size") or 2 ** (len(config.block_out_channels) - 1))
