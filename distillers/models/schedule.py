"""Noise schedules x_t = alpha(t) x0 + sigma(t) eps, with the conversions and solver steps that follow from them.

`t` grows with noise, from `t_min` (almost clean) to `t_max` (almost pure noise), and

    x_t = alpha(t) x0 + sigma(t) eps,      eps ~ N(0, I).

A schedule is the two functions alpha and sigma; all else follows. Coefficients are computed in float64
and rounded once, on multiplication with the data. `t` is a float tensor of shape () or (B,); data has shape (B, ...).
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from distillers.errors import BadInput

Prediction = Literal["x0", "eps", "v", "flow", "edm", "edm-v"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
PLAIN = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")  # options that say all of most schedules
STOCK_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that every scheduler of diffusers knows


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a float64 coefficient, () or (B,), so that it multiplies x (B, ...), and cast it to the dtype of x."""
    if coefficient.ndim == 0 and coefficient.device.type == "cpu":
        return coefficient.to(x.dtype)  # a scalar goes to a GPU with the kernel; copied, it would wait for the device
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)).to(x)


@lru_cache(4096)
def _cached_coefficients(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    at = torch.tensor(t, dtype=torch.float64)
    return float(schedule.alpha(at)), float(schedule.sigma(at))


def check_count(field: str, given: int, most: int) -> None:
    """Raise BadInput unless a number is 1 to `most`."""
    if not 1 <= given <= most:
        raise BadInput(field, given, f"1 to {most}")


class NoiseSchedule(ABC):
    """The forward process x_t = alpha(t) x0 + sigma(t) eps. Subclasses define alpha, sigma and the time range."""

    name: ClassVar[str]
    t_min: float
    t_max: float
    rho: float = 1.0  # spacing of `grid`: 1 = uniform in t; EDM uses 7
    sigma_data: float = 1.0  # standard deviation of the data, as the predictions "edm" and "edm-v" assume it
    velocity: ClassVar[Prediction | None] = None  # the prediction that is dx_t/dt itself, where there is one

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Compute the signal scale at t, float64, same shape as t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise scale at t, float64, same shape as t."""

    def network_time(self, t: Tensor) -> Tensor:
        """Convert t to the number that the network's time embedding takes."""
        return t

    # --- conversions -------------------------------------------------------------------------------------------------
    def _at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self._coefficients(t)
        return like(a, x), like(s, x)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute alpha and sigma, float64."""
        if t.ndim == 0 and t.device.type == "cpu":  # a sampler's: the same few for ever, and slower computed than used
            a, s = _cached_coefficients(self, float(t))
            return torch.tensor(a, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        t = t.double()
        return self.alpha(t), self.sigma(t)

    def start(self, eps: Tensor, t: Tensor) -> Tensor:
        """Make the x_t that sampling starts from: unit Gaussian eps at the scale of p_t for data of variance 1.

        The scale is sqrt(alpha^2 + sigma^2): 1 for variance-preserving schedules, about sigma for exploding ones.
        """
        return eps * like(torch.hypot(*self._coefficients(t)), eps)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean data x0 to time t with unit Gaussian noise eps."""
        a, s = self._at(t, x0)
        return a * x0 + s * eps

    def x0_from(self, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a network output of the given kind into the clean estimate x0.

        v is diffusers' velocity alpha eps - sigma x0 and needs alpha^2 + sigma^2 = 1 only if it is to be orthogonal;
        the inverse below divides by alpha^2 + sigma^2 and holds for every schedule. flow is eps - x0. edm is the F of
        Karras et al. 2022, eq. 7: x0 = c_skip x_t + c_out F, of about unit size at all times; edm-v is -F, which
        diffusers' EDM schedulers call v_prediction.
        """
        a, s = self._at(t, x_t)
        if prediction == "x0":
            return output
        if prediction == "eps":
            return (x_t - s * output) / a
        if prediction == "v":
            return (a * x_t - s * output) / (a * a + s * s)
        if prediction == "flow":
            return (x_t - s * output) / (a + s)
        if prediction in ("edm", "edm-v"):
            c_skip, c_out = self._preconditioning(t, x_t)
            return c_skip * x_t + (c_out if prediction == "edm" else -c_out) * output
        raise BadInput("prediction", prediction, ", ".join(PREDICTIONS))

    def output_from(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a clean estimate x0 into a network output of the given kind: the inverse of `x0_from`."""
        a, s = self._at(t, x_t)
        if prediction == "x0":
            return x0
        if prediction == "eps":
            return (x_t - a * x0) / s
        if prediction == "v":
            return (a * x_t - (a * a + s * s) * x0) / s
        if prediction == "flow":
            return (x_t - (a + s) * x0) / s
        if prediction in ("edm", "edm-v"):
            c_skip, c_out = self._preconditioning(t, x_t)
            return (x0 - c_skip * x_t) / (c_out if prediction == "edm" else -c_out)
        raise BadInput("prediction", prediction, ", ".join(PREDICTIONS))

    def _preconditioning(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute c_skip and c_out (Karras et al. 2022, table 1), for any alpha: theirs is 1."""
        a, s = self._coefficients(t)
        variance = (a * self.sigma_data) ** 2 + s**2  # of x_t
        return like(a * self.sigma_data**2 / variance, x), like(s * self.sigma_data / variance.sqrt(), x)

    def eps_from(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the noise eps = (x_t - alpha x0) / sigma."""
        return self.output_from("eps", x0, x_t, t)

    def v_from(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity v = alpha eps - sigma x0."""
        return self.output_from("v", x0, x_t, t)

    def score_from(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the score grad log p_t(x_t) from x0 = E[x0 | x_t] (Tweedie's formula)."""
        a, s = self._at(t, x_t)
        return (a * x0 - x_t) / (s * s)

    def snr(self, t: Tensor) -> Tensor:
        """Compute the signal-to-noise ratio alpha^2 / sigma^2, float64."""
        t = t.double()
        return (self.alpha(t) / self.sigma(t)) ** 2

    def noise_ratio(self, t: Tensor) -> Tensor:
        """Compute sigma / alpha, float64: the noise level of the equivalent variance-exploding process."""
        t = t.double()
        return self.sigma(t) / self.alpha(t)

    def renoise(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Diffuse x_s further, from time s to t >= s, with unit Gaussian noise eps."""
        a_t, s_t = self._at(t, x_s)
        a_s, s_s = self._at(s, x_s)
        return a_t / a_s * x_s + (s_t**2 - (a_t / a_s * s_s) ** 2).clamp_min(0).sqrt() * eps

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """Find the t in [t_min, t_max] where sigma/alpha = ratio, by bisection; the nearer end if there is none."""
        ratio = ratio.double()
        low, high = torch.full_like(ratio, self.t_min), torch.full_like(ratio, self.t_max)
        for _ in range(54):  # halvings until the bracket is below float64 resolution
            middle = (low + high) / 2
            below = self.noise_ratio(middle) < ratio
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(self.noise_ratio(low.new_tensor(self.t_min)) >= ratio, low, high)

    # --- solving the probability-flow ODE ----------------------------------------------------------------------------
    def step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, unclipped: Tensor | None = None) -> Tensor:
        """Take a first-order step from t to s: x_s = a_s x0 + (s_s/s_t)(x_t - a_t x0), exact for constant x0.

        This is DDIM (Song et al. 2021, eq. 12), and Euler in the variable sigma/alpha (Karras et al. 2022).

        Args:
            unclipped: the estimate that x0 was clipped from, where the noise is to be what the network predicted
                rather than what the clipped x0 leaves: diffusers' samplers draw so. It is no step of an ODE, for as
                s nears t it does not near x_t.
        """
        a_t, s_t = self._at(t, x_t)
        a_s, s_s = self._at(s, x_t)
        return a_s * x0 + (s_s / s_t) * (x_t - a_t * (x0 if unclipped is None else unclipped))

    def heun_step(self, x_t: Tensor, x0: Tensor, x0_next: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Correct a step to second order; `x0_next` is the clean estimate at the end of `step(x_t, x0, t, s)`.

        In u = x/alpha and r = sigma/alpha the ODE is du/dr = (u - x0)/r; Heun averages the slopes at both ends
        (Karras et al. 2022, Algorithm 1). At sigma(s) = 0 the end slope does not exist and the first-order step is
        returned. Schedules with a velocity average that instead: their grids are even in t, and their r leaps at
        t_max (from 1000 to 12 in the first of 20 steps), where Heun in r is worse than no correction.
        """
        a_t, _ = self._at(t, x_t)
        a_s, s_s = self._at(s, x_t)
        euler = self.step(x_t, x0, t, s)
        if self.velocity:
            kind = self.velocity
            velocities = self.output_from(kind, x0, x_t, t) + self.output_from(kind, x0_next, euler, s)
            return torch.where(s_s > 0, x_t + like((s - t).double(), x_t) * velocities / 2, euler)
        r_t, r_s = like(self.noise_ratio(t), x_t), like(self.noise_ratio(s), x_t)
        slope_t = (x_t / a_t - x0) / r_t
        slope_s = torch.where(s_s > 0, (euler / a_s - x0_next) / r_s.clamp_min(1e-12), slope_t)
        return a_s * (x_t / a_t + (r_s - r_t) * (slope_t + slope_s) / 2)

    def grid(self, n: int) -> Tensor:
        """Discretise [t_min, t_max] into n ascending times, float64 (Karras et al. 2022, eq. 5, with rho)."""
        if n < 2:
            raise BadInput("grid points", n, "2 or more")
        return self.spaced(torch.linspace(0, 1, n, dtype=torch.float64))

    def segment_grid(self, n: int) -> Tensor:
        """Cut [t_min, t_max] into n segments, even in the grid's spacing: n + 1 ascending times, float64.

        Every n/k-th is an end of k segments. Discrete schedules: whole timesteps, those of diffusers' "trailing"
        spacing, so that a stock DDIMScheduler visits the segments' upper ends.
        """
        return self.grid(n + 1)

    def spaced(self, u: Tensor) -> Tensor:
        """Find the time at a share u of the range, 0 at t_min and 1 at t_max, in the grid's spacing."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def sampling_times(self, steps: int) -> list[float]:
        """List the times of so many steps of a teacher, descending: the upper ends of as many parts of the range.

        Raises:
            BadInput: no step, over 1000, or more than the schedule has.
        """
        check_count("steps", steps, 1000)
        return self.grid(steps + 1)[1:].flip(0).tolist()

    def student_times(self, steps: int) -> list[float]:
        """List the times of a few-step student, descending: the upper ends of as many parts of the range."""
        return self.grid(steps + 1)[1:].flip(0).tolist()

    def until(self, t_max: float) -> NoiseSchedule:
        """Return this schedule with an earlier end: the process is the same, and its noisiest time is t_max.

        Raises:
            BadInput: an end that is not within the range.
        """
        if not self.t_min < t_max <= self.t_max:
            raise BadInput("t_max", t_max, f"above {self.t_min:g}, up to {self.t_max:g}")
        shorter = copy.copy(self)
        shorter.t_max = t_max
        return shorter

    def to_config(self) -> dict[str, Any]:
        """Describe the schedule as a dictionary that `from_config` takes."""
        return {"name": self.name, "t_min": self.t_min, "t_max": self.t_max}


class EDM(NoiseSchedule):
    """The variance-exploding schedule alpha = 1, sigma = t (Karras et al. 2022).

    Args:
        sigma_data: standard deviation of the data.
        rho: spacing of the grid.

    Raises:
        BadInput: numbers that are not above 0, or an end before the beginning.
    """

    name = "edm"

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0, sigma_data: float = 0.5, rho: float = 7.0) -> None:
        if not 0 <= t_min < t_max or sigma_data <= 0 or rho <= 0:
            given = (t_min, t_max, sigma_data, rho)
            raise BadInput("t_min, t_max, sigma_data, rho", given, "numbers above 0, t_min below t_max")
        self.t_min, self.t_max, self.sigma_data, self.rho = t_min, t_max, sigma_data, rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def network_time(self, t: Tensor) -> Tensor:
        """Compute c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return t.log() / 4

    def sampling_times(self, steps: int) -> list[float]:
        """List the times of so many steps, descending, both ends among them: those of diffusers' EDM schedulers."""
        check_count("steps", steps, 1000)
        return [self.t_max] if steps == 1 else self.grid(steps).flip(0).tolist()

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "sigma_data": self.sigma_data, "rho": self.rho}


class RectifiedFlow(NoiseSchedule):
    """The rectified flow alpha = 1 - t, sigma = t (Liu et al. 2023). Networks take `clock` times t, as in diffusers.

    t_max is 1 for Euler steps; ratios sigma/alpha need t_max < 1, hence the default.

    Args:
        clock: diffusers' `num_train_timesteps`.
        shift: moves the grid towards noise, t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23), for large
            pictures; the process itself and what the network is told stay as they are.
        stock: the configuration of the diffusers scheduler that samples the network's teacher: see `stock_times`.
    """

    name = "flow"
    velocity = "flow"

    def __init__(
        self,
        t_min: float = 1e-3,
        t_max: float = 1 - 1e-3,
        clock: int = 1000,
        shift: float = 1.0,
        stock: dict[str, Any] | None = None,
    ) -> None:
        if not (clock >= 1 and shift > 0):
            raise BadInput("schedule.clock, shift", (clock, shift), "1 or more, and above 0")
        self.t_min, self.t_max, self.clock, self.shift, self.stock = t_min, t_max, clock, shift, stock

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def network_time(self, t: Tensor) -> Tensor:
        return self.clock * t

    def spaced(self, u: Tensor) -> Tensor:
        low, high = (t / (self.shift - (self.shift - 1) * t) for t in (self.t_min, self.t_max))  # as before the shift
        t = low + u * (high - low)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def start(self, eps: Tensor, t: Tensor) -> Tensor:
        """Make the x_t that sampling starts from; stock pipelines start from unit noise, if only almost at t = 1."""
        return super().start(eps, t) if self.stock is None else eps

    def segment_grid(self, n: int) -> Tensor:
        """Cut the range into n segments; those of a stock pipeline's network end where its few-step students are."""
        if self.stock is None:
            return super().segment_grid(n)
        return torch.tensor([self.t_min, *self.student_times(n)[::-1]], dtype=torch.float64)

    def student_times(self, steps: int) -> list[float]:
        """List the times of a few-step student, descending: 1, 1 - 1/n, ... 1/n of a stock pipeline's network.

        diffusers visits them by FlowMatchEulerDiscreteScheduler(shift=1, shift_terminal=1/n), and no shifted ones.
        """
        if self.stock is None:
            return super().student_times(steps)
        check_count("steps", steps, self.clock)
        return [1 - i / steps for i in range(steps)]

    def stock_times(self, steps: int, tokens: int, evenly: bool) -> list[float]:
        """List the times that the stock scheduler visits in so many steps, descending.

        Args:
            tokens: of the picture, on which a dynamic shift depends (Esser et al. 2024, sec. 5.3.2).
            evenly: whether the pipeline hands it the sigmas 1, 1 - 1/n, ... 1/n rather than leave them to it.

        Raises:
            BadInput: no step, or over 1000.
        """
        check_count("steps", steps, 1000)
        return list(_stock_times(json.dumps(self.stock, sort_keys=True), steps, tokens, evenly))

    def to_config(self) -> dict[str, Any]:
        stock = {} if self.stock is None else {"stock": self.stock}
        return {**super().to_config(), "clock": self.clock, "shift": self.shift, **stock}


@lru_cache(256)
def _stock_times(stock: str, steps: int, tokens: int, evenly: bool) -> tuple[float, ...]:
    scheduler, options = stock_scheduler(json.loads(stock)), dict[str, Any]()
    config = scheduler.config
    if config.get("use_dynamic_shifting"):  # mu is linear in the number of tokens
        share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        options["mu"] = config.base_shift + share * (config.max_shift - config.base_shift)
    if evenly:
        options["sigmas"] = [1 - i / steps for i in range(steps)]
    scheduler.set_timesteps(steps, **options)
    return tuple(scheduler.sigmas[:-1].tolist())


def stock_scheduler(config: dict[str, Any]) -> Any:
    """Build the first-order diffusers scheduler of a flow's times, from a `scheduler_config.json`."""
    import diffusers

    kind = config["_class_name"] if config.get("use_flow_sigmas") else "FlowMatchEulerDiscreteScheduler"
    return getattr(diffusers, kind).from_config({k: v for k, v in config.items() if not k.startswith("_")})


class Trigonometric(NoiseSchedule):
    """TrigFlow: alpha = cos t, sigma = sin t, t in (0, pi/2), for data of unit variance (Lu and Song 2024)."""

    name = "trig"
    velocity = "v"

    def __init__(self, t_min: float = 2e-3, t_max: float = math.pi / 2 - 1e-3) -> None:
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t: Tensor) -> Tensor:
        return t.double().cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double().sin()

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double().atan().clamp(self.t_min, self.t_max)


class VariancePreserving(NoiseSchedule):
    """DDPM's discrete schedule alpha^2 = abar_t (Ho et al. 2020), continued between the integers.

    t counts diffusers' timesteps: 0 .. T-1 inclusive, float. ln(sigma/alpha) is interpolated linearly, so at integers
    the values are diffusers' own. Mind that t = 0 is not clean (sigma = 0.01 for linear betas) and T-1 is not pure
    noise.
    """

    name = "vp"

    def __init__(self, betas: Tensor, betas_config: dict[str, Any] | None = None) -> None:
        betas = betas.double()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise BadInput("betas", f"shape {tuple(betas.shape)}", "a vector of at least two values in (0, 1)")
        abar = torch.cumprod(1 - betas, 0)
        self.log_ratio = ((1 - abar) / abar).log() / 2  # ln(sigma/alpha) at the integers
        self.betas = betas
        self.betas_config = betas_config or {"trained_betas": betas.tolist()}
        self.t_min, self.t_max = 0.0, float(len(betas) - 1)

    def _ratio(self, t: Tensor) -> Tensor:
        t = t.double().clamp(self.t_min, self.t_max)
        table = self.log_ratio.to(t.device)
        low = t.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t - low).exp()

    def alpha(self, t: Tensor) -> Tensor:
        return (1 + self._ratio(t) ** 2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        r = self._ratio(t)
        return r * (1 + r * r).rsqrt()

    def segment_grid(self, n: int) -> Tensor:
        clock = self.t_max + 1
        if not 1 <= n <= clock // 2:
            raise BadInput("grid points", n, f"1 to {int(clock // 2)}: half of the schedule's {int(clock)} timesteps")
        return torch.tensor([0.0] + [float(round(i * clock / n) - 1) for i in range(1, n + 1)], dtype=torch.float64)

    def sampling_times(self, steps: int) -> list[float]:
        """List the times of so many steps, descending, at diffusers' "trailing" spacing."""
        clock = int(self.t_max) + 1
        check_count("steps", steps, min(clock, 1000))
        return [float(round(clock - i * clock / steps) - 1) for i in range(steps)]

    def until(self, t_max: float) -> VariancePreserving:
        """Return the schedule of the first betas, whose last whole timestep is t_max or the one before."""
        if not 1 <= t_max <= self.t_max:
            raise BadInput("t_max", t_max, f"1 to {self.t_max:g}")
        return self if t_max == self.t_max else VariancePreserving(self.betas[: int(t_max) + 1])

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, **self.betas_config}

    @classmethod
    def from_betas(
        cls,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
    ) -> VariancePreserving:
        """Build the schedule of diffusers' DDPM and DDIM schedulers from their four numbers.

        Raises:
            BadInput: a beta_schedule that DDPM's scheduler does not have.
        """
        config = dict(
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
            num_train_timesteps=num_train_timesteps,
        )
        return from_diffusers(config)  # type: ignore[return-value]


_CONTINUOUS: dict[str, type[EDM] | type[RectifiedFlow] | type[Trigonometric]] = {
    c.name: c for c in (EDM, RectifiedFlow, Trigonometric)
}


def from_config(config: dict[str, Any]) -> NoiseSchedule:
    """Build a schedule from `to_config`'s dictionary or a recipe's [schedule] table."""
    options = dict(config)
    name = options.pop("name", "vp")
    try:
        if name == "vp":
            if "trained_betas" in options:
                return VariancePreserving(torch.tensor(options["trained_betas"], dtype=torch.float64))
            return VariancePreserving.from_betas(**options)
        if name in _CONTINUOUS:
            return _CONTINUOUS[name](**options)
    except TypeError as error:
        raise BadInput("schedule", config, f"the options of {name!r} ({error})") from None
    raise BadInput("schedule.name", name, "vp, " + ", ".join(_CONTINUOUS))


def from_diffusers(scheduler_config: dict[str, Any]) -> NoiseSchedule:
    """Build the schedule of a diffusers scheduler from its `scheduler_config.json`.

    Betas are rebuilt by diffusers' own code, that of DDPM's scheduler, which knows most beta schedules and
    zero-terminal-SNR rescaling.

    Raises:
        BadInput: a beta_schedule that it does not know.
    """
    import diffusers

    if scheduler_config.get("_class_name", "").startswith("FlowMatch") or scheduler_config.get("use_flow_sigmas"):
        shift = scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0))
        clock = scheduler_config.get("num_train_timesteps", 1000)
        return RectifiedFlow(clock=clock, shift=1.0 if scheduler_config.get("use_dynamic_shifting") else shift)
    if scheduler_config.get("_class_name", "").startswith("EDM"):
        named = {"t_min": "sigma_min", "t_max": "sigma_max", "sigma_data": "sigma_data", "rho": "rho"}
        return EDM(**{own: scheduler_config[theirs] for own, theirs in named.items() if theirs in scheduler_config})
    config = {
        k: scheduler_config[k] for k in (*PLAIN, "trained_betas", "rescale_betas_zero_snr") if k in scheduler_config
    }
    try:
        scheduler: Any = diffusers.DDPMScheduler(**config)
    except NotImplementedError:
        raise BadInput(
            "beta_schedule", config["beta_schedule"], ", ".join((*STOCK_BETAS, "sigmoid", "laplace"))
        ) from None
    betas = scheduler.betas
    if float(betas[-1]) >= 1:  # zero terminal SNR: alpha(T-1) = 0 has no sigma/alpha; stop just above it
        betas = betas.clamp(max=1 - 1e-6)
    kept: dict[str, Any] = {k: config[k] for k in PLAIN if k in config}
    plain = len(kept) == 4 and not config.get("rescale_betas_zero_snr") and config.get("trained_betas") is None
    return VariancePreserving(betas, kept if plain and kept["beta_schedule"] in STOCK_BETAS else None)
