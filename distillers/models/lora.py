"""Low-rank adapters of a frozen network: y = W x + (alpha / rank) B A x in every layer (LoRA, Hu et al. 2021).

The peft library adds them; it is imported inside functions, for that is slow. The network keeps its class and is
changed in place. `lora_state` is the adapter in the format that diffusers loads, `fused` the plain network with the
change added to its weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distillers.errors import BadInput

NAME = "default"  # peft's name for the one adapter a network has


def add_lora(network: nn.Module, rank: int, alpha: float | None = None) -> nn.Module:
    """Give every linear and 2-d convolution layer an adapter; freeze all else. Changes the network and returns it.

    B starts as zero, so that the network still answers as before; A is drawn from torch's global generator.

    Args:
        network: `UNet2DModel`, `DiTTransformer2DModel` or a plain module, without an adapter.
        rank: columns of B and rows of A, 1 or more.
        alpha: the change is scaled by alpha / rank; None for rank, which is no scaling.

    Raises:
        BadInput: a rank below 1, an alpha that is not above 0.
        ValueError: the network has an adapter already.
    """
    if rank < 1:
        raise BadInput("lora_rank", rank, "1 or more")
    if alpha is not None and not alpha > 0:
        raise BadInput("lora_alpha", alpha, "a number above 0")
    if has_lora(network):
        raise ValueError("the network already has a LoRA")
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = "|".join(map(re.escape, layers))  # a pattern, for names in a list would match as endings of others, too
    # LoraConfig says int, but only ever divides by it
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names)  # type: ignore[arg-type]
    training = network.training
    inject_adapter_in_model(config, network, NAME)
    return network.train(training)


def has_lora(network: nn.Module) -> bool:
    """Tell whether `add_lora` was called on the network, or on what it is a copy of."""
    return NAME in getattr(network, "peft_config", {})


def lora_rank(network: nn.Module) -> int:
    """Return the rank of a network's adapter."""
    config: Any = network.peft_config
    return int(config[NAME].r)


def set_lora_scale(network: nn.Module, scale: float) -> None:
    """Set the factor of the trained change: 0 is exactly the teacher, 1 the student. It does not accumulate."""
    for _, layer in _layers(network):
        layer.set_scale(NAME, scale)


@contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Switch a network's adapter off inside the block, and back to its scale afterwards."""
    scales = [(layer, layer.scaling[NAME]) for _, layer in _layers(network)]
    set_lora_scale(network, 0)
    try:
        yield
    finally:
        for layer, scale in scales:
            layer.scaling[NAME] = scale


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Export the adapter for diffusers: "unet.<layer>.lora_A.weight" (rank, in, ...) and lora_B (out, rank, ...).

    The keys of what is no U-Net start with "transformer". B is multiplied by the present scale, alpha / rank included:
    the format has no place for it, and whoever loads the state takes it for 1.
    """
    from peft import get_peft_model_state_dict

    prefix = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    scales = {name: layer.scaling[NAME] for name, layer in _layers(network)}
    state: dict[str, Tensor] = {}
    for key, value in get_peft_model_state_dict(network, adapter_name=NAME).items():
        layer, _, kind = key.partition(".lora_")
        state[f"{prefix}.{key}"] = value.detach() * (scales[layer] if kind.startswith("B") else 1)
    return state


def fused(network: nn.Module) -> nn.Module:
    """Copy the network, frozen, with the change added to its weights at the present scale, into plain layers."""
    plain = copy.deepcopy(network).requires_grad_(False)
    for name, layer in list(_layers(plain)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    del plain.peft_config
    return plain


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
