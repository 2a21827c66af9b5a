"""Discriminators tell real from generated: small heads on a diffusion network's features, or a network on pixels.

The teacher's encoder already knows these pictures at every noise level, so a discriminator is a few convolutions on
top. They know no method: losses of the logits are in `losses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.lora import Adapted
from distillers.training.distiller import trainable_copy


class Heads(nn.Module):
    """Heads give one logit per sample from the activations of some layers, averaged over the layers.

    Args:
        examples: an activation of each layer, for its shape: maps (B, C, H, W), tokens (B, N, C) or vectors (B, C).
    """

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(example) for example in examples)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits (B,), float32, of activations."""
        logits = [head(f).flatten(1).mean(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0).float()


def _head(example: Tensor) -> nn.Module:
    """Build a head for activations like the example: convolutions for maps, two linear layers for others."""
    if example.ndim == 4:  # conv 3x3, conv 4x4 of stride 2, average, linear (Bai and Xu 2024)
        channels = example.shape[1]
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 1),
        )
    channels = example.shape[-1]
    return nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))


class Discriminator(nn.Module):
    """A discriminator reads some views of a sample through a trainable copy of a denoiser's encoder (Bai and Xu 2024).

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
        self.encoder = trainable_copy(denoiser).eval()
        t = torch.tensor(denoiser.schedule.t_max, device=example.device)
        with torch.no_grad():
            features = _without_the_rest(self.encoder, example, t, cond, self.layers)
        self.heads = Heads([torch.cat([f] * views, _channels(f)) for f in features])

    def encode(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> list[Tensor]:
        """Compute the encoder's activations for one view: x (B, ...) at time t, () or (B,)."""
        return self.encoder.features(x, t, cond, self.layers)

    def forward(self, *views: list[Tensor]) -> Tensor:
        """Compute logits (B,) of the views of a sample, high for what looks real."""
        return self.heads([torch.cat(maps, _channels(maps[0])) for maps in zip(*views, strict=True)])


class PatchDiscriminator(nn.Module):
    """A patch discriminator says whether each patch of a picture is real (Isola et al. 2017, sec. 3.2.2).

    Strided convolutions halve the picture three times, so a logit answers for a patch of 54 pixels. Group normalisation
    replaces their batch normalisation: the logits of a picture do not depend on what else is in the batch.

    Args:
        channels: of the first layer, a multiple of 8; the two after it have twice and four times as many.
        bands: of the pictures.
    """

    def __init__(self, channels: int = 64, bands: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(bands, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs, kernel, stride in ((1, 2, 4, 2), (2, 4, 4, 2), (4, 4, 3, 1)):
            convolution = nn.Conv2d(inputs * channels, outputs * channels, kernel, stride, 1)
            layers += [convolution, nn.GroupNorm(8, outputs * channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * channels, 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute logits (B, 1, H/8, W/8), float32, of pictures (B, C, H, W) in [-1, 1] with sides of 8 or more."""
        logits: Tensor = self.layers(pictures)
        return logits.float()


def _channels(activation: Tensor) -> int:
    """Return the dimension of the channels: maps are (B, C, H, W), others have them last."""
    return 1 if activation.ndim == 4 else -1


def _without_the_rest(
    denoiser: Denoiser, example: Tensor, t: Tensor, cond: Cond | None, layers: Sequence[str]
) -> list[Tensor]:
    """Compute the activations of an example, and remove the parts of the network that they did not need."""
    network, called = denoiser.network, set()
    handles = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in network.modules()]
    try:
        features = denoiser.features(example, t, cond, layers)
    finally:
        for handle in handles:
            handle.remove()
    for module in () if isinstance(network, Adapted) else list(network.modules()):  # a base is others' too
        for name, child in list(module.named_children()):
            if any(True for _ in child.parameters()) and not any(part in called for part in child.modules()):
                setattr(module, name, nn.Identity())
    return features


@contextmanager
def frozen_gradients(net: nn.Module) -> Iterator[None]:
    """Freeze the network's parameters: calls inside build a graph to its inputs only, for another player's turn."""
    learning = [p for p in net.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
