"""Exact teachers are Gaussian mixtures, whose score and probability-flow map are known.

A network teacher is itself wrong, so a student that disagrees with it proves nothing. Here E[x0 | x_t] is a formula,
the probability-flow map is that formula's ODE solved to 1e-6, and a method is right or wrong by a number.
Any Distiller trains on `exact_teacher(ring())` with data `Points(ring())`, as it does on pictures; points have shape
(B, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.codec import PixelUnshuffle
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import NoiseSchedule, Prediction, Trigonometric, like
from distillers.teacher import Teacher
from distillers.weights.manifest import Info


class GaussianMixture(nn.Module):
    """The mixture p(x0) = sum_k w_k N(x0; m_k, s_k^2 I) is diffused by `schedule`; `mixture(x_t, t)` is E[x0 | x_t].

    Args:
        means: (K, D).
        stds: (K,), above 0.
        weights: (K,), above 0; scaled to sum to 1.

    Computes in float64 and answers in the dtype of x_t. Points are (B, D), t is () or (B,).
    """

    prediction: Prediction = "x0"  # what it answers is what it is asked for

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__()
        if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != means.shape[:1]:
            shapes = tuple(means.shape), tuple(stds.shape), tuple(weights.shape)
            raise BadInput("means, stds, weights", shapes, "shapes (K, D), (K,), (K,)")
        if not bool((stds > 0).all() and (weights > 0).all()):
            raise BadInput("stds, weights", (stds.tolist(), weights.tolist()), "numbers above 0")
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.register_buffer("weights", weights.double() / weights.sum())
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Compute E[x0 | x_t], shape and dtype of x_t. The mixture has no classes: cond is ignored."""
        return self._posterior_mean(x_t.double(), *self._scales(x_t, t)).to(x_t)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute ln p_t(x_t), float64 (B,)."""
        return self._log_joint(x_t.double(), *self._scales(x_t, t)).logsumexp(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute grad ln p_t(x_t), by Tweedie's formula from E[x0 | x_t]."""
        return self.schedule.score_from(self(x_t, t), x_t, t)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Sample n times x0, float32 (n, D)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        eps = torch.randn(n, self.means.shape[1], generator=rng, dtype=torch.float64)
        return (self.means[k] + self.stds[k, None] * eps).float()

    def mode_of(self, x0: Tensor) -> Tensor:
        """Find the component that most likely made a clean point, int64 (B,)."""
        return self._log_joint(x0.double(), x0.new_ones(1, 1).double(), x0.new_zeros(1, 1).double()).argmax(1)

    @torch.no_grad()
    def flow_map(self, x_t: Tensor, t_from: float, t_to: float, steps: int = 600) -> Tensor:
        """Solve the probability-flow ODE from x_t at t_from to t_to, in either direction: RK4 in float64.

        Solved for y = x / sqrt(alpha^2 + sigma^2) in the angle phi = atan(sigma / alpha), in which every schedule is
        trigonometric and dy/dphi = (y cos phi - x0) / sin phi is smooth from end to end.
        """
        ends = torch.tensor([t_from, t_to], dtype=torch.float64)
        a, s = self.schedule.alpha(ends), self.schedule.sigma(ends)
        size, angle = torch.hypot(a, s).tolist(), torch.atan2(s, a).tolist()

        def slope(y: Tensor, phi: float) -> Tensor:
            cos, sin = y.new_full((1, 1), math.cos(phi)), y.new_full((1, 1), math.sin(phi))
            return (y * cos - self._posterior_mean(y, cos, sin)) / sin

        y, h = x_t.double() / size[0], (angle[1] - angle[0]) / steps
        for i in range(steps):
            phi = angle[0] + i * h
            k1 = slope(y, phi)
            k2 = slope(y + h / 2 * k1, phi + h / 2)
            k3 = slope(y + h / 2 * k2, phi + h / 2)
            k4 = slope(y + h * k3, phi + h)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y * size[1]

    # a and s are alpha and sigma, float64, shaped to multiply x (B, D).
    def _scales(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return like(self.schedule.alpha(t), x.double()), like(self.schedule.sigma(t), x.double())

    def _log_joint(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Compute ln( w_k N(x; a m_k, (a^2 s_k^2 + s^2) I) ), (B, K)."""
        variance = (a * self.stds) ** 2 + s**2
        distance = x.square().sum(1, keepdim=True) - 2 * a * (x @ self.means.T) + a**2 * self.means.square().sum(1)
        return self.weights.log() - x.shape[1] / 2 * (2 * math.pi * variance).log() - distance / (2 * variance)

    def _posterior_mean(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Average E[x0 | x, k] = m_k + g_k (x - a m_k), g_k = a s_k^2 / variance_k, by the components' shares in x."""
        share = self._log_joint(x, a, s).softmax(1)
        gain = a * self.stds**2 / ((a * self.stds) ** 2 + s**2)
        return (share * (1 - a * gain)) @ self.means + (share * gain).sum(1, keepdim=True) * x


def gaussian_flow_map(gaussian: GaussianMixture, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Evaluate one Gaussian's flow map, x_s = a_s m + (d_s / d_t)(x_t - a_t m) with d^2 = a^2 std^2 + sigma^2."""
    if len(gaussian.means) != 1:
        raise BadInput("components", len(gaussian.means), "1")
    (a_t, s_t), (a_s, s_s) = gaussian._scales(x_t, t), gaussian._scales(x_t, s)
    ratio = torch.hypot(a_s * gaussian.stds, s_s) / torch.hypot(a_t * gaussian.stds, s_t)
    return (a_s * gaussian.means + ratio * (x_t.double() - a_t * gaussian.means)).to(x_t)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Compute 2 E|a - b| - E|a - a'| - E|b - b'| of points (N, D), (M, D): 0 for equal distributions only.

    Szekely and Rizzo 2013. It sees a lost mode and a collapsed one alike; unlike a likelihood it needs samples only.
    """
    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def ring() -> GaussianMixture:
    """Build eight equal modes of std 0.15 on a circle of radius 1.398: unit variance in each dimension."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 1.398 * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((8,), 0.15), torch.ones(8), Trigonometric())


def asymmetric(seed: int) -> GaussianMixture:
    """Build five modes without symmetry; directions, distances, widths (to 1:3), weights (to 1:4) follow from the seed.

    Centred, and scaled to unit variance on average over the two dimensions.
    """
    rng = torch.Generator().manual_seed(seed)
    angle_u, radius_u, std_u, weight_u = torch.rand(4, 5, generator=rng, dtype=torch.float64)
    angle = (torch.arange(5) + 0.4 * angle_u) * (2 * math.pi / 5)
    means = (0.8 + radius_u)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    stds, weights = 0.12 + 0.2 * std_u, 1 + 3 * weight_u
    share = (weights / weights.sum())[:, None]
    means = means - (share * means).sum(0)
    scale = (share * (means.square() + stds[:, None] ** 2)).sum(0).mean().sqrt()
    return GaussianMixture(means / scale, stds / scale, weights, Trigonometric())


def random_mixture(seed: int, schedule: NoiseSchedule | None = None) -> GaussianMixture:
    """Build 5 to 9 modes in 2 to 8 dimensions; everything but the schedule (trigonometric) follows from the seed.

    Means are Gaussian, drawn again until each pair is 5 of the larger std apart, so that every point has a mode; stds
    differ to 1:3, weights to 1:4. Centred, and scaled to unit variance on average over the dimensions, which are
    2 + seed mod 7.
    """
    rng, dimensions = torch.Generator().manual_seed(seed), 2 + seed % 7
    modes = int(torch.randint(5, 10, (), generator=rng))
    std_u, weight_u = torch.rand(2, modes, generator=rng, dtype=torch.float64)
    stds, weights = 0.1 + 0.2 * std_u, 1 + 3 * weight_u
    share, apart = (weights / weights.sum())[:, None], 5 * torch.maximum(stds[:, None], stds)
    while True:
        means = torch.randn(modes, dimensions, generator=rng, dtype=torch.float64)
        means = means - (share * means).sum(0)
        scale = (share * (means.square() + stds[:, None] ** 2)).sum(0).mean().sqrt()
        if bool((torch.cdist(means, means) + torch.diag(apart.diag()) >= apart).all()):
            return GaussianMixture(means / scale, stds / scale, weights, schedule or Trigonometric())


class StudentNetwork(nn.Module):
    """A student network has three hidden layers of 128 SiLU units over the point and sin/cos features of the time.

    He initialisation: with PyTorch's default the network starts so smooth that it takes many times as long to tell the
    modes apart.

    Args:
        dimensions: of a point.
        width: units of a hidden layer.
        frequencies: octaves of time features.
        clock: time over which the slowest feature turns by one radian.
    """

    frequencies: Tensor

    def __init__(self, dimensions: int = 2, width: int = 128, frequencies: int = 6, clock: float = 1.0) -> None:
        super().__init__()
        self.options = {"dimensions": dimensions, "width": width, "frequencies": frequencies, "clock": clock}
        self.clock = clock
        self.register_buffer("frequencies", 2.0 ** torch.arange(frequencies))
        sizes = (dimensions + 2 * frequencies, width, width, width, dimensions)
        linear = [nn.Linear(*pair) for pair in pairwise(sizes)]
        for layer in linear:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.layers = nn.Sequential(*(part for layer in linear for part in (layer, nn.SiLU())))[:-1]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phase = (time / self.clock)[:, None] * self.frequencies
        out: Tensor = self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))
        return out


@dataclass(frozen=True)
class Points:
    """Samples of a mixture as a data set (`distillers.data.ImageData`): "image" is (B, D) float32."""

    mixture: GaussianMixture
    name: str = "points"
    size: int = 1
    labels: tuple[str, ...] = ()
    captioned: bool = False
    pictured: bool = True

    def __len__(self) -> int:
        return 10_000

    def draw(self, n: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"image": self.mixture.sample(n, torch.Generator().manual_seed(int(rng.integers(2**62))))}

    def items(self, indices: Sequence[int]) -> dict[str, Tensor]:
        every = self.mixture.sample(len(self), torch.Generator().manual_seed(0))
        return {"image": every[list(indices)]}


@dataclass(frozen=True)
class ExactTeacher(Teacher):
    """A teacher whose guided denoiser is the mixture itself; `denoiser` is only what students start as."""

    mixture: GaussianMixture = field(kw_only=True)

    def example(self) -> tuple[Tensor, Cond | None]:
        return torch.zeros(1, self.mixture.means.shape[1]), None

    def guided(self, guidance_scale: float) -> nn.Module:
        if guidance_scale != 1:
            raise BadInput("guidance_scale", guidance_scale, "1: the mixture has no classes to guide by")
        return self.mixture


def exact_teacher(
    mixture: GaussianMixture, seed: int = 0, prediction: Prediction = "v", frequencies: int = 6
) -> ExactTeacher:
    """Make the mixture a teacher; its students start as a `StudentNetwork` with random weights of the seed.

    Where the schedule's clock counts a thousand timesteps, the network's is slowed to two radians over the range, as
    the sinusoidal embeddings of stock networks slow it.
    """
    top = float(mixture.schedule.network_time(torch.tensor(mixture.schedule.t_max)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StudentNetwork(mixture.means.shape[1], frequencies=frequencies, clock=max(1.0, top / 2))
    info = Info(
        name="mixture",
        task="image",
        method="exact",
        role="teacher",
        data="points",
        sampler="ddim",
        size=(1, 1),
        default_steps=50,
    )
    return ExactTeacher(Denoiser(network, mixture.schedule, prediction), PixelUnshuffle(1), info, mixture=mixture)
