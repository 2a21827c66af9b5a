"""Adversarial consistency distillation (ACD) trains few-step SAR-to-optical translators.

Bai and Xu, "Accelerating Diffusion for SAR-to-Optical Image Translation via Adversarial Consistency Distillation",
2024 (released code at commit 0bf8125).

Consistency distillation averages over what it cannot tell, which looks like blur. A discriminator - a learning copy of
the teacher's encoder that sees the noisy input and the candidate, SAR beside both - asks for pictures that could be
real. What "real" is differs between the paper's figure (the real picture) and its code (the target network's answer);
both are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.teacher import Teacher
from distillers.training.discriminator import Discriminator, frozen_gradients
from distillers.training.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    follow,
    frozen,
    new_student,
    slow_copy,
    split_batch,
)
from distillers.training.losses import (
    Solver,
    blurred,
    check_steps,
    consistency_function,
    consistency_generator,
    discriminator_loss,
    gan_loss,
    neighbours,
    per_sample_mse,
    pseudo_huber,
    ramp,
    teacher_step,
)


@dataclass(frozen=True, kw_only=True)
class AdversarialConsistency(Distiller):
    """L = E d( f(x_t, t), sg f-(x_s, s) ) + lambda E softplus( -D(x_t, f(x_t, t)) ) (Bai and Xu 2024)."""

    real: Literal["data", "target"] = "data"  # what D calls real: the picture (the figure), or sg f-(x_s, s) (the code)
    adversarial_weight: float = 1.0  # lambda, once ramped up
    adversarial_start: float = 0.1  # share of the training before the discriminator enters; paper: 0
    adversarial_ramp: float = 0.2  # share over which lambda rises; paper: 0
    layers: tuple[str, ...] = ("mid_block",)  # what D's heads read
    colour_weight: float = 0.0  # of the low-frequency colour term against the real picture; for a colour cast
    colour_pixels: int = 8  # side of the squares whose mean colour is compared: coarser than misregistration
    solver: Solver = "ddim"  # the teacher's step
    points: int = 50  # N, times on the grid
    target_decay: float = 0.95  # mu of the target network; 0 = the student itself
    guidance_scale: float = 1.0  # of the teacher; 1 = none
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts the generator is published with

    def __post_init__(self) -> None:
        if self.points < 2 or self.colour_pixels < 1:
            wrong = (self.points, self.colour_pixels)
            raise BadInput("adversarial_consistency.points, colour_pixels", wrong, "2 or more; 1 or more")
        if not 0 <= self.target_decay < 1:
            raise BadInput("adversarial_consistency.target_decay", self.target_decay, "0 up to, not including, 1")
        check_steps("adversarial_consistency.steps", self.steps)
        self._at_least(
            0, "adversarial_weight", "adversarial_start", "adversarial_ramp", "colour_weight", "guidance_scale"
        )

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": new_student(teacher)})
        nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        if self.target_decay:
            nets["target"] = slow_copy(nets["student"])
        if self.adversarial_weight:
            nets["discriminator"] = Discriminator(teacher.initial, self.layers, *teacher.example(), views=2)
        nets["codec"] = frozen(teacher.codec)
        return nets

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, target = nets["student"], nets["target"] if self.target_decay else nets["student"]
        schedule = student.schedule
        x0, cond = split_batch(batch)
        eps = torch.randn_like(x0)

        # consistency distillation: n ~ U{1..N-1}, t = t_{n+1}, s = t_n
        t, s = neighbours(schedule, self.points, len(x0), x0.device)
        x_t = schedule.add_noise(x0, eps, t)
        x_s = teacher_step(nets["teacher"], x_t, t, s, cond, self.solver)
        with torch.no_grad():  # sg f-(x_s, s)
            y = consistency_function(target, x_s, s, cond)
        f = consistency_function(student, x_t, t, cond)
        loss = pseudo_huber(nets.noted(f, "loss"), y).mean()

        strength = self.adversarial_weight * ramp(progress, self.adversarial_start, self.adversarial_ramp)
        if strength > 0:
            # D(x_t, x) sees the noisy input at t and the candidate at t_min
            D, t_min = nets["discriminator"], torch.tensor(schedule.t_min, device=x0.device)
            noisy, real = D.encode(x_t, t, cond), x0 if self.real == "data" else y
            fake_logits = D(noisy, D.encode(f.detach(), t_min, cond))
            real_logits = D(noisy, D.encode(real, t_min, cond))
            yield "discriminator", discriminator_loss(fake_logits, real_logits)
            with frozen_gradients(D):
                fake_logits = D(D.encode(x_t, t, cond), D.encode(nets.noted(f, "adversary"), t_min, cond))
            loss = loss + strength * gan_loss(fake_logits, real=True)
        if self.colour_weight:
            colours = [blurred(nets["codec"].decode(x), self.colour_pixels) for x in (f, x0)]
            loss = loss + self.colour_weight * per_sample_mse(*colours).mean()
        yield "student", loss

        if self.target_decay:  # theta- <- mu theta- + (1 - mu) theta
            follow(target, student, self.target_decay)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        # the averaged student, never the target network (which the released code saves).
        return consistency_generator(nets["student"], teacher, self.steps)
