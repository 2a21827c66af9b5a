"""Mixtures of Gaussians under every schedule, their noised points, and a denoiser that solves one exactly."""

import pytest
import torch
from torch import Tensor, nn

from distillers.models.conditions import Cond
from distillers.models.schedule import EDM, NoiseSchedule, RectifiedFlow, Trigonometric, VariancePreserving
from distillers.training.losses import consistency_function
from distillers.training.toy import GaussianMixture, gaussian_flow_map, ring

SCHEDULES = [EDM(), VariancePreserving.from_betas(), RectifiedFlow(), Trigonometric()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


def under(schedule: NoiseSchedule, mixture: GaussianMixture | None = None) -> GaussianMixture:
    """The ring, or another mixture, diffused by a schedule of choice."""
    modes = mixture or ring()
    return GaussianMixture(modes.means, modes.stds, modes.weights, schedule)


def single(schedule: NoiseSchedule, mean: float = 0.3, std: float = 0.7) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean, -mean]]), torch.tensor([std]), torch.ones(1), schedule)


def diffused(mixture: GaussianMixture, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps and x_t for each time in t, float64."""
    rng = torch.Generator().manual_seed(0)
    x0 = mixture.sample(len(t), rng).double()
    eps = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    return x0, eps, mixture.schedule.add_noise(x0, eps, t)


def start(mixture: GaussianMixture, n: int) -> Tensor:
    """n noises at t_max, float64."""
    top = torch.tensor(mixture.schedule.t_max)
    scale = float(torch.hypot(mixture.schedule.alpha(top), mixture.schedule.sigma(top)))
    return scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class ExactStudent(nn.Module):
    """A denoiser whose consistency function is a Gaussian's exact flow map to t_min."""

    def __init__(self, gaussian: GaussianMixture) -> None:
        super().__init__()
        self.gaussian, self.schedule = gaussian, gaussian.schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        end = gaussian_flow_map(self.gaussian, x_t, t, torch.tensor(self.schedule.t_min))
        skip = consistency_function(Nothing(self.schedule), torch.ones_like(x_t), t)  # type: ignore[arg-type]
        return torch.where(skip < 1, (end - skip * x_t) / (1 - skip), x_t)  # f = skip x + (1 - skip) D, solved for D


class Nothing(nn.Module):
    """A denoiser that always answers zero."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.zeros_like(x_t)


def state(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def same(net: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(net.state_dict().values(), before, strict=True))
