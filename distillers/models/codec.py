"""Codecs between pixels and the space that a network works in: pixel-unshuffle, or a diffusers VAE.

Pixels are float (B, C, H, W) in [-1, 1] on both ends; C is 3 for RGB and 1 for grey.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.errors import BadInput


class ImageCodec(nn.Module, ABC):
    """A pair of maps, encode(pixels) -> x0 and decode(x0) -> pixels; `factor` pixels a side become one position."""

    kind: ClassVar[str]
    factor: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, C, H, W) to (B, `channels`(C), H / factor, W / factor)."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Map x0 back to pixels."""

    @abstractmethod
    def channels(self, pixels: int) -> int:
        """Count the channels in the network's space for so many pixel channels."""


class PixelUnshuffle(ImageCodec):
    """Space to depth: a permutation of the pixels, so diffusion in either space is the same process.

    It costs 1/factor^2 as much; factor 1 is the identity.
    """

    kind = "pixel-unshuffle"

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.factor) if self.factor > 1 else pixels

    def decode(self, x0: Tensor) -> Tensor:
        return F.pixel_shuffle(x0, self.factor) if self.factor > 1 else x0

    def channels(self, pixels: int) -> int:
        return pixels * self.factor**2


class Decoder(nn.Module):
    """The decoder of an autoencoder as a module of its own, so that a server can run it in its own way."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae
        self.config: Any = vae.config

    def forward(self, latents: Tensor) -> Any:
        """Decode latents (B, C, h, w) to `.sample` (B, C, H, W)."""
        return self.vae.decode(latents)


class Vae(ImageCodec):
    """A diffusers autoencoder, frozen; its scaling and shift make latents zero mean and unit variance.

    An SDXL autoencoder may have statistics of its own for each channel, `latents_mean` and `latents_std`. A deep
    compression autoencoder (Chen et al. 2024) is no variational one: its latents are what its encoder says.

    Raises:
        BadInput: other statistics than one of each for every channel.
    """

    kind = "vae"
    vae: Any  # a diffusers AutoencoderKL or AutoencoderDC

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.decoder: nn.Module = Decoder(self.vae)
        blocks = self.vae.config.get("block_out_channels") or self.vae.config.encoder_block_out_channels
        self.factor = 2 ** (len(blocks) - 1)
        scaling, mean, std = (self.vae.config.get(k) for k in ("scaling_factor", "latents_mean", "latents_std"))
        wanted = [self.vae.config.latent_channels] * 2
        if (mean or std) and ([len(mean or ()), len(std or ())] != wanted or not min(std) > 0):
            raise BadInput("vae: latents_mean, latents_std", (mean, std), f"{wanted[0]} of each, the second above 0")
        self.scaling: float | Tensor = float(scaling)
        self.shift: float | Tensor = float(self.vae.config.get("shift_factor") or 0)
        if mean:
            of_channels = torch.tensor([mean, std])[..., None, None]
            del self.scaling, self.shift
            self.register_buffer("shift", of_channels[0], persistent=False)
            self.register_buffer("scaling", scaling / of_channels[1], persistent=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        encoded: Any = self.vae.encode(pixels.to(self.vae.dtype))
        latents: Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        return (latents.float() - self.shift) * self.scaling

    def decode(self, x0: Tensor) -> Tensor:
        pixels: Tensor = self.decoder((x0 / self.scaling + self.shift).to(self.vae.dtype)).sample
        return pixels

    def channels(self, pixels: int) -> int:
        return int(self.vae.config.latent_channels)


@torch.no_grad()
def fold_shift(codec: Vae) -> Vae:
    """Copy an autoencoder with the shift of its latents moved into the 1x1 convolutions beside them, exactly.

    Stock text-to-image pipelines of Stable Diffusion scale latents and know no shift.

    Raises:
        BadInput: a shift, and no such convolutions.
    """
    vae = copy.deepcopy(codec.vae)
    shift, channels = float(vae.config.shift_factor or 0), vae.config.latent_channels
    if shift and (vae.quant_conv is None or vae.post_quant_conv is None):
        raise BadInput("vae: shift_factor", shift, "null, or an autoencoder with quant_conv and post_quant_conv")
    if shift:
        vae.quant_conv.bias[:channels] -= shift  # the means; the log variances stay
        vae.post_quant_conv.bias += shift * vae.post_quant_conv.weight.sum((1, 2, 3))
    vae.register_to_config(shift_factor=None)
    return Vae(vae)
