"""The contract of a method: which networks it needs, and one training step as a generator of turns.

A turn is `yield player, loss`. The loop zeroes that player's gradients, runs backward, clips, moves that player only,
and resumes the generator. One-network training is one yield; a critic is `yield "critic", ...` before `yield
"student", ...`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from distillers.weights import TASKS

if TYPE_CHECKING:
    from distillers.generator import Generator
    from distillers.teacher import Teacher

Batch = dict[str, Tensor]  # "x0" (B, C, H, W) in the network's space, and the condition: "label", "sar"
Turn = tuple[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class Networks(nn.ModuleDict):
    """The networks of a method by name: denoisers, critics, discriminator heads."""

    if TYPE_CHECKING:  # torch types every submodule as Tensor | Module

        def __getitem__(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Distiller(ABC):
    """One paper. Fields are its hyper-parameters with the paper's values as defaults."""

    tasks: ClassVar[tuple[str, ...]] = TASKS  # what it can be used for

    @abstractmethod
    def networks(self, teacher: Teacher) -> Networks:
        """ "student", "teacher" (frozen) and whoever else learns or is remembered, by name."""

    @abstractmethod
    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        """Yield (player, scalar loss) turns for one iteration; progress runs from 0 to 1 over the training.

        Draws randomness from torch's global generator, which the loop seeds for every iteration.
        """

    @abstractmethod
    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        """What leaves the house: the trained network and the times it is called at."""


def frozen(module: M) -> M:
    """The module itself, in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


def trainable_copy(module: M) -> M:
    """A deep copy that learns. It answers alike for the same input: whoever drops labels says so in its method."""
    learner = copy.deepcopy(module).train().requires_grad_(True)
    for part in learner.modules():
        if type(part).__name__ == "LabelEmbedding":  # diffusers' DiT drops a tenth of its labels while it trains
            part.dropout_prob = 0.0  # type: ignore[assignment]
    return learner


def slow_copy(module: M) -> M:
    """A deep copy that only follows by `follow` (a target network or an evaluation average)."""
    return frozen(copy.deepcopy(module))


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    """slow <- decay slow + (1 - decay) fast, parameters and buffers."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - decay)
    for kept, new in zip(slow.buffers(), fast.buffers(), strict=True):
        kept.copy_(new)


def labels_and_images(batch: Batch) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Split a batch into clean data and condition (None when there is none)."""
    cond = {k: v for k, v in batch.items() if k != "x0"}
    return batch["x0"], cond or None
