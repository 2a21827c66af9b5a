"""Continuous-time consistency distillation (sCD) trains few-step students by the tangent of the trajectory.

Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024 (eq. 6 and 8, Algorithm 1).

In the limit of adjacent times, consistency says that f(x_t, t) is constant along the teacher's trajectory:
df/dt = 0. That derivative is one forward-mode product (JVP) through the student, taken here through stock diffusers
networks. Written with the angle phi = atan(sigma / (alpha sigma_data)), in which every schedule is the paper's
TrigFlow, and with f itself rather than its velocity F = (cos phi x - f)/(sigma_data sin phi), so that networks of any
prediction can be trained. Without a teacher, `source = "data"`, it is the sample's and its noise's trajectory (sCT).

The derivative contains the network's own derivative by its clock. Where that clock runs fast - stock networks count a
thousand timesteps - it is large and noisy (sec. 4.1 there; in our proofs six octaves of time features diverge and one
converges). `tangent_step` then takes a finite difference along the same trajectory, over which the noise averages out.
"""

from __future__ import annotations

import math
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
from distillers.models.lora import parts_of
from distillers.models.schedule import NoiseSchedule, like
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, new_student, split_batch
from distillers.training.losses import (
    check_steps,
    consistency_function,
    consistency_generator,
    log_ratio_at,
    lognormal_times,
    per_sample_mse,
    ramp,
)


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Distiller):
    """L = E e^w / sin(phi)^2 | f - sg( f- - sin(phi) g ) |^2 - w, g = cos(phi) df-/dphi (Lu and Song 2024, eq. 6, 8).

    f and g are in units of sigma_data, | | is a mean over elements, and w is learnt: at its least the loss is alike at
    all times (sec. 4.2 there).
    """

    source: Literal["teacher", "data"] = "teacher"  # whose trajectory: the teacher's (sCD), or the sample's own (sCT)
    tangent: Literal["normalised", "clipped"] = "clipped"  # g / (|g| + c), or its elements kept within [-1, 1]
    tangent_constant: float = 0.1  # c
    tangent_step: float = 0.15  # radians of phi for a finite difference; 0 = the exact derivative, by JVP
    tangent_warmup: float = 0.1  # share of the training over which the unstable part of g is faded in; paper: 10k its
    sigma_data: float = 0.5  # standard deviation of the data: 0.5 of pixels in [-1, 1], about 1 of latents
    log_mean: float | None = None  # of ln(sigma/alpha) at t; absent: the middle of the schedule's range (paper: -1)
    log_std: float = 2.0  # of the same (paper: 1.4)
    last_time_share: float = 0.1  # of samples at t_max, where a one-step student is called
    weight_cap: float = 20.0  # of w = 1/sin^2(phi), the uniform weight on F; x0 networks cannot follow it to 0
    guidance_scale: float = 1.0  # of the teacher; 1 = none
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts the generator is published with

    def __post_init__(self) -> None:
        check_steps("scm.steps", self.steps)
        for name in ("tangent_constant", "sigma_data", "log_std", "weight_cap"):
            if not getattr(self, name) > 0:
                raise BadInput(f"scm.{name}", getattr(self, name), "a number above 0")
        if not 0 <= self.tangent_step < 1 or not 0 <= self.tangent_warmup <= 1 or self.guidance_scale < 0:
            wrong = (self.tangent_step, self.tangent_warmup, self.guidance_scale)
            raise BadInput("scm.tangent_step, tangent_warmup, guidance_scale", wrong, "0 to 1; 0 to 1; 0 or more")
        if not 0 <= self.last_time_share <= 1:
            raise BadInput("scm.last_time_share", self.last_time_share, "0 to 1")

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": new_student(teacher), "weight": TimeWeight()})
        if self.source == "teacher":
            nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        return nets

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, schedule = nets["student"], nets["student"].schedule
        x0, cond = split_batch(batch)
        mean = log_ratio_at(schedule, 1 / 2) if self.log_mean is None else self.log_mean
        t = lognormal_times(schedule, len(x0), mean, self.log_std, self.last_time_share, x0.device)
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)

        # one precision for both: at first their difference is the tangent, and half precision is most of it
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            x0_end = nets["teacher"](x_t, t, cond) if self.source == "teacher" else x0
            f, df = self.derivative(student, x_t, t, x0_end, cond)
            sin, cos = (like(c, x_t) for c in self.sin_cos(schedule, t))
            # g = cos df/dphi in two parts: towards the teacher's x0, and the rest, which is faded in (Algorithm 1)
            towards = cos**2 * (f - x0_end) / sin
            g = towards + ramp(progress, 0.0, self.tangent_warmup) * (cos * df - towards)

        f = consistency_function(student, x_t, t, cond) / self.sigma_data
        y = f.detach() - sin * self.normalised(g / self.sigma_data)  # of the very f that is trained, in its precision
        error = (1 / sin.flatten() ** 2).clamp(max=self.weight_cap) * per_sample_mse(f, y)
        w = nets["weight"](schedule.noise_ratio(t))
        yield "weight", (w.exp() * error.detach() - w).mean()
        yield "student", (w.detach().exp() * error).mean()

    def derivative(
        self, student: Denoiser, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]:
        """Compute f(x_t, t) and df/dphi along the teacher's trajectory."""
        if not self.tangent_step:
            return derivative_along(student, x_t, t, x0, cond, self.sigma_data)
        schedule, sigma_d = student.schedule, self.sigma_data
        phi = (schedule.noise_ratio(t) / sigma_d).atan()
        s = schedule.time_at_ratio(sigma_d * (phi - self.tangent_step).clamp_min(0).tan())
        step = phi - (schedule.noise_ratio(s) / sigma_d).atan()  # shorter where t_min is near
        x_s = schedule.step(x_t, x0, t, s)
        with torch.autocast(x_t.device.type, enabled=False):  # half precision would drown a difference this small
            f, below = consistency_function(student, x_t, t, cond), consistency_function(student, x_s, s, cond)
        return f, (f - below) / like(step.clamp_min(1e-6), x_t)

    def sin_cos(self, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute sin and cos of phi = atan(sigma / (alpha sigma_data)), float64."""
        a, s = self.sigma_data * schedule.alpha(t), schedule.sigma(t)
        size = torch.hypot(a, s)
        return s / size, a / size

    def normalised(self, g: Tensor) -> Tensor:
        """Normalise a tangent (B, ...) by its root mean square, or clip it (Lu and Song 2024, sec. 4.2)."""
        if self.tangent == "clipped":
            return g.clamp(-1, 1)
        size = g.square().flatten(1).mean(1).sqrt()  # of an element, so that c means the same for every picture size
        return g / (like(size, g) + self.tangent_constant)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return consistency_generator(nets["student"], teacher, self.steps)


class TimeWeight(nn.Module):
    """The logarithm w(t) of the loss's weight is a linear layer over random Fourier features of ln(sigma/alpha) / 4.

    That is EDM2's uncertainty (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    2024, appendix B.2). It starts as 0.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, ratio: Tensor) -> Tensor:
        """Compute w of noise ratios sigma/alpha (B,), float32 (B,)."""
        angle = (ratio.log() / 4).float()[:, None] * self.frequencies + self.phases
        w: Tensor = self.linear(math.sqrt(2) * angle.cos())[:, 0]
        return w.float()


def derivative_along(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None, sigma_data: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute f(x_t, t) and df/dphi along the probability-flow ODE whose clean estimate at x_t is x0.

    phi = atan(sigma / (alpha sigma_data)). This is one forward-mode pass in float32, without a graph. Attention runs in
    its plain form: fused kernels have no forward derivative.
    """
    schedule = denoiser.schedule
    one = torch.ones_like(t)
    # d/dphi = (dt/dphi) d/dt, and dx/dt = alpha' x0 + sigma' eps
    a, da = _value_and_slope(schedule.alpha, (t,), (one,))
    s, ds = _value_and_slope(schedule.sigma, (t,), (one,))
    dt = ((a * sigma_data) ** 2 + s**2) / (sigma_data * (a * ds - s * da))
    eps = schedule.eps_from(x0, x_t, t)
    dx = like(da * dt, x_t) * x0 + like(ds * dt, x_t) * eps

    def f(x: Tensor, time: Tensor) -> Tensor:
        return consistency_function(denoiser, x, time, cond)

    norms = [m for m in parts_of(denoiser) if isinstance(m, nn.GroupNorm)]
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
