"""Consistency distillation, and easy consistency tuning (ECT) as its teacher-free variant.

Song, Dhariwal, Chen and Sutskever, "Consistency Models", 2023 (Algorithm 2); pseudo-Huber distance: Song and Dhariwal,
"Improved Techniques for Training Consistency Models", 2023; on a frozen teacher's discrete times with DDIM steps: Luo
et al., "Latent Consistency Models", 2023; without a teacher: Geng et al., "Consistency Models Made Easy", 2024.

f(x_t, t) maps every point of a probability-flow trajectory to its end. Two neighbours on one trajectory must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.guidance import embed_guidance, fold_guidance
from distillers.models.schedule import NoiseSchedule
from distillers.teacher import Teacher
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
    Lpips,
    Solver,
    check_steps,
    consistency_function,
    consistency_generator,
    log_ratio_at,
    lognormal_times,
    neighbours,
    per_sample_mse,
    pseudo_huber,
    teacher_end,
    teacher_step,
)

LITTLE_NOISE = 0.44  # sigma/alpha, that of t = 128 in DDPM's schedule
DISTANCES = {"pseudo-huber": pseudo_huber, "l2": per_sample_mse}


@lru_cache(16)
def time_of_little_noise(schedule: NoiseSchedule) -> float:
    """Find the time up to which samples have little noise."""
    return float(schedule.time_at_ratio(torch.tensor(LITTLE_NOISE)))


@dataclass(frozen=True, kw_only=True)
class Consistency(Distiller):
    """L = E d( f(x_t, t), sg f-(x_s, s) ) with x_s one teacher step below x_t (Song et al. 2023, eq. 7).

    For a share of the samples, at times of little noise, the target is the teacher's own end of the trajectory. Errors
    of f there are in all targets above, and in every step of sampling: a student whose f had 1.2 times the power of the
    picture at the lowest times drew 3 times too much in eight steps.
    """

    source: Literal["teacher", "data"] = "teacher"  # where x_s comes from: a teacher step, or the same noise (tuning)
    solver: Solver = "heun"  # the teacher's step: heun is two network calls, ddim one
    points: int = 40  # N, times on the grid (source = teacher)
    first_points: int = 0  # N at the start, doubled over the training until it is N; 0 = N throughout
    anchored: float = 0.1  # share of samples with little noise that the teacher carries to t_min (source = teacher)
    target_decay: float = 0.95  # mu of the target network; 0 = the student itself
    distance: Literal["pseudo-huber", "l2", "lpips"] = "pseudo-huber"  # d; lpips needs torchvision
    guidance_scale: float = 1.0  # w of the teacher, and of the published student; 1 = none (LCM counts from 0)
    guidance_range: tuple[float, float] | None = None  # w ~ U[low, high] in training, an input of the student (LCM)
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts the generator is published with
    # easy consistency tuning (source = data)
    ratio_base: float = 2.0  # q: r/t approaches 1 - 1/q^(k+1)
    stages: int = 8  # times that the gap halves over the training
    log_mean: float | None = None  # of ln(sigma/alpha) at t (paper: -1.1); absent: at two thirds of its range
    log_std: float = 2.0  # of the same
    last_time_share: float = 0.15  # of samples at t_max, where a one-step student is called

    def __post_init__(self) -> None:
        if self.points < 2:
            raise BadInput("consistency.points", self.points, "2 or more")
        if self.first_points and not 2 <= self.first_points <= self.points:
            raise BadInput("consistency.first_points", self.first_points, f"2 to points = {self.points}, or 0")
        if not 0 <= self.anchored < 1:
            raise BadInput("consistency.anchored", self.anchored, "0 up to, not including, 1")
        if not 0 <= self.target_decay < 1:
            raise BadInput("consistency.target_decay", self.target_decay, "0 up to, not including, 1")
        check_steps("consistency.steps", self.steps)
        if self.ratio_base <= 1 or self.stages < 1 or self.log_std <= 0 or self.guidance_scale < 0:
            wrong = (self.ratio_base, self.stages, self.log_std, self.guidance_scale)
            allowed = "above 1; 1 or more; above 0; 0 or more"
            raise BadInput("consistency.ratio_base, stages, log_std, guidance_scale", wrong, allowed)
        if not 0 <= self.last_time_share <= 1:
            raise BadInput("consistency.last_time_share", self.last_time_share, "0 to 1")
        low, high = self.guidance_range or (self.guidance_scale, self.guidance_scale)
        if self.guidance_range and (self.source == "data" or not 0 <= low <= self.guidance_scale <= high):
            allowed = f"low <= guidance_scale = {self.guidance_scale} <= high, from a teacher: tuning has none to guide"
            raise BadInput("consistency.guidance_range", self.guidance_range, allowed)

    def networks(self, teacher: Teacher) -> Networks:
        nets: dict[str, nn.Module] = {"student": new_student(teacher)}
        if self.guidance_range:
            embed_guidance(nets["student"].network)  # type: ignore[arg-type]
        if self.source == "teacher":  # 0 stands for any scale but 1: the batch brings its own
            nets["teacher"] = frozen(teacher.guided(0.0 if self.guidance_range else self.guidance_scale))
        if self.target_decay:
            nets["target"] = slow_copy(nets["student"])
        if self.distance == "lpips":
            nets["lpips"] = frozen(Lpips(teacher.codec))
        return Networks(nets)

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, target = nets["student"], nets["target"] if self.target_decay else nets["student"]
        schedule: NoiseSchedule = student.schedule
        x0, cond = split_batch(batch)
        eps = torch.randn_like(x0)

        if self.source == "teacher":
            # n ~ U{1..N-1}: t = t_{n+1}, s = t_n; the first k samples have little noise, whatever the grid
            t, s = neighbours(schedule, self.grid_points(progress), len(x0), x0.device)
            k = int(self.anchored * len(x0))
            end = time_of_little_noise(schedule)
            t[:k] = schedule.t_min + (end - schedule.t_min) * torch.rand(k, device=x0.device, dtype=torch.float64)
            x_t = schedule.add_noise(x0, eps, t)
            if self.guidance_range:  # w ~ U[low, high] guides the teacher's step and is embedded by the student (LCM)
                low, high = self.guidance_range
                cond = {**(cond or {}), "guidance": low + (high - low) * torch.rand(len(x0), device=x0.device)}
            anchored, others = (
                {key: value[rows] for key, value in (cond or {}).items()} for rows in (slice(k), slice(k, None))
            )
            x_s = teacher_step(nets["teacher"], x_t[k:], t[k:], s[k:], others, self.solver)
            with torch.no_grad():  # sg f-(x_s, s)
                y = consistency_function(target, x_s, s[k:], others)
            if k:
                y = torch.cat([teacher_end(nets["teacher"], x_t[:k], t[:k], anchored), y])
            weight = torch.ones_like(t)
        else:
            t, s = self.tuning_times(schedule, len(x0), progress, x0.device)
            x_t, x_s = schedule.add_noise(x0, eps, t), schedule.add_noise(x0, eps, s)
            with torch.no_grad():  # sg f-(x_s, s)
                y = consistency_function(target, x_s, s, cond)
            weight = 1 / (schedule.noise_ratio(t) - schedule.noise_ratio(s))  # 1/(t - r) (Geng et al. 2024)

        d = nets["lpips"] if self.distance == "lpips" else DISTANCES[self.distance]
        yield "student", (weight.to(x0) * d(consistency_function(student, x_t, t, cond), y)).mean()

        if self.target_decay:  # theta- <- mu theta- + (1 - mu) theta
            follow(target, student, self.target_decay)

    def grid_points(self, progress: float) -> int:
        """Compute N, doubled at even intervals from first_points until it is `points` (Song and Dhariwal 2023)."""
        first = self.first_points or self.points
        doublings = math.ceil(math.log2(self.points / first))
        return min(self.points, first * 2 ** int(progress * (doublings + 1)))

    def tuning_times(
        self, schedule: NoiseSchedule, count: int, progress: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Sample t lognormal and r = t (1 - q^-(k+1) (1 + 8 sigmoid(-t))) >= 0, as sigma/alpha (Geng et al. 2024)."""
        mean = log_ratio_at(schedule, 2 / 3) if self.log_mean is None else self.log_mean
        t = lognormal_times(schedule, count, mean, self.log_std, self.last_time_share, device)
        least = 2 * schedule.noise_ratio(t.new_tensor(schedule.t_min))
        ratio = schedule.noise_ratio(t).clamp_min(least)
        stage = int(progress * self.stages)
        below = ratio * (1 - self.ratio_base ** -(stage + 1) * (1 + 8 * torch.sigmoid(-ratio)))
        return schedule.time_at_ratio(ratio), schedule.time_at_ratio(below.clamp_min(0))

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        # never the target network: it is a lagging copy that exists for the loss
        student = nets["student"]
        if self.guidance_range:  # with one scale folded in, it is a stock network again
            student = copy.deepcopy(student)
            fold_guidance(student.network, self.guidance_scale)
        return consistency_generator(student, teacher, self.steps)
