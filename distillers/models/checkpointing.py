"""Gradient checkpointing that computes a network's blocks again exactly as it did the first time.

A block is computed again when a loss goes backward. By then another role may act on the same base, and parameters that
were frozen for another player's turn learn again: the same call would be another function. Turns do exactly that: DMD2
samples its student, asks teacher and critic, and only then yields the student's loss. So each block remembers which
adapter acted and whether that role learnt, and both are so again while it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from distillers.errors import BadInput
from distillers.models.lora import Adapted, AdapterBase, plain


def checkpoint_gradients(networks: Iterable[nn.Module]) -> None:
    """Let networks keep no more than the inputs of their blocks for the backward pass, and compute the rest again.

    Args:
        networks: diffusers' own, or the roles on a base, all of them in one call.

    Raises:
        BadInput: a network that has no such blocks.
    """
    roles: dict[Any, list[nn.Module]] = {}
    for network in networks:
        roles.setdefault(plain(network), []).append(network)
    for whole, players in roles.items():
        if not getattr(whole, "_supports_gradient_checkpointing", False):
            raise BadInput("train.checkpointing", True, f"false: {type(whole).__name__} has no blocks to recompute")
        learners = {_adapter(player): [p for p in player.parameters() if p.requires_grad] for player in players}
        base = next((player.base for player in players if isinstance(player, Adapted)), None)
        whole.enable_gradient_checkpointing(_recomputed(base, learners))


def _adapter(network: nn.Module) -> str:
    return (network.name or "") if isinstance(network, Adapted) else ""


def _recomputed(base: AdapterBase | None, learners: Mapping[str, Sequence[nn.Parameter]]) -> Callable[..., Any]:
    """Make the function by which diffusers calls a block whose insides are not kept."""

    def call(block: Callable[..., Any], *inputs: Any) -> Any:
        names = list(base.active) if base else []
        own = learners.get(names[0] if names else "", ())
        learning = bool(own) and own[0].requires_grad

        def as_now(*inputs: Any) -> Any:
            with base.acting(names) if base else nullcontext(), _learning(own, learning):
                return block(*inputs)

        return checkpoint(as_now, *inputs, use_reentrant=False)

    return call


@contextmanager
def _learning(parameters: Sequence[nn.Parameter], learning: bool) -> Iterator[None]:
    """Let parameters, all of one kind, learn or not inside the block."""
    if not parameters or parameters[0].requires_grad == learning:
        yield
        return
    for parameter in parameters:
        parameter.requires_grad_(learning)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(not learning)
