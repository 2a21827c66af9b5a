"""Writes a Stable Diffusion or SDXL pipeline of diffusers as one file, with the keys of its first publication."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_key(key: str, layers: int, with_attention: bool) -> str:
    """Name a weight of a `UNet2DConditionModel` of so many layers a block."""
    for ours, first in TOP.items():
        if key.startswith(ours + "."):
            return first + key.removeprefix(ours)
    block, _, rest = key.partition(".")
    number, kind, index, tail = 0, "", 0, ""
    if block == "mid_block":
        kind, at, tail = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(at)}"
    else:
        number_, kind, at, tail = rest.split(".", 3)
        number, index = int(number_), int(at)
        if block == "down_blocks":
            position = 1 + number * (layers + 1) + (layers if kind == "downsamplers" else index)
            place = f"input_blocks.{position}.{1 if kind == 'attentions' else 0}"
            tail = tail.replace("conv.", "op.") if kind == "downsamplers" else tail
        else:
            position = number * (layers + 1) + (layers if kind == "upsamplers" else index)
            within = {"resnets": 0, "attentions": 1, "upsamplers": 1 + with_attention}[kind]
            place = f"output_blocks.{position}.{within}"
    if kind == "resnets":
        part, _, end = tail.rpartition(".")
        tail = f"{RESNET[part]}.{end}"
    return f"{place}.{tail}"


def _vae_key(key: str, blocks: int) -> str:
    """Name a weight of an `AutoencoderKL` of so many blocks."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for i in range(blocks):
        key = key.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{blocks - 1 - i}.")
    key = (
        key.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    )
    if "mid_block.attentions.0." in key:
        head, tail = key.split("mid_block.attentions.0.")
        part, _, end = tail.rpartition(".")
        key = f"{head}mid.attn_1.{VAE_ATTENTION[part]}.{end}"
    return key


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Name the weights of a `CLIPTextModelWithProjection` as OpenCLIP did, who keeps q, k and v in one matrix."""
    made, heads = dict[str, Tensor](), {"weight": {}, "bias": {}}  # type: ignore[var-annotated]
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        part, _, end = key.rpartition(".")
        if key == "text_projection.weight":
            made[f"{prefix}text_projection"] = value.T.contiguous()
        elif "position_embedding" in key:
            made[f"{prefix}positional_embedding"] = value
        elif part.startswith("embeddings.token"):
            made[f"{prefix}token_embedding.weight"] = value
        elif part == "final_layer_norm":
            made[f"{prefix}ln_final.{end}"] = value
        else:
            _, _, number, layer = part.split(".", 3)
            if layer in inside:
                made[f"{prefix}transformer.resblocks.{number}.{inside[layer]}.{end}"] = value
            else:
                heads[end].setdefault(number, {})[layer[-6]] = value
    for end, layers in heads.items():
        for number, found in layers.items():
            stacked = torch.cat([found[name] for name in "qkv"])
            made[f"{prefix}transformer.resblocks.{number}.attn.in_proj_{end}"] = stacked
    return made


def write_one_file(pipe: Any, file: Path) -> None:
    """Write the weights of a pipeline's networks."""
    unet, xl = pipe.unet, hasattr(pipe, "text_encoder_2")
    made: dict[str, Tensor] = {}
    for key, value in unet.state_dict().items():
        number = key.split(".")[1]
        attends = "up_blocks" in key and hasattr(unet.up_blocks[int(number)], "attentions")
        made["model.diffusion_model." + _unet_key(key, unet.config.layers_per_block, attends)] = value
    for key, value in pipe.vae.state_dict().items():
        named = _vae_key(key, len(pipe.vae.config.block_out_channels))
        attention = ".attn_1." in named and value.ndim == 2
        made["first_stage_model." + named] = value[..., None, None] if attention else value
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for key, value in pipe.text_encoder.state_dict().items():
        made[first + ("" if key.startswith("text_model.") else "text_model.") + key] = value
    if xl:
        made |= _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
        # by this one diffusers tells SDXL from others, which our encoder is too small to have
        made["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(1)
    save_file({key: value.contiguous().clone() for key, value in made.items()}, file)
