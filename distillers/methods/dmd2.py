"""Distribution matching distillation (DMD2) makes the student's samples distributed as the teacher's.

Yin, Gharbi, Park, Zhang, Shechtman, Durand and Freeman, "Improved Distribution Matching Distillation for Fast Image
Synthesis", 2024 (DMD2), after "One-step Diffusion with Distribution Matching Distillation", 2024 (DMD), whose
regression pairs are an option; the other losses: Zhou et al., "Score identity Distillation", 2024 (SiD), and Xu, Nie
and Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025.

The gradient of KL(student || teacher) at a diffused sample is the difference of two scores. The teacher has one; a
critic, which learns to denoise the student's samples, approximates the other, so it takes several turns for each of the
student's. No trajectory is followed: a noise need not become the picture that the teacher makes of it.

Reductions are part of the method: every term is a mean over samples and elements, and the matching term is divided by
mean|x - x0_teacher| of each sample, so the weights of the adversarial terms do not depend on the picture's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond, split
from distillers.teacher import Teacher
from distillers.training.discriminator import Heads, frozen_gradients
from distillers.training.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    frozen,
    new_student,
    split_batch,
    trainable_copy,
)
from distillers.training.losses import (
    Divergence,
    Lpips,
    check_steps,
    consistency_generator,
    denoising,
    diffuse,
    discriminator_loss,
    distribution_matching,
    gan_loss,
    gradient_norms,
    per_sample_mse,
    ratio_weight,
    sample_student,
    score_identity,
    teacher_samples,
)


@dataclass(frozen=True, kw_only=True)
class Dmd2(Distiller):
    """grad L = E (x0_critic(x_t) - x0_teacher(x_t)) / mean|x - x0_teacher(x_t)| dx/dtheta, x_t a diffused sample x."""

    steps: tuple[int, ...] = (1,)  # step counts trained for, by backward simulation, and published
    start: str | None = None  # absent: the teacher's weights; "untrained"; or a folder of the same network
    network: dict[str, Any] | None = None  # options of the teacher's network class that differ: a smaller student
    guidance_scale: float = 1.0  # of the teacher; 1 = none; the critic has none
    critic_turns: int = 5  # of the critic for one of the student's (two time scales)
    loss: Literal["dmd", "sid"] = "dmd"  # the score difference, or SiD's, whose gradient goes through both networks
    alpha: float = 1.2  # of SiD; its authors' users report 0.5 to 1 away from its data sets
    divergence: Divergence = "reverse-kl"  # others weigh by a discriminator's density ratio
    # adversarial term
    gan_weight: float = 0.0  # of the student's (paper: 1e-3 to 5e-3); 0 = none
    discriminator_weight: float = 1e-2  # of the heads' loss beside the critic's own, where they read the critic
    gan_features: Literal["critic", "teacher"] = "critic"  # whose features the heads read
    layers: tuple[str, ...] = ("mid_block",)  # which
    # regression term (DMD)
    pairs: int = 0  # pairs (noise, the teacher's sample of it) for the regression; 0 = none
    pair_steps: int = 20  # of its solver (Heun)
    regression_weight: float = 0.25  # of the distance to the teacher's samples
    distance: Literal["l2", "lpips"] = "l2"  # lpips (the paper's) needs torchvision

    def __post_init__(self) -> None:
        check_steps("dmd2.steps", self.steps)
        self._at_least(1, "critic_turns", "pair_steps")
        self._at_least(0, "pairs", "gan_weight", "regression_weight", "discriminator_weight", "guidance_scale")
        if self.divergence != "reverse-kl" and (not self.gan_weight or self.loss == "sid"):
            allowed = 'reverse-kl, or a gan_weight above 0 and loss = "dmd": a discriminator tells the density ratio'
            raise BadInput("dmd2.divergence", self.divergence, allowed)

    @property
    def needs_pictures(self) -> bool:
        return self.gan_weight > 0  # of its adversarial term, to tell real from fake

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": new_student(teacher, self.start, self.network, "dmd2")})
        nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        nets["critic"] = trainable_copy(teacher.initial)
        x0, cond = teacher.example()
        if self.gan_weight:
            t = torch.tensor(teacher.initial.schedule.t_max)
            with torch.no_grad():
                heads = Heads(teacher.initial.features(x0, t, cond, self.layers))
            if self.gan_features == "critic":
                nets["critic"].heads = heads  # they learn in its turns
            else:
                nets["backbone"], nets["discriminator"] = frozen(teacher.initial), heads
        if self.pairs:
            if cond and "label" not in cond:
                raise BadInput("dmd2.pairs", self.pairs, "0 where no classes are drawn: SAR and texts come from data")
            nets["pairs"] = frozen(Pairs(self.pairs, self.pair_steps, x0, len(teacher.info.labels) if cond else 0))
            if self.distance == "lpips":
                nets["lpips"] = frozen(Lpips(teacher.codec))
        return nets

    def draws(self, progress: float) -> int:
        return self.critic_turns + 1  # noise, data and conditions that no other turn has seen

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, teacher, critic = nets["student"], nets["teacher"], nets["critic"]
        schedule = critic.schedule  # the student's own ends where its sampling starts
        last, *earlier = split(batch, self.draws(progress))

        # the critic denoises samples of the student (DMD eq. 6)
        for part in earlier:
            x0, cond = split_batch(part)
            with torch.no_grad():
                fake_x0 = sample_student(student, torch.randn_like(x0), cond, self.steps)
            t, x_t = diffuse(schedule, fake_x0)
            loss = denoising(critic, x_t, t, fake_x0, cond)
            if self.gan_weight:
                real_t = schedule.add_noise(x0, torch.randn_like(x0), t)
                fake_logits, real_logits = (self.logits(nets, sample, t, cond) for sample in (x_t, real_t))
                gan = discriminator_loss(fake_logits, real_logits)
                if self.gan_features == "critic":
                    loss = loss + self.discriminator_weight * gan
                else:
                    yield "discriminator", gan
            yield "critic", loss

        # the student descends the difference of the two scores at a diffused sample (DMD eq. 7)
        x0, cond = split_batch(last)
        x = sample_student(student, torch.randn_like(x0), cond, self.steps)
        t, x_t = diffuse(schedule, x)
        weight = None
        if self.gan_weight:
            with frozen_gradients(nets["critic" if self.gan_features == "critic" else "discriminator"]):
                logits = self.logits(nets, x_t, t, cond)
            weight = ratio_weight(logits, t, self.divergence)
        if self.loss == "sid":
            with frozen_gradients(critic):
                loss = score_identity(x, teacher(x_t, t, cond), critic(x_t, t, cond), self.alpha)
        else:
            with torch.no_grad():
                real, fake = teacher(x_t, t, cond), critic(x_t, t, cond)
            loss = distribution_matching(x, real, fake, weight)
        if self.gan_weight:
            adversary = self.gan_weight * gan_loss(logits, real=True)
            for name, norm in zip(("loss", "adversary"), gradient_norms(x, loss, adversary), strict=True):
                nets.pull(name, norm)
            loss = loss + adversary
        if self.pairs:  # regression to the teacher's samples of the same noises (DMD eq. 9)
            noise, target, pair_cond = nets["pairs"](teacher, len(x0))
            d = nets["lpips"] if self.distance == "lpips" else per_sample_mse
            loss = loss + self.regression_weight * d(sample_student(student, noise, pair_cond), target).mean()
        yield "student", loss

    def logits(self, nets: Networks, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Compute the discriminator's logits (B,) of diffused samples."""
        if self.gan_features == "critic":
            return nets["critic"].heads(nets["critic"].features(x_t, t, cond, self.layers))
        return nets["discriminator"](nets["backbone"].features(x_t, t, cond, self.layers))

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return consistency_generator(nets["student"], teacher, self.steps)


class Pairs(nn.Module):
    """Pairs holds noises and the teacher's samples of them, with labels in turn. They are made at the first call.

    They are of all classes, whatever the batches hold: a student of few classes loses modes on filtered pairs.
    """

    noise: Tensor
    x0: Tensor
    label: Tensor
    ready: Tensor

    def __init__(self, count: int, steps: int, example: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("noise", torch.zeros(count, *example.shape[1:]))
        self.register_buffer("x0", torch.zeros(count, *example.shape[1:]))
        self.register_buffer("label", torch.arange(count) % max(classes, 1))
        self.register_buffer("ready", torch.tensor(False))
        self.classes, self.steps = classes, steps

    @torch.no_grad()
    def forward(self, teacher: nn.Module, n: int) -> tuple[Tensor, Tensor, Cond | None]:
        """Choose n pairs: noises (n, ...), the teacher's samples of them, their condition."""
        if not self.ready:
            self.noise.normal_()
            for part in torch.arange(len(self.noise), device=self.noise.device).split(64):
                self.x0[part] = teacher_samples(teacher, self.noise[part], self._cond(part), self.steps, "heun")
            self.ready.fill_(True)
        chosen = torch.randint(len(self.noise), (n,), device=self.noise.device)
        return self.noise[chosen], self.x0[chosen], self._cond(chosen)

    def _cond(self, chosen: Tensor) -> Cond | None:
        return {"label": self.label[chosen]} if self.classes else None
