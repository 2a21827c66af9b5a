"""A variational autoencoder with a weak KL term makes the latent space that latent diffusion models work in.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, sec. 3.1 and appendix G; the
adaptive weight of its adversary: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, eq. 7;
its patch discriminator: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017; the
distance of features: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.autoencoder import Autoencoder as Product
from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.evaluation.features import EFFICIENTNET, EfficientNetFeatures
from distillers.generator import Generator
from distillers.models.codec import Vae
from distillers.teacher import Teacher
from distillers.training.discriminator import PatchDiscriminator, frozen_gradients
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen
from distillers.training.losses import gan_loss, perceptual_distance
from distillers.weights.manifest import AUTOENCODER
from distillers.weights.read import read_autoencoder


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Distiller):
    """E |x - x'| + w_p d(x, x') + w_kl KL(q(z|x) || N(0, I)) + w_a lambda L_adv(x'), and a discriminator of x and x'.

    All but the adversary are means over the values of a picture: the KL is its sum over the latents divided by the
    number of the picture's values, which is the ratio that the paper's sums have.

    With `latents_of` a smaller autoencoder takes another one's place, in latents that diffusion models know already: in
    place of the KL its encoder learns the mean and the log variance of the other's posterior by their squared
    distances, the mean's in units of the latents' deviation, and its decoder learns to decode samples of that.
    """

    tasks: ClassVar[tuple[str, ...]] = (AUTOENCODER,)
    starts_from = "data"
    published = "autoencoder"

    channels: tuple[int, ...] = (32, 64, 128, 128)  # by resolution from the picture's down; halvings lie between them
    latent_channels: int = 8  # of a latent, whose sides are the picture's over 2^(len(channels) - 1)
    layers: int = 1  # residual blocks per resolution; the decoder has one more
    latents_of: str | None = None  # folder of the autoencoder whose latents it learns
    kl_weight: float = 1e-6  # w_kl; latents are scaled afterwards, so this only keeps them from running away
    perceptual_weight: float = 0.0  # w_p, of EfficientNet-Lite0's maps; reports may then not measure in that space
    adversarial_weight: float = 0.5  # w_a; 0 = no discriminator
    adversarial_start: float = 0.3  # progress at which the discriminator and its loss enter
    adversarial_loss: Literal["hinge", "non-saturating"] = "hinge"  # what both players descend
    discriminator_channels: int = 64  # of its first layer

    def __post_init__(self) -> None:
        self._at_least(0, "kl_weight", "perceptual_weight", "adversarial_weight")
        if not 0 <= self.adversarial_start <= 1:
            raise BadInput("autoencoder.adversarial_start", self.adversarial_start, "0 to 1")
        self._at_least(1, "latent_channels", "layers")
        if not self.channels or min(self.channels) < 1:
            raise BadInput("autoencoder.channels", self.channels, "one number of 1 or more for each resolution")
        if self.discriminator_channels < 8 or self.discriminator_channels % 8:
            raise BadInput("autoencoder.discriminator_channels", self.discriminator_channels, "a multiple of 8")

    @property
    def factor(self) -> int:
        """Count the pixels a side that become one position of the latents."""
        return 2 ** (len(self.channels) - 1)

    @property
    def groups(self) -> int:
        """Count the groups of the normalisation: four channels each at the narrowest, as Rombach et al. have it.

        A group forgets its mean, and with it the colour of a flat ground: at two channels each too much is forgotten.
        """
        common = math.gcd(*self.channels)
        return common // 4 if common % 4 == 0 else 1

    def networks(self, teacher: Teacher) -> Networks:
        from diffusers import AutoencoderKL

        size, levels = teacher.info.size, len(self.channels)
        if any(side % self.factor for side in size):
            raise BadInput("data.size", size, f"a multiple of {self.factor}: autoencoder.channels halve it so far")
        vae: nn.Module = AutoencoderKL(  # type: ignore[assignment]
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            in_channels=teacher.info.channels,
            out_channels=teacher.info.channels,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            mid_block_add_attention=False,
            sample_size=max(size),
            scaling_factor=1.0,
        )
        nets = Networks({"autoencoder": vae})
        if self.latents_of is not None:
            nets["teacher"] = other = frozen(read_autoencoder(self.latents_of)[0])
            own, theirs = (self.factor, self.latent_channels), (other.factor, other.channels(teacher.info.channels))
            if own != theirs or not isinstance(other.scaling, float):
                raise BadInput(
                    "autoencoder.latents_of",
                    f"{self.latents_of}, {theirs[1]} channels at 1/{theirs[0]} of the side",
                    f"{own[1]} channels at 1/{own[0]}, as autoencoder.latent_channels and channels say",
                )
            kept = {"scaling_factor": other.scaling, "shift_factor": other.shift or None}
            vae.register_to_config(**kept)  # type: ignore[operator]
        if self.adversarial_weight:
            nets["discriminator"] = PatchDiscriminator(self.discriminator_channels, teacher.info.channels)
        if self.perceptual_weight:
            nets["perceptual"] = frozen(EfficientNetFeatures())
        return nets

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        vae, x = nets["autoencoder"], batch["x0"]
        posterior = vae.encode(x).latent_dist
        if self.latents_of is None:
            latents = posterior
            prior = self.kl_weight * divergence(posterior.mean, posterior.logvar).mean() / x[0].numel()
        else:
            with torch.no_grad():
                latents = nets["teacher"].vae.encode(x).latent_dist
            apart = [(posterior.mean - latents.mean) * nets["teacher"].scaling, posterior.logvar - latents.logvar]
            prior = sum(each.float().square().mean() for each in apart)
        x_rec = vae.decode(latents.sample()).sample.float()
        reconstruction = (x_rec - x).abs().mean()
        if self.perceptual_weight:
            distance = perceptual_distance(nets["perceptual"], x_rec, x).mean()
            reconstruction = reconstruction + self.perceptual_weight * distance
        loss = reconstruction + prior
        if not self.adversarial_weight or progress < self.adversarial_start:
            yield "autoencoder", loss
            return
        D = nets["discriminator"]
        with frozen_gradients(D):
            adversary = self._generator_loss(D(x_rec))
        weight = adaptive_weight(reconstruction, adversary, vae.decoder.conv_out.weight)
        yield "autoencoder", loss + self.adversarial_weight * weight * adversary
        yield "discriminator", self._discriminator_loss(D(x), D(x_rec.detach()))

    def _generator_loss(self, fake: Tensor) -> Tensor:
        """Compute L_adv of the logits of reconstructions."""
        return -fake.mean() if self.adversarial_loss == "hinge" else gan_loss(fake, real=True)

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Average the losses of real and fake logits, as Esser et al. do for either loss."""
        if self.adversarial_loss == "hinge":
            return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return (gan_loss(real, real=True) + gan_loss(fake, real=False)) / 2

    def generator(self, nets: Networks, teacher: Teacher) -> Product:
        trained_with = [EFFICIENTNET] if self.perceptual_weight else []
        info = replace(teacher.info, codec=Vae.kind, patch=self.factor, trained_with=trained_with)
        return Product(Vae(copy.deepcopy(nets["autoencoder"])), info)  # a copy, for a codec is frozen

    def finish(self, made: Generator | Product, data: ImageData) -> Product:
        assert isinstance(made, Product)
        if self.latents_of is None:
            made.standardise(spread(data))
        return made


def spread(data: ImageData, pictures: int = 4096, batch: int = 64) -> Iterator[Tensor]:
    """Yield batches (B, 3, H, W) in [-1, 1] of at most so many pictures, evenly spread over the data."""
    count = min(pictures, len(data))
    places = [i * len(data) // count for i in range(count)]
    for start in range(0, count, batch):
        yield data.items(places[start : start + batch])["image"]


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute KL(N(mean, exp(logvar)) || N(0, I)) of each sample, a sum over its latents (B, ...) -> (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def adaptive_weight(reconstruction: Tensor, adversary: Tensor, last: Tensor) -> Tensor:
    """Compute lambda = ||d reconstruction / d last|| / (||d adversary / d last|| + 1e-6), at most 1e4, detached.

    Both losses pull the decoder's last layer equally hard then (Esser et al. 2021, eq. 7; the bound is their code's).
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversary)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4).detach()
