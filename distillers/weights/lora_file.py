"""Reading adapters that others have trained: one file, in diffusers' keys or in those of Kohya's scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.text import PromptEncoder

OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "lora_mid", "lora_B.bias", "oft_")


def read_lora(file: Path, network: nn.Module, prompts: PromptEncoder) -> dict[str, dict[str, Tensor]]:
    """Read a LoRA by diffusers' own converters: for each part of the pipeline what it adds there.

    Args:
        file: safetensors.
        network: a network of the pipeline that it is for.
        prompts: the text encoders of that pipeline.

    Returns:
        By "unet" or "transformer", "text_encoder" ...: tensors as `lora_state` has them, with the scale in B.

    Raises:
        BadInput: a file that cannot be read, or of another kind of adapter; a pipeline that loads none.
    """
    from safetensors.torch import load_file

    kind = type(prompts.pipeline)
    if not hasattr(kind, "lora_state_dict"):
        raise BadInput(str(file), "a LoRA", f"none: {kind.__name__} of diffusers loads no adapters")
    allowed = f"a LoRA of {kind.__name__}, as safetensors with the keys of diffusers or of Kohya's scripts"
    try:
        tensors = load_file(file)
        if others := sorted({name for name in OTHER_KINDS for key in tensors if name in key}):
            raise ValueError(f"tensors {', '.join(others)}")
        asked = {"unet_config": network.config, "return_alphas": True, "return_lora_metadata": True}
        found = kind.lora_state_dict(file.parent, weight_name=file.name, local_files_only=True, **asked)
        state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
        made = {}
        for part, module in {prompts.family.part: network, **prompts.encoders}.items():
            own = _scaled(part, module, state, alphas or {}, metadata or {}, text=module is not network)
            if own:
                made[part] = own
    except Exception as error:  # whatever diffusers' converters make of other files
        raise BadInput(str(file), f"{type(error).__name__}: {error}".splitlines()[0][:200], allowed) from None
    if sum(map(len, made.values())) != len(state):
        given = f"layers of {', '.join(sorted({key.partition('.')[0] for key in state})) or 'nothing'}"
        raise BadInput(str(file), given, allowed)
    return made


def _scaled(
    part: str,
    module: nn.Module,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, Any],
    metadata: Mapping[str, Any],
    text: bool,
) -> dict[str, Tensor]:
    """Take what is a part's, by the names of its layers, and multiply B by alpha / rank."""
    named: Callable[[Mapping[str, Any]], dict[str, Any]] = _text_names if text else _network_names
    own = named({k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")})
    # an alpha has the name of its layer, or that of its layer's first tensor
    scales = {
        k.removeprefix(f"{part}.").removesuffix(".alpha"): v for k, v in alphas.items() if k.startswith(f"{part}.")
    }
    scales = {k.partition(".lora_A")[0]: v for k, v in named(scales).items()}
    usual, pattern = metadata.get(f"{part}.lora_alpha"), metadata.get(f"{part}.alpha_pattern") or {}
    layers, found = dict(module.named_modules()), {}
    for key, value in own.items():
        name, _, kind = key.rpartition(".lora_")
        layer = name if name in layers else name.removeprefix("text_model.")
        weight: Any = getattr(layers.get(layer), "weight", None)
        value = value.float()
        if weight is not None and value.ndim != weight.ndim:  # a convolution of one position is a linear layer
            value = value.flatten(1) if weight.ndim == 2 else value[..., None, None]
        if kind.startswith("B"):
            alpha = scales.get(name, next((v for k, v in pattern.items() if f".{name}".endswith(f".{k}")), usual))
            value = value if alpha is None else value * (float(alpha) / value.shape[1])
        found[f"{part}.{layer}.lora_{kind}"] = value
    return found


def _network_names(state: Mapping[str, Any]) -> dict[str, Any]:
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    if any(".lora_A" in key for key in state):
        return dict(state)
    return dict(convert_unet_state_dict_to_peft(dict(state)))


def _text_names(state: Mapping[str, Any]) -> dict[str, Any]:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    if not state or any(".lora_A" in key for key in state):
        return dict(state)
    return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(state))))
