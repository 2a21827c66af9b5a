"""Rewards: what people like, as a differentiable number per picture.

A reward is `reward(pixels, cond) -> (B,)` in its own unit, higher is better; pixels (B, 3, H, W) in [-1, 1], about.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from distillers.codec import ImageCodec
from distillers.denoiser import Cond
from distillers.errors import BadInput
from distillers.features import FeatureNet

RewardFunction = Callable[[Tensor, Cond | None], Tensor]


class Recognised(nn.Module):
    """ln p(the asked class | picture) by a feature classifier: is it what was asked for? At most 0."""

    def __init__(self, classifier: FeatureNet) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor, cond: Cond | None) -> Tensor:
        if cond is None or "label" not in cond:
            raise BadInput("reward", self.classifier.card.name, "a class-to-image teacher: a classifier judges labels")
        chosen: Tensor = self.classifier.classify(pixels)[1].log_softmax(1).gather(1, cond["label"][:, None])
        return chosen[:, 0]


def load_reward(name: str) -> RewardFunction:
    """A feature classifier's folder as `Recognised`, or "module:function", a reward of the user's own on Python's path.

    Raises:
        BadInput: neither a folder nor something that can be imported.
    """
    if Path(name).is_dir():
        return Recognised(FeatureNet.load(name))
    module, colon, function = name.partition(":")
    allowed = "a folder of a feature classifier, or module:function, a callable (pixels, cond) -> (B,)"
    try:
        found: RewardFunction = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadInput("reward", name, f"{allowed} ({error})") from None
    if not colon or not callable(found):
        raise BadInput("reward", name, allowed)
    return found


class Reward(nn.Module):
    """A reward of samples in the network's space, tried once on an example.

    Raises:
        BadInput: it is not finite there, has another shape than one number per picture, or no gradient.
    """

    def __init__(self, reward: RewardFunction, codec: ImageCodec, x0: Tensor, cond: Cond | None) -> None:
        super().__init__()
        self.reward, self.codec = reward, codec
        tried = x0.clone().requires_grad_()
        with torch.enable_grad():
            value = torch.as_tensor(reward(codec.decode(tried), cond))
        if value.shape != (len(x0),) or not bool(value.isfinite().all()) or not value.requires_grad:
            given = f"{value.tolist()} for an example" + ("" if value.requires_grad else ", without a gradient")
            raise BadInput("reward", given, "one finite, differentiable number per picture")

    def forward(self, x0: Tensor, cond: Cond | None) -> Tensor:
        """(B, ...) -> (B,)."""
        return self.reward(self.codec.decode(x0), cond).float()
