"""Consistency distillation, and easy consistency tuning as its teacher-free variant.

Song, Dhariwal, Chen and Sutskever, "Consistency Models", 2023 (Algorithm 2); pseudo-Huber distance: Song and Dhariwal,
"Improved Techniques for Training Consistency Models", 2023; on a frozen teacher's discrete times with DDIM steps: Luo
et al., "Latent Consistency Models", 2023; without a teacher: Geng et al., "Consistency Models Made Easy", 2024.

f(x_t, t) maps every point of a probability-flow trajectory to its end. Two neighbours on one trajectory must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from distillers.denoiser import Cond, Denoiser
from distillers.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    follow,
    frozen,
    labels_and_images,
    slow_copy,
    trainable_copy,
)
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.losses import per_sample_mse, pseudo_huber
from distillers.schedule import NoiseSchedule, VariancePreserving, like
from distillers.teacher import Teacher
from distillers.weights import lcm_times


@dataclass(frozen=True, kw_only=True)
class Consistency(Distiller):
    """L = E d( f(x_t, t), sg f-(x_s, s) ) with x_s one teacher step below x_t (Song et al. 2023, eq. 7)."""

    source: Literal["teacher", "data"] = "teacher"  # where x_s comes from: a teacher step, or the same noise (tuning)
    solver: Literal["heun", "ddim"] = "heun"  # the teacher's step: two network calls or one
    points: int = 40  # N, times on the grid (source = teacher)
    target_decay: float = 0.95  # mu of the target network; 0 = the student itself
    distance: Literal["pseudo-huber", "l2"] = "pseudo-huber"  # d
    guidance_scale: float = 1.0  # of the teacher; 1 = none
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts the generator is published with
    # easy consistency tuning (source = data)
    ratio_base: float = 2.0  # q: r/t approaches 1 - 1/q^(k+1)
    stages: int = 8  # times that the gap halves over the training
    log_mean: float = -1.1  # of ln(sigma/alpha) at t
    log_std: float = 2.0  # of the same

    def __post_init__(self) -> None:
        if self.points < 2:
            raise BadInput("consistency.points", self.points, "2 or more")
        if not 0 <= self.target_decay < 1:
            raise BadInput("consistency.target_decay", self.target_decay, "0 up to, not including, 1")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise BadInput("consistency.steps", self.steps, "different step counts of 1 or more, at least one")
        if self.ratio_base <= 1 or self.stages < 1 or self.log_std <= 0 or self.guidance_scale < 0:
            given = (self.ratio_base, self.stages, self.log_std, self.guidance_scale)
            allowed = "above 1; 1 or more; above 0; 0 or more"
            raise BadInput("consistency.ratio_base, stages, log_std, guidance_scale", given, allowed)

    def networks(self, teacher: Teacher) -> Networks:
        nets: dict[str, nn.Module] = {"student": trainable_copy(teacher.denoiser)}
        if self.source == "teacher":
            nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        if self.target_decay:
            nets["target"] = slow_copy(nets["student"])
        return Networks(nets)

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, target = nets["student"], nets["target"] if self.target_decay else nets["student"]
        schedule: NoiseSchedule = student.schedule
        x0, cond = labels_and_images(batch)
        eps = torch.randn_like(x0)

        if self.source == "teacher":
            # n ~ U{1..N-1}: t = t_{n+1}, s = t_n
            grid = schedule.grid(self.points).to(x0.device)
            n = torch.randint(self.points - 1, (len(x0),), device=x0.device)
            t, s = grid[n + 1], grid[n]
            x_t = schedule.add_noise(x0, eps, t)
            x_s = self.teacher_step(nets["teacher"], x_t, t, s, cond)
            weight = torch.ones_like(t)
        else:
            t, s = self.tuning_times(schedule, len(x0), progress, x0.device)
            x_t, x_s = schedule.add_noise(x0, eps, t), schedule.add_noise(x0, eps, s)
            weight = 1 / (schedule.noise_ratio(t) - schedule.noise_ratio(s))  # 1/(t - r) (Geng et al. 2024)

        with torch.no_grad():  # sg f-(x_s, s)
            y = consistency_function(target, x_s, s, cond)
        d = pseudo_huber if self.distance == "pseudo-huber" else per_sample_mse
        yield "student", (weight.to(x0) * d(consistency_function(student, x_t, t, cond), y)).mean()

        if self.target_decay:  # theta- <- mu theta- + (1 - mu) theta
            follow(target, student, self.target_decay)

    @torch.no_grad()
    def teacher_step(self, teacher: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None) -> Tensor:
        """One solver step of the teacher's probability-flow ODE, t -> s (Song et al. 2023, eq. 6)."""
        schedule: NoiseSchedule = teacher.schedule  # type: ignore[assignment]
        x0 = teacher(x_t, t, cond)
        x_s = schedule.step(x_t, x0, t, s)
        if self.solver == "ddim":
            return x_s
        return schedule.heun_step(x_t, x0, teacher(x_s, s, cond), t, s)

    def tuning_times(
        self, schedule: NoiseSchedule, count: int, progress: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """t lognormal, r = t (1 - q^-(k+1) (1 + 8 sigmoid(-t))) >= 0, as ratios sigma/alpha (Geng et al. 2024)."""
        ratio = (self.log_mean + self.log_std * torch.randn(count, device=device, dtype=torch.float64)).exp()
        ends = schedule.noise_ratio(torch.tensor([schedule.t_min, schedule.t_max], device=device))
        ratio = ratio.clamp(2 * ends[0], ends[1])
        stage = int(progress * self.stages)
        below = ratio * (1 - self.ratio_base ** -(stage + 1) * (1 + 8 * torch.sigmoid(-ratio)))
        return schedule.time_at_ratio(ratio), schedule.time_at_ratio(below.clamp_min(0))

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        # Never the target network: it is a lagging copy that exists for the loss.
        schedule = nets["student"].schedule
        info = replace(
            teacher.info,
            sampler="consistency",
            step_times={k: sampling_times(schedule, k) for k in self.steps},
            default_steps=min(self.steps),
            guidance_scale=1.0,  # the teacher's is in the student's weights
        )
        return Generator(nets["student"], teacher.codec, info)


def consistency_function(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """f(x, t) = c_skip(t) x + (1 - c_skip(t)) x0_theta(x, t), with f(x, t_min) = x exactly (Song et al. 2023, eq. 5).

    c_skip falls off over one t_min of noise level, as LCM's boundary scaling does: the student starts as the
    teacher's own denoiser everywhere else, and the boundary is below 1e-8 where generators are called.
    """
    schedule = denoiser.schedule
    ratio = schedule.noise_ratio(t)
    floor = schedule.noise_ratio(t.new_tensor(schedule.t_min))
    c_skip = like(floor**2 / ((ratio - floor) ** 2 + floor**2), x_t)
    return c_skip * x_t + (1 - c_skip) * denoiser(x_t, t, cond)


def sampling_times(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Times of multi-step sampling, descending: stock LCMScheduler's for diffusers' schedules, the grid's otherwise."""
    if isinstance(schedule, VariancePreserving):
        return lcm_times(schedule, steps)
    return schedule.grid(steps + 1)[1:].flip(0).tolist()
