"""Families of networks: for each one row of a table, which says how its pipelines are read, called and written.

A row holds all that differs between the networks that diffusers knows: the classes of pipeline and network, what its
text encoders say, how the network is called, and how guidance reaches it. Everything else sees pictures or latents
(B, C, H, W), a time and a condition by names, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

# names of what a network may be told beside the noisy picture and the time; in this order where order matters
TOLD = ("label", "text", "pooled", "ids", "mask", "guidance")

Call = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # network, x (B, C, H, W), time (B,), condition
SIZE_OF_UNET = 2  # a U-Net halves its picture between any two of its blocks


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a pipeline's text encoders say: the arguments and the answer of its own `encode_prompt`.

    Attributes:
        encoders: parts of the pipeline with the class of transformers of each.
        optional: those of them that a pipeline may lack.
        returns: the names of what `encode_prompt` returns, in its order; "" for what is left aside.
        states: the encoders whose hidden states lie side by side in "text".
        width: the entry of the network's configuration that says how wide "text" is.
        ids: what the network is told of the size (H, W) in pixels of the picture: a row of numbers; None for nothing.
        arguments: what `encode_prompt` wants besides.
    """

    encoders: Mapping[str, str]
    optional: tuple[str, ...] = ()
    returns: tuple[str, ...]
    states: tuple[str, ...] = ("text_encoder",)
    width: str
    ids: Callable[[int, int], list[float]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: networks that are read, called and written alike.

    Attributes:
        network: the class of diffusers.
        part: where a pipeline keeps the network.
        pipelines: the classes of its pipelines.
        call: runs the network, whatever the order and the names of its arguments; (B, C or 2 C, H, W).
        fits: tells by a network's configuration whether it is of this family, where several share a class.
        words: what the prompts of text-to-image become; None where there are none.
        guidance: the scale that the stock pipeline guides with when none is given.
        guided_by: how guidance reaches the picture: by a pass without the condition beside every pass with it, or by
            the scale as an input of the network.
        statistics: entries of the autoencoder's configuration that the pipeline applies to latents besides its scale.
        stride: how many positions a side the network needs a multiple of, by its configuration.
        square: whether the network draws squares alone.
    """

    network: str
    part: Literal["unet", "transformer"]
    pipelines: tuple[str, ...]
    call: Call
    fits: Callable[[Any], bool] = lambda config: True
    words: Words | None = None
    guidance: float = 1.0
    guided_by: Literal["two passes", "input"] = "two passes"
    statistics: tuple[str, ...] = ()
    stride: Callable[[Any], int] = lambda config: int(config.get("patch_size") or 1)
    square: bool = False


# --- calls -----------------------------------------------------------------------------------------------------------
def _by_class(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = network(x, time, **({"class_labels": cond["label"]} if "label" in cond else {})).sample
    return output


def _stable_diffusion(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = network(x, time, encoder_hidden_states=cond["text"].to(x)).sample
    return output


def _sdxl(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    added = {"text_embeds": cond["pooled"].to(x), "time_ids": cond["ids"]}
    output: Tensor = network(x, time, encoder_hidden_states=cond["text"].to(x), added_cond_kwargs=added).sample
    return output


# --- the table -------------------------------------------------------------------------------------------------------
def _halvings(config: Any) -> int:
    return SIZE_OF_UNET ** (len(config["block_out_channels"]) - 1)


UNET = Family(
    network="UNet2DModel",
    part="unet",
    pipelines=("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline"),
    call=_by_class,
    stride=_halvings,
)
DIT = Family(
    network="DiTTransformer2DModel",
    part="transformer",
    pipelines=("DiTPipeline",),
    call=_by_class,
    square=True,
)
STABLE_DIFFUSION = Family(
    network="UNet2DConditionModel",
    part="unet",
    pipelines=("StableDiffusionPipeline",),
    fits=lambda config: not config.get("addition_embed_type") and not config.get("time_cond_proj_dim"),
    call=_stable_diffusion,
    words=Words(
        encoders={"text_encoder": "CLIPTextModel"},
        returns=("text", "null_text"),
        width="cross_attention_dim",
    ),
    guidance=7.5,
    stride=_halvings,
)
SDXL = Family(
    network="UNet2DConditionModel",
    part="unet",
    pipelines=("StableDiffusionXLPipeline",),
    fits=lambda config: config.get("addition_embed_type") == "text_time" and not config.get("time_cond_proj_dim"),
    call=_sdxl,
    words=Words(
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        returns=("text", "null_text", "pooled", "null_pooled"),
        states=("text_encoder", "text_encoder_2"),
        width="cross_attention_dim",
        ids=lambda height, width: [height, width, 0, 0, height, width],  # original size, crop, target size
    ),
    guidance=5.0,
    statistics=("latents_mean", "latents_std"),
    stride=_halvings,
)
FAMILIES = (UNET, DIT, STABLE_DIFFUSION, SDXL)
PIPELINES = tuple(dict.fromkeys(name for family in FAMILIES for name in family.pipelines))
NETWORKS = (*dict.fromkeys(family.network for family in FAMILIES), "Transformer2DModel")  # as older diffusers saved DiT


def family_of(network: nn.Module) -> Family | None:
    """Find the family of a network, by its class and its configuration; None for what is no family's.

    A wrapper that runs a network in its own way says so itself, by an attribute `family`.
    """
    own = getattr(network, "family", None)
    if isinstance(own, Family):
        return own
    return family_by_config(type(network).__name__, getattr(network, "config", {}))


def family_by_config(kind: str, config: Any) -> Family | None:
    """Find the family of a network of class `kind` with such a configuration; None for what is no family's."""
    return next((family for family in FAMILIES if family.network == kind and family.fits(config)), None)
