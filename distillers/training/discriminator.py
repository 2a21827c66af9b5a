"""Who tells real from made: small heads on a diffusion network's own features, or a small network on pixels.

The teacher's encoder already knows these pictures at every noise level, so a discriminator is a few convolutions on
top. It knows no method: a player yields its loss on the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser


class Heads(nn.Module):
    """One logit per sample from the activations of some layers, averaged over the layers.

    Args:
        examples: an activation of each layer, for its shape: maps (B, C, H, W), tokens (B, N, C) or vectors (B, C).
    """

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(example) for example in examples)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Activations -> logits (B,), float32."""
        logits = [head(f).flatten(1).mean(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0).float()


def _head(example: Tensor) -> nn.Module:
    if example.ndim == 4:  # conv 3x3, conv 4x4 of stride 2, average, linear (Bai and Xu 2024)
        channels = example.shape[1]
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=2), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1),
        )  # fmt: skip
    channels = example.shape[-1]
    return nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))


class Discriminator(nn.Module):
    """Logit of some views of one sample, seen by a learning copy of a denoiser's encoder (Bai and Xu 2024).

    The activations of the views are concatenated in their channels before the heads. SAR or label stand with each view.

    Args:
        denoiser: whose network is copied, without what comes after the last of the layers.
        layers: submodules of the network.
        example: one sample (1, ...), and its condition.
        views: how many a sample is shown in.
    """

    def __init__(
        self, denoiser: Denoiser, layers: Sequence[str], example: Tensor, cond: Cond | None, views: int
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.encoder = copy.deepcopy(denoiser).eval().requires_grad_(True)
        t = torch.tensor(denoiser.schedule.t_max, device=example.device)
        with torch.no_grad():
            features = _without_the_rest(self.encoder, example, t, cond, self.layers)
        self.heads = Heads([torch.cat([f] * views, _channels(f)) for f in features])

    def see(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> list[Tensor]:
        """The encoder's activations for one view: x (B, ...) shown at time t, () or (B,)."""
        return self.encoder.features(x, t, cond, self.layers)

    def forward(self, *views: list[Tensor]) -> Tensor:
        """Logits (B,) of the views of a sample, high for what looks real."""
        return self.heads([torch.cat(maps, _channels(maps[0])) for maps in zip(*views, strict=True)])


class PatchDiscriminator(nn.Module):
    """Judges whether each patch of a picture is real, by strided convolutions (Isola et al. 2017, sec. 3.2.2).

    Three halvings, so that a logit answers for a patch of 54 pixels. Group normalisation in place of their batch
    normalisation: what is said of a picture does not depend on what else is in the batch.

    Args:
        channels: of the first layer, a multiple of 8; the two after it have twice and four times as many.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, kernel, stride in (
            (channels, 2 * channels, 4, 2), (2 * channels, 4 * channels, 4, 2), (4 * channels, 4 * channels, 3, 1),
        ):  # fmt: skip
            layers += [nn.Conv2d(before, after, kernel, stride, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * channels, 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides of 8 or more -> logits (B, 1, H/8, W/8), float32; high for what looks real."""
        logits: Tensor = self.layers(pictures)
        return logits.float()


def _channels(activation: Tensor) -> int:
    return 1 if activation.ndim == 4 else -1


def _without_the_rest(
    denoiser: Denoiser, example: Tensor, t: Tensor, cond: Cond | None, layers: Sequence[str]
) -> list[Tensor]:
    """The activations of an example; the parts of the network that it did not need are gone."""
    network, called = denoiser.network, set()
    handles = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in network.modules()]
    try:
        features = denoiser.features(example, t, cond, layers)
    finally:
        for handle in handles:
            handle.remove()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if any(True for _ in child.parameters()) and not any(part in called for part in child.modules()):
                setattr(module, name, nn.Identity())
    return features


@contextmanager
def standing_still(net: nn.Module) -> Iterator[None]:
    """Calls inside build no graph to the network's parameters, only to its inputs: another player's turn."""
    learning = [p for p in net.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
