"""Refinement of a translator end to end: the student's one-step samples are compared with the real pictures.

Qin, Zou, Li and Zhang, "Efficient End-to-End Diffusion Model for One-step SAR-to-Optical Translation" (E3Diff), 2024
(stage 2, weights as in the released configuration); backward simulation of the earlier steps: Yin et al., "Improved
Distribution Matching Distillation for Fast Image Synthesis" (DMD2), 2024.

A distilled translator can only be as good as its teacher. Here gradients flow through the very call that is served,
from pure noise, to four losses: of pixels, perceptual features, the spectrum, and a discriminator. The paper's features
are VGG's and CLIP's, ours those of the network that the student starts from: no other weights, and any space. For pairs
only: the noise says nothing about the picture, SAR does. The pair may be misregistered by a pixel or two; all but the
discriminator compare at each sample's best shift, so that a sharp picture does not cost more than a blurred one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from distillers.generator import Generator
from distillers.teacher import Teacher
from distillers.training.discriminator import Discriminator, frozen_gradients
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, split_batch, trainable_copy
from distillers.training.losses import (
    best_shift,
    check_steps,
    consistency_generator,
    discriminator_loss,
    feature_distance,
    focal_frequency,
    gan_loss,
    ramp,
    sample_student,
)


@dataclass(frozen=True, kw_only=True)
class Refine(Distiller):
    """L = |x - x0| + 5 L_perceptual + 10 L_frequency + 0.5 L_adversarial, x sampled from noise (Qin et al. 2024).

    `teacher` is where the student starts: a diffusion teacher, or better a consistency student.
    """

    tasks: ClassVar[tuple[str, ...]] = ("sar-to-optical",)
    pixel_weight: float = 1.0  # of the mean absolute difference
    perceptual_weight: float = 5.0  # of the distance in the frozen start network's own features (paper: LPIPS on VGG)
    frequency_weight: float = 10.0  # of the focal frequency loss
    adversarial_weight: float = 0.5  # of the GAN loss, once ramped up
    adversarial_ramp: float = 0.1  # share of the training over which it rises
    layers: tuple[str, ...] = ("mid_block",)  # what D's heads and the perceptual distance read
    shift: int = 2  # pixels that a pair may be off by without being punished
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts trained for and published

    def __post_init__(self) -> None:
        check_steps("refine.steps", self.steps)
        self._at_least(0, "pixel_weight", "perceptual_weight", "frequency_weight", "adversarial_weight")
        self._at_least(0, "adversarial_ramp", "shift")

    @property
    def fits_head(self) -> bool:
        return False

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": trainable_copy(teacher.denoiser), "teacher": frozen(teacher.denoiser)})
        x0, cond = teacher.example()
        teacher.denoiser.features(x0, torch.tensor(teacher.denoiser.schedule.t_min), cond, self.layers)
        if self.adversarial_weight:
            nets["discriminator"] = Discriminator(teacher.denoiser, self.layers, x0, cond, views=1)
        nets["codec"] = frozen(teacher.codec)
        return nets

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, schedule = nets["student"], nets["student"].schedule
        x0, cond = split_batch(batch)
        x = sample_student(student, torch.randn_like(x0), cond, self.steps)

        t_min = torch.tensor(schedule.t_min, device=x0.device)
        loss = x0.new_zeros(())
        strength = self.adversarial_weight * ramp(progress, 0.0, self.adversarial_ramp)
        if self.adversarial_weight:
            D = nets["discriminator"]
            fake_logits, real_logits = (D(D.encode(sample, t_min, cond)) for sample in (x.detach(), x0))
            yield "discriminator", discriminator_loss(fake_logits, real_logits)
            with frozen_gradients(D):
                fake_logits = D(D.encode(nets.noted(x, "adversary"), t_min, cond))
            loss = loss + strength * gan_loss(fake_logits, real=True)
        codec, x = nets["codec"], nets.noted(x, "loss")
        pixels = codec.decode(x)
        truth = best_shift(pixels, codec.decode(x0), self.shift)
        loss = loss + self.pixel_weight * (pixels - truth).abs().mean()
        loss = loss + self.frequency_weight * focal_frequency(pixels, truth).mean()
        if self.perceptual_weight:
            distance = feature_distance(nets["teacher"], x, codec.encode(truth), cond, self.layers)
            loss = loss + self.perceptual_weight * distance.mean()
        yield "student", loss

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return consistency_generator(nets["student"], teacher, self.steps)
