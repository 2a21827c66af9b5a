"""BOOT distils from noise alone, without data.

Gu, Zhai, Zhang, Liu and Susskind, "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping",
2023.

On the trajectory that begins at the noise eps, x_t = alpha y_t + sigma eps: the noise stays, and only the signal y_t
changes. The student y_theta(eps, t) reads the noise and a time and predicts that signal. Its prediction at t, carried
one teacher step down to s, is its target at s; at t_max the target is the teacher's prediction. It has no
consistency head: near t = 0 that would return the input, which here is the noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.fixed_time import check_rewritable
from distillers.models.schedule import EDM, like
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, new_student, split_batch
from distillers.training.losses import Solver, per_sample_mse, teacher_step

SIGNAL_LEFT = 0.06  # alpha(t_max) / sigma(t_max) above which the start is visibly not noise


@dataclass(frozen=True, kw_only=True)
class Boot(Distiller):
    """L = E || y(eps, s) - sg[y(eps, t) + (1 - rho)(x0_phi(x_t, t) - y(eps, t))] ||^2 / (1 - rho)^2 + beta L_top."""

    delta: float = 0.04  # t - s, as a share of the schedule's range
    solver: Solver = "ddim"  # the increment: ddim is the equation above, heun its second-order correction
    boundary_weight: float = 1.0  # beta
    boundary_share: float = 0.25  # of the batch, for the boundary term
    guidance_scale: float = 1.0  # of the teacher; 1 = none

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise BadInput("boot.delta", self.delta, "between 0 and 1")
        if not 0 < self.boundary_share <= 1 or self.boundary_weight < 0 or self.guidance_scale < 0:
            wrong = (self.boundary_share, self.boundary_weight, self.guidance_scale)
            allowed = "0 to 1; 0 or more; 0 or more"
            raise BadInput("boot.boundary_share, boundary_weight, guidance_scale", wrong, allowed)

    @property
    def fits_head(self) -> bool:
        return False

    @property
    def needs_pictures(self) -> bool:
        return False

    def networks(self, teacher: Teacher) -> Networks:
        if teacher.denoiser.prediction == "flow":  # stock flow schedulers sample flow only, and the signal is none
            raise BadInput("teacher", "a network that predicts flow", "one that predicts x0, eps or v")
        student = new_student(teacher)
        student.prediction = "x0"  # a free head: the output is the signal, whatever the teacher's was
        if isinstance(student.schedule, EDM) and hasattr(student.network, "config"):  # refused here, not when written
            check_rewritable(student.network)
        left = 1 / float(student.schedule.noise_ratio(torch.tensor(student.schedule.t_max)))
        if left > SIGNAL_LEFT:
            warnings.warn(
                f"boot: the teacher's schedule ends at alpha/sigma = {left:.3f} (below {SIGNAL_LEFT} is noise): "
                "what the student starts from is not what the teacher saw there, and colours may be off",
                stacklevel=2,
            )
        return Networks({"student": student, "teacher": frozen(teacher.guided(self.guidance_scale))})

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, teacher, schedule = nets["student"], nets["teacher"], nets["student"].schedule
        x0, cond = split_batch(batch)
        eps = torch.randn_like(x0)  # the data give the shape and the conditions, nothing else

        # t ~ U on the range above delta, s = t - delta
        u = self.delta + (1 - self.delta) * torch.rand(len(x0), device=x0.device, dtype=torch.float64)
        t, s = schedule.spaced(u), schedule.spaced(u - self.delta)
        with torch.no_grad():  # the student's point at t, carried down by the teacher; the same noise taken out again
            x_t = schedule.add_noise(signal(student, eps, t, cond), eps, t)
            x_s = teacher_step(teacher, x_t, t, s, cond, self.solver)
            y_s = (x_s - like(schedule.sigma(s), eps) * eps) / like(schedule.alpha(s), eps)
        # rho = (sigma_s alpha_t) / (alpha_s sigma_t): what is left of the noise's share
        rho = schedule.noise_ratio(s) / schedule.noise_ratio(t)

        # y(eps, t_max) = x0_phi(x_T, t_max), on the first samples of the batch
        k = max(1, round(self.boundary_share * len(x0)))
        first = {name: value[:k] for name, value in cond.items()} if cond else None
        top = torch.full((k,), schedule.t_max, device=x0.device, dtype=torch.float64)
        with torch.no_grad():
            y_top = teacher(schedule.start(eps[:k], top), top, first)

        both = {name: torch.cat([value, value[:k]]) for name, value in cond.items()} if cond else None
        y = signal(student, torch.cat([eps, eps[:k]]), torch.cat([s, top]), both)
        bootstrap = (per_sample_mse(y[:-k], y_s) / (1 - rho).to(x0) ** 2).mean()
        boundary = per_sample_mse(y[-k:], y_top).mean()
        yield "student", bootstrap + self.boundary_weight * boundary

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        # one step only: the student answers at t_min for any noise, and has no x_t to go on from
        first = nets["student"].schedule.t_min
        if teacher.prompts is not None:
            first += 1  # pipelines of Stable Diffusion set steps_offset = 1: none of them calls at timestep 0
        info = replace(
            teacher.info,
            sampler="ddim",
            step_times={1: [first]},
            default_steps=1,
            guidance_scale=1.0,
        )
        return Generator(nets["student"], teacher.codec, info, teacher.prompts)


def signal(student: Denoiser, eps: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Evaluate y_theta(eps, t): the network reads the noise itself, not x_t."""
    return student(student.schedule.start(eps, t), t, cond)
