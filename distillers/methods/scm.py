"""Continuous-time consistency distillation (sCD) trains few-step students by the tangent of the trajectory.

Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024 (eq. 6 and 8, Algorithm 1).

In the limit of adjacent times, consistency says that f(x_t, t) is constant along the teacher's trajectory:
df/dt = 0. That derivative is one forward-mode product (JVP) through the student, taken here through stock diffusers
networks. Written with the angle phi = atan(sigma/alpha), in which every schedule is the paper's TrigFlow, and with f
itself rather than its velocity F = (cos phi x - f)/sin phi, so that networks of any prediction can be trained; data are
taken to have unit variance (sigma_d = 1), and the weight is fixed where the paper learns one.

The derivative contains the network's own derivative by its clock. Where that clock runs fast - stock networks count a
thousand timesteps - it is large and noisy (sec. 4.1 there; in our proofs six octaves of time features diverge and one
converges). `tangent_step` then takes a finite difference along the same trajectory, over which the noise averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser, uncompiled
from distillers.models.schedule import NoiseSchedule, like
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, new_student, split_batch
from distillers.training.losses import (
    check_steps,
    consistency_function,
    consistency_generator,
    per_sample_mse,
    ramp,
)


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Distiller):
    """L = E w || f - sg( f- - sin(phi) g ) ||^2 with the tangent g = cos(phi) df-/dphi (Lu and Song 2024, eq. 6, 8)."""

    tangent: Literal["normalised", "clipped"] = "normalised"  # g / (||g|| + c), or its elements kept within [-1, 1]
    tangent_constant: float = 0.1  # c
    tangent_step: float = 0.0  # radians of phi for a finite difference; 0 = the exact derivative, by JVP
    tangent_warmup: float = 0.1  # share of the training over which the unstable part of g is faded in; paper: 10k its
    log_mean: float = -1.0  # of ln(sigma/alpha) at t
    log_std: float = 1.4  # of the same
    weight_cap: float = 20.0  # of w = 1/sin^2(phi), the uniform weight on F; x0 networks cannot follow it to 0
    guidance_scale: float = 1.0  # of the teacher; 1 = none
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts the generator is published with

    def __post_init__(self) -> None:
        check_steps("scm.steps", self.steps)
        for name in ("tangent_constant", "log_std", "weight_cap"):
            if not getattr(self, name) > 0:
                raise BadInput(f"scm.{name}", getattr(self, name), "a number above 0")
        if not 0 <= self.tangent_step < 1 or not 0 <= self.tangent_warmup <= 1 or self.guidance_scale < 0:
            wrong = (self.tangent_step, self.tangent_warmup, self.guidance_scale)
            raise BadInput("scm.tangent_step, tangent_warmup, guidance_scale", wrong, "0 to 1; 0 to 1; 0 or more")

    def networks(self, teacher: Teacher) -> Networks:
        return Networks(
            {
                "student": new_student(teacher),
                "teacher": frozen(teacher.guided(self.guidance_scale)),
            }
        )

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, schedule = nets["student"], nets["student"].schedule
        x0, cond = split_batch(batch)
        # ln(sigma/alpha) ~ N(P_mean, P_std^2)
        ratio = (self.log_mean + self.log_std * torch.randn(len(x0), device=x0.device, dtype=torch.float64)).exp()
        t = schedule.time_at_ratio(ratio)
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)

        with torch.no_grad():
            x0_teacher = nets["teacher"](x_t, t, cond)
            f, df = self.derivative(student, x_t, t, x0_teacher, cond)
            sin, cos = (like(c, x_t) for c in sin_cos(schedule, t))
            # g = cos df/dphi in two parts: towards the teacher's x0, and the rest, which is faded in (Algorithm 1)
            towards = cos**2 * (f - x0_teacher) / sin
            g = towards + ramp(progress, 0.0, self.tangent_warmup) * (cos * df - towards)

        f = consistency_function(student, x_t, t, cond)
        y = f.detach() - sin * self.normalised(g)  # of the very f that is trained: half precision differs from above
        weight = (1 / sin.flatten() ** 2).clamp(max=self.weight_cap)
        yield "student", (weight * per_sample_mse(f, y)).mean()

    def derivative(
        self, student: Denoiser, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]:
        """Compute f(x_t, t) and df/dphi along the teacher's trajectory."""
        if not self.tangent_step:
            return derivative_along(student, x_t, t, x0, cond)
        schedule = student.schedule
        phi = schedule.noise_ratio(t).atan()
        s = schedule.time_at_ratio((phi - self.tangent_step).clamp_min(0).tan())
        step = phi - schedule.noise_ratio(s).atan()  # shorter where t_min is near
        x_s = schedule.step(x_t, x0, t, s)
        with torch.autocast(x_t.device.type, enabled=False):  # half precision would drown a difference this small
            f, below = consistency_function(student, x_t, t, cond), consistency_function(student, x_s, s, cond)
        return f, (f - below) / like(step.clamp_min(1e-6), x_t)

    def normalised(self, g: Tensor) -> Tensor:
        """Normalise or clip the tangent (Lu and Song 2024, sec. 4.2)."""
        if self.tangent == "clipped":
            return g.clamp(-1, 1)
        return g / (like(g.flatten(1).norm(dim=1), g) + self.tangent_constant)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return consistency_generator(nets["student"], teacher, self.steps)


def sin_cos(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sin and cos of phi = atan(sigma/alpha), float64."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    size = torch.hypot(a, s)
    return s / size, a / size


def derivative_along(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None
) -> tuple[Tensor, Tensor]:
    """Compute f(x_t, t) and df/dphi along the probability-flow ODE whose clean estimate at x_t is x0.

    This is one forward-mode pass in float32, without a graph. Attention runs in its plain form: fused kernels have no
    forward derivative.
    """
    schedule = denoiser.schedule
    one = torch.ones_like(t)
    # d/dphi = (dt/dphi) d/dt, and dx/dt = alpha' x0 + sigma' eps
    a, da = _value_and_slope(schedule.alpha, (t,), (one,))
    s, ds = _value_and_slope(schedule.sigma, (t,), (one,))
    dt = (a**2 + s**2) / (a * ds - s * da)
    eps = schedule.eps_from(x0, x_t, t)
    dx = like(da * dt, x_t) * x0 + like(ds * dt, x_t) * eps

    def f(x: Tensor, time: Tensor) -> Tensor:
        return consistency_function(denoiser, x, time, cond)

    norms = [m for m in denoiser.modules() if isinstance(m, nn.GroupNorm)]
    # torch's forward derivative of GroupNorm takes contiguous maps only, and attention leaves others
    hooks = [m.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for m in norms]
    try:
        with (
            torch.no_grad(),
            torch.autocast(x_t.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            uncompiled(denoiser),  # compiled code has no forward derivative
        ):
            return _value_and_slope(f, (x_t, t), (dx, dt))
    finally:
        for hook in hooks:
            hook.remove()


def _value_and_slope(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], towards: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Compute a function's value and its directional derivative by forward-mode differentiation."""
    value, slope = jvp(function, at, towards)[:2]
    return value, slope
