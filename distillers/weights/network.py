"""What a network and its configuration allow: finite weights, classifier-free guidance, the sizes of its pictures."""

from __future__ import annotations

from torch import nn

from distillers.errors import BadInput
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.denoiser import Denoiser, Routed, clipping_of, unclipped
from distillers.models.families import UNET, family_of
from distillers.models.guidance import GuidanceInput, Guided
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
    family = family_of(network) or UNET
    counted = family.classes(network.config)
    return counted + family.null_rows if counted else 0


def null_class_last(network: nn.Module, row: int) -> None:
    """Move a row of a network's class embedding, the null class of guidance, behind all others, in place.

    Raises:
        BadInput: a network without class embedding, a row that it does not have, or a DiT, whose last row it is anyway.
    """
    embedding = getattr(network, "class_embedding", None)
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0
    if not 0 <= row < rows:
        what = (
            f"0 to {rows - 1}, a row of the class embedding"
            if rows
            else "absent: only U-Nets with classes have a choice"
        )
        raise BadInput("null_class", row, what)
    assert embedding is not None
    order = [k for k in range(rows) if k != row] + [row]
    embedding.weight.data = embedding.weight.data[order]


def guided(denoiser: Denoiser | Routed, info: Info, guidance_scale: float) -> nn.Module:
    """Put a denoiser under guidance, as its family is guided; scale 1 is the denoiser itself.

    A network that is told the scale is told its family's usual one where this is 1, as students are trained.

    Raises:
        BadInput: a network without a null class to be guided by, or distilled for one scale that it is not told.
    """
    if guidance_scale == 1:
        return denoiser
    family = family_of(denoiser.network) or UNET
    if family.guided_by == "nothing":
        raise BadInput("guidance_scale", guidance_scale, f"1: {info.name} was distilled for one, and is told none")
    if family.guided_by == "input":
        return GuidanceInput(denoiser, guidance_scale)
    null_label = info.condition(PixelUnshuffle(info.patch)).null_label(class_rows(denoiser.network))
    if null_label is None:
        hint = "; `fewstep adopt --null-class` says which of its rows is one" if info.task == "class-to-image" else ""
        raise BadInput("guidance_scale", guidance_scale, f"1: {info.name} has no null class to be guided by{hint}")
    return Guided(unclipped(denoiser), guidance_scale, null_label, clipping_of(denoiser))


def calls_per_step(denoiser: Denoiser | Routed, info: Info) -> int:
    """Count the passes through the network in one step of sampling: two where guidance takes one without condition."""
    by_two = (family_of(denoiser.network) or UNET).guided_by == "two passes"
    return 2 if by_two and info.guidance_scale != 1 else 1


def size_multiple(network: nn.Module, codec: ImageCodec) -> int:
    """Return what H and W in pixels must be multiples of: the codec's factor times the network's patch or stride."""
    return codec.factor * (family_of(network) or UNET).stride(network.config)
