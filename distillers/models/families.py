"""Families of networks: for each one row of a table, which says how its pipelines are read, called and written.

A row holds all that differs between the networks that diffusers knows: the classes of pipeline and network, what its
text encoders say, how the network is called, and how guidance reaches it. Everything else sees pictures or latents
(B, C, H, W), a time and a condition by names, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.models.schedule import NoiseSchedule, RectifiedFlow

# names of what a network may be told beside the noisy picture and the time; in this order where order matters
TOLD = ("label", "text", "pooled", "ids", "mask", "guidance")

Call = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # network, x (B, C, H, W), time (B,), condition


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
        guided_by: how guidance reaches the picture: by a pass without the condition beside every pass with it, by
            the scale as an input of the network, or by nothing that a caller could change.
        statistics: entries of the autoencoder's configuration that the pipeline applies to latents besides its scale.
        stride: how many positions a side the network needs a multiple of, by its configuration.
        square: whether the network draws squares alone.
        packing: how many positions a side one token of the network's input holds: its input channels are this squared
            times those of the latents.
        sample_size: the positions a side that the pipeline draws by default, where the configuration does not say.
        largest: the most positions a side that the network knows, by its configuration; None for any number.
        classes: how many classes the network counts, by its configuration.
        null_rows: rows of its class embedding beside those classes.
        times: the times in (0, 1] or of the schedule at which the stock pipeline calls a teacher in so many steps, for
            a picture of so many tokens.
        middle: the layer in the middle of the network, which discriminators read, by its configuration.
        picture: which of several tensors that such a layer returns is the picture's.
    """

    network: str
    part: Literal["unet", "transformer"]
    pipelines: tuple[str, ...]
    call: Call
    fits: Callable[[Any], bool] = lambda config: True
    words: Words | None = None
    guidance: float = 1.0
    guided_by: Literal["two passes", "input", "nothing"] = "two passes"
    statistics: tuple[str, ...] = ()
    stride: Callable[[Any], int] = lambda config: int(config.get("patch_size") or 1)
    square: bool = False
    packing: int = 1
    sample_size: int | None = None
    largest: Callable[[Any], int | None] = lambda config: None
    classes: Callable[[Any], int] = lambda config: 0
    null_rows: int = 0
    times: Callable[[NoiseSchedule, int, int], list[float]] = lambda schedule, steps, tokens: schedule.sampling_times(
        steps
    )
    middle: Callable[[Any], str] = lambda config: "mid_block"
    picture: int = 0


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


def _latent_consistency(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Call a U-Net that is told the guidance scale, from 0 on, as sines and cosines (Luo et al. 2023, sec. 4.2)."""
    from diffusers.models.embeddings import get_timestep_embedding

    scale = get_timestep_embedding(1000 * (cond["guidance"].float() - 1), network.config.time_cond_proj_dim).to(x)
    told: dict[str, Any] = {"encoder_hidden_states": cond["text"].to(x), "timestep_cond": scale}
    if "pooled" in cond:
        told["added_cond_kwargs"] = {"text_embeds": cond["pooled"].to(x), "time_ids": cond["ids"]}
    output: Tensor = network(x, time, **told).sample
    return output


def _sd3(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    text, pooled = cond["text"].to(x), cond["pooled"].to(x)
    output: Tensor = network(x, timestep=time, encoder_hidden_states=text, pooled_projections=pooled).sample
    return output


def _flux(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Call a network of tokens, each of 2 x 2 positions, that finds their places by ids and multiplies time by 1000."""
    height, width, text = x.shape[2] // 2, x.shape[3] // 2, cond["text"].to(x)
    places = torch.cartesian_prod(*(torch.arange(length, device=x.device) for length in (1, height, width))).to(x)
    packed: Tensor = network(
        F.pixel_unshuffle(x, 2).flatten(2).mT,
        timestep=time / 1000,
        guidance=cond.get("guidance"),
        encoder_hidden_states=text,
        pooled_projections=cond["pooled"].to(x),
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=places,
    ).sample
    return F.pixel_shuffle(packed.mT.unflatten(2, (height, width)), 2)


def _pixart(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    size = cond["ids"].to(x) if network.use_additional_conditions else None
    output: Tensor = network(
        x,
        timestep=time,
        encoder_hidden_states=cond["text"].to(x),
        encoder_attention_mask=cond["mask"],
        added_cond_kwargs={
            "resolution": None if size is None else size[:, :2],
            "aspect_ratio": None if size is None else size[:, 2:],
        },
    ).sample
    return output


def _sana(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = network(
        x,
        timestep=time * network.config.timestep_scale,
        encoder_hidden_states=cond["text"].to(x),
        encoder_attention_mask=cond["mask"],
    ).sample
    return output


# --- the table -------------------------------------------------------------------------------------------------------
def _halvings(config: Any) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _middle_block(config: Any) -> str:
    return f"transformer_blocks.{config['num_layers'] // 2}"


def _stock_times(evenly: bool) -> Callable[[NoiseSchedule, int, int], list[float]]:
    def times(schedule: NoiseSchedule, steps: int, tokens: int) -> list[float]:
        if isinstance(schedule, RectifiedFlow) and schedule.stock is not None:
            return schedule.stock_times(steps, tokens, evenly)
        return schedule.sampling_times(steps)

    return times


UNET = Family(
    network="UNet2DModel",
    part="unet",
    pipelines=("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline"),
    call=_by_class,
    stride=_halvings,
    classes=lambda config: config.get("num_class_embeds") or 0,
)
DIT = Family(
    network="DiTTransformer2DModel",
    part="transformer",
    pipelines=("DiTPipeline",),
    call=_by_class,
    square=True,
    classes=lambda config: config["num_embeds_ada_norm"],
    null_rows=1,
    middle=_middle_block,
)
STABLE_DIFFUSION = Family(  # 1.x and 2.x
    network="UNet2DConditionModel",
    part="unet",
    pipelines=("StableDiffusionPipeline",),
    # "text" pools what the network attends to anyway, and adds that to the embedding of the time
    fits=lambda config: config.get("addition_embed_type") in (None, "text") and not config.get("time_cond_proj_dim"),
    call=_stable_diffusion,
    words=Words(
        encoders={"text_encoder": "CLIPTextModel"},
        returns=("text", "null_text"),
        width="cross_attention_dim",
    ),
    guidance=7.5,
    stride=_halvings,
)
SDXL = replace(
    STABLE_DIFFUSION,
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
)
LATENT_CONSISTENCY = replace(
    STABLE_DIFFUSION,
    pipelines=("LatentConsistencyModelPipeline", "StableDiffusionPipeline"),
    fits=lambda config: not config.get("addition_embed_type") and config.get("time_cond_proj_dim"),
    call=_latent_consistency,
    guidance=8.5,
    guided_by="input",
)
LATENT_CONSISTENCY_XL = replace(
    SDXL,
    fits=lambda config: config.get("addition_embed_type") == "text_time" and config.get("time_cond_proj_dim"),
    call=_latent_consistency,
    guided_by="input",
)
SD3 = Family(  # 3 and 3.5
    network="SD3Transformer2DModel",
    part="transformer",
    pipelines=("StableDiffusion3Pipeline",),
    call=_sd3,
    words=Words(
        encoders={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        optional=("text_encoder_3",),
        returns=("text", "null_text", "pooled", "null_pooled"),
        states=("text_encoder_3",),
        width="joint_attention_dim",
        arguments={"prompt_2": None, "prompt_3": None},
    ),
    guidance=7.0,
    statistics=("shift_factor",),
    largest=lambda config: config["pos_embed_max_size"] * config["patch_size"],
    times=_stock_times(evenly=False),
    middle=_middle_block,
    picture=-1,
)
FLUX = Family(  # FLUX.1-dev
    network="FluxTransformer2DModel",
    part="transformer",
    pipelines=("FluxPipeline",),
    fits=lambda config: config["guidance_embeds"],
    call=_flux,
    words=Words(
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        returns=("text", "pooled", ""),
        states=("text_encoder_2",),
        width="joint_attention_dim",
    ),
    guidance=3.5,
    guided_by="input",
    statistics=("shift_factor",),
    stride=lambda config: 2,
    packing=2,
    sample_size=128,
    times=_stock_times(evenly=True),
    middle=_middle_block,
    picture=-1,
)
FLUX_SCHNELL = replace(FLUX, fits=lambda config: not config["guidance_embeds"], guidance=1.0, guided_by="nothing")
PIXART = Family(  # Alpha and Sigma
    network="PixArtTransformer2DModel",
    part="transformer",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    call=_pixart,
    words=Words(
        encoders={"text_encoder": "T5EncoderModel"},
        returns=("text", "mask", "null_text", "null_mask"),
        width="caption_channels",
        ids=lambda height, width: [height, width, height / width],
    ),
    guidance=4.5,
    middle=_middle_block,
)
SANA = Family(
    network="SanaTransformer2DModel",
    part="transformer",
    pipelines=("SanaPipeline",),
    fits=lambda config: not config.get("guidance_embeds"),
    call=_sana,
    words=Words(
        encoders={"text_encoder": "Gemma2Model"},
        returns=("text", "mask", "null_text", "null_mask"),
        width="caption_channels",
    ),
    guidance=4.5,
    times=_stock_times(evenly=False),
    middle=_middle_block,
)
FAMILIES = (
    UNET,
    DIT,
    STABLE_DIFFUSION,
    SDXL,
    LATENT_CONSISTENCY,
    LATENT_CONSISTENCY_XL,
    SD3,
    FLUX,
    FLUX_SCHNELL,
    PIXART,
    SANA,
)
PIPELINES = tuple(dict.fromkeys(name for family in FAMILIES for name in family.pipelines))
OLD_NAMES = {"ada_norm_zero": DIT.network, "ada_norm_single": PIXART.network}  # of what was `Transformer2DModel`
NETWORKS = (*dict.fromkeys(family.network for family in FAMILIES), "Transformer2DModel")


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
