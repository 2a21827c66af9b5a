"""A reward says how much a picture is liked, as a number; it can also choose between pairs of pictures.

A reward is `reward(pixels, cond) -> (B,)` in its own unit, higher is better; pixels (B, 3, H, W) in [-1, 1], about.
Feedback by gradient needs a differentiable one; comparing two pictures does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distillers.data.preferences import Preferred, write_preferences
from distillers.errors import BadInput
from distillers.evaluation.attributes import AttributeNet, is_attribute_net
from distillers.evaluation.features import FeatureNet
from distillers.evaluation.options import RewardFunction
from distillers.evaluation.pictures import to_pixels
from distillers.generator import Generator
from distillers.models.captions import pack, unpack
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.conditions import Cond


class Recognised(nn.Module):
    """The reward ln p(requested class | picture) of a feature classifier, at most 0."""

    def __init__(self, classifier: FeatureNet) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor, cond: Cond | None) -> Tensor:
        if cond is None or "label" not in cond:
            raise BadInput("reward", self.classifier.card.name, "a class-to-image teacher: a classifier judges labels")
        chosen: Tensor = self.classifier.classify(pixels)[1].log_softmax(1).gather(1, cond["label"][:, None])
        return chosen[:, 0]


class Adherence(nn.Module):
    """The reward mean ln p(named value | picture) over what a caption names, of a classifier of attributes.

    It is at most 0. Another network judges the outcome: see `evaluation.adherence`.
    """

    def __init__(self, classifier: AttributeNet) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def example(self) -> str:
        """A caption that it knows."""
        return next(iter(self.classifier.card.phrases))

    def forward(self, pixels: Tensor, cond: Cond | None) -> Tensor:
        if cond is None or "caption" not in cond:
            name = self.classifier.card.name
            raise BadInput("reward", name, "a text-to-image teacher, and data with captions: it judges what they name")
        likelihoods, asked = self.classifier.likelihoods(pixels, unpack(cond["caption"]))
        return likelihoods.sum(1) / asked.sum(1)


def greenness(pixels: Tensor, cond: Cond | None) -> Tensor:
    """Compute mean green minus the mean of red and blue; 1 is half the range of values. (B, 3, H, W) -> (B,).

    Pixels are cut to [-1, 1], as they are displayed.
    """
    if pixels.shape[1] != 3:
        raise BadInput("reward", f"greenness of {pixels.shape[1]} bands", "pictures of red, green and blue")
    red, green, blue = pixels.clamp(-1, 1).mean((2, 3)).unbind(1)
    return green - (red + blue) / 2


def load_reward(name: str) -> RewardFunction:
    """Load a reward: the folder of a classifier of labels or of attributes, or "module:function" on Python's path.

    Raises:
        BadInput: neither a folder nor something that can be imported.
    """
    if Path(name).is_dir():
        if is_attribute_net(Path(name)):
            return Adherence(AttributeNet.load(name))
        return Recognised(FeatureNet.load(name))
    module, colon, function = name.partition(":")
    allowed = "a folder of a classifier, or module:function, a callable (pixels, cond) -> (B,)"
    try:
        loaded: RewardFunction = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadInput("reward", name, f"{allowed} ({error})") from None
    if not colon or not callable(loaded):
        raise BadInput("reward", name, allowed)
    return loaded


class Reward(nn.Module):
    """A reward of samples in the network's space, tried once on an example.

    Raises:
        BadInput: it is not finite there, has another shape than one number per picture, or lacks a gradient that is
            needed.
    """

    def __init__(
        self, reward: RewardFunction, codec: ImageCodec, x0: Tensor, cond: Cond | None, differentiable: bool = True
    ) -> None:
        super().__init__()
        self.reward, self.codec = reward, codec
        tried = x0.clone().requires_grad_()
        if isinstance(reward, Adherence) and cond and ("text" in cond or "tokens" in cond):
            cond = {**cond, "caption": pack([reward.example] * len(x0))}
        try:
            with torch.enable_grad():
                value = torch.as_tensor(reward(codec.decode(tried), cond))
        except (TypeError, RuntimeError) as error:
            raise BadInput("reward", f"{type(error).__name__}: {error}", "a function (pixels, cond) -> (B,)") from error
        silent = differentiable and not value.requires_grad
        if value.shape != (len(x0),) or not bool(value.isfinite().all()) or silent:
            given = f"{value.tolist()} for an example" + (", without a gradient" if silent else "")
            raise BadInput("reward", given, f"one finite{', differentiable' * differentiable} number per picture")

    def forward(self, x0: Tensor, cond: Cond | None) -> Tensor:
        """Compute the rewards (B,) of samples (B, ...)."""
        return self.reward(self.codec.decode(x0), cond).float()


def judges_of(modules: Iterable[nn.Module]) -> set[str]:
    """Name the classifiers of attributes among modules: what learns from them is not judged by them."""
    return {module.card.name for module in modules if isinstance(module, AttributeNet)}


@dataclass(frozen=True)
class Chosen:
    """The outcome of `choose_pairs`: pairs that differed in reward, ties, and mean rewards."""

    pairs: int
    ties: int
    winners: float
    losers: float


def choose_pairs(
    generator: Generator, reward: RewardFunction, folder: Path, *, n: int, steps: int, seed: int
) -> Chosen:
    """Draw n pairs, let the reward choose, and write them as a preference folder (see `distillers.data.preferences`).

    Both pictures of pair i have the same class, in turn; their seeds are seed + 2 i and seed + 2 i + 1. Ties are left
    out, so that fewer than n may be written.

    Raises:
        BadInput: a translator; a step count that was not published; what is no reward; ties alone; an existing folder.
    """
    info = generator.info
    if generator.condition.paired:
        raise BadInput("model", info.name, "one that draws pictures, with classes or without: no translator")
    if n < 1:
        raise BadInput("n", n, "1 or more")
    rewards: list[Tensor] = []  # (winners, losers) of pairs that differ
    ties = 0

    def pairs(batch: int = 32) -> Iterator[Preferred]:
        nonlocal ties
        judge: Reward | None = None
        for first in range(0, n, batch):
            numbers = range(first, min(first + batch, n))
            given = generator.condition.in_turn(numbers)
            cond = generator.encode_condition(**given)
            if "prompts" in given:
                cond = {**(cond or {}), "caption": pack(given["prompts"] or ())}
            names = generator.condition.names(given, len(numbers))
            drawn = [generator.sample([seed + 2 * i + k for i in numbers], steps=steps, **given) for k in (0, 1)]
            judge = judge or Reward(reward, PixelUnshuffle(1), drawn[0], cond, differentiable=False)
            values = torch.stack([judge(pictures, cond) for pictures in drawn], 1)
            pictures = np.stack([to_pixels(pictures) for pictures in drawn], 1)
            for i, value, both in zip(numbers, values, pictures, strict=True):
                w = int(value.argmax())
                if value[0] == value[1]:
                    ties += 1
                    continue
                rewards.append(value[[w, 1 - w]])
                yield Preferred(
                    winner=both[w],
                    loser=both[1 - w],
                    label=names[i - first],
                    extra={"seeds": [seed + 2 * i + w, seed + 2 * i + 1 - w], "rewards": value[[w, 1 - w]].tolist()},
                )

    written = write_preferences(folder, pairs(), info.labels)
    winners, losers = torch.stack(rewards).double().mean(0).tolist()
    return Chosen(written, ties, winners, losers)
