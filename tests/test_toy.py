"""The exact teacher is exact: its density, score and flow map against closed forms and quadrature."""

import math

import pytest
import torch
from gaussians import diffused, each_schedule, single, start, under

from distillers.errors import BadInput
from distillers.models.schedule import NoiseSchedule, Trigonometric
from distillers.training.toy import GaussianMixture, asymmetric, gaussian_flow_map, random_mixture, ring


@each_schedule
def test_log_prob_is_that_of_the_diffused_mixture(schedule: NoiseSchedule) -> None:
    mixture = under(schedule, asymmetric(1))
    t = torch.tensor((schedule.t_min + schedule.t_max) / 3)
    a, s = schedule.alpha(t.double()), schedule.sigma(t.double())
    stds = torch.hypot(a * mixture.stds, s)[:, None].expand(-1, 2)
    modes = torch.distributions.Independent(torch.distributions.Normal(a * mixture.means, stds), 1)
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), modes)
    x_t = start(mixture, 100)
    torch.testing.assert_close(mixture.log_prob(x_t, t), expected.log_prob(x_t))


@each_schedule
def test_the_score_is_the_gradient_of_log_prob(schedule: NoiseSchedule) -> None:
    mixture = under(schedule, asymmetric(1))
    t = torch.linspace(schedule.t_min, schedule.t_max, 300, dtype=torch.float64)
    x_t = diffused(mixture, t)[2].requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x_t, t).sum(), x_t)
    torch.testing.assert_close(mixture.score(x_t, t), gradient, atol=1e-8, rtol=1e-7)


@each_schedule
def test_the_flow_map_of_a_gaussian_is_the_closed_form(schedule: NoiseSchedule) -> None:
    gaussian, (low, high) = single(schedule), (schedule.t_min, schedule.t_max)
    x_t = start(gaussian, 200)
    exact = gaussian_flow_map(gaussian, x_t, torch.tensor(high), torch.tensor(low))
    torch.testing.assert_close(gaussian.flow_map(x_t, high, low), exact, atol=1e-6, rtol=0)


@each_schedule
def test_the_flow_map_carries_the_density(schedule: NoiseSchedule) -> None:
    """Change of variables: ln p_T(x) = ln p_min(f(x)) + ln |det df/dx|, the Jacobian by central differences."""
    mixture, high, low, h = under(schedule, asymmetric(1)), schedule.t_max, schedule.t_min, 1e-5
    x = start(mixture, 100)
    shifted = [x + d * h * torch.eye(2, dtype=torch.float64)[i] for i in range(2) for d in (1, -1)]
    y = mixture.flow_map(torch.cat([x, *shifted]), high, low, steps=300).reshape(5, -1, 2)
    jacobian = torch.stack([y[1] - y[2], y[3] - y[4]], 2) / (2 * h)
    there = mixture.log_prob(y[0], torch.tensor(low)) + jacobian.det().abs().log()
    torch.testing.assert_close(there, mixture.log_prob(x, torch.tensor(high)), atol=1e-3, rtol=0)


def test_the_flow_map_runs_both_ways_and_through_any_time() -> None:
    mixture = asymmetric(1)
    low, high = mixture.schedule.t_min, mixture.schedule.t_max
    x = start(mixture, 200)
    y = mixture.flow_map(x, high, low, steps=200)
    through = mixture.flow_map(mixture.flow_map(x, high, 0.4, steps=200), 0.4, low, steps=200)
    torch.testing.assert_close(through, y, atol=1e-4, rtol=0)
    torch.testing.assert_close(mixture.flow_map(y, low, high, steps=200), x, atol=1e-3, rtol=0)


@each_schedule
def test_a_step_on_the_same_noise_is_the_teachers_step_in_expectation(schedule: NoiseSchedule) -> None:
    """Why tuning needs no teacher: E[x_s | x_t] is the DDIM step with E[x0 | x_t].

    E[(x_s - step) phi(x_t)] = 0 for whatever phi; here four of them, within five standard errors.
    """
    mixture, n = under(schedule), 100_000
    ratio = torch.full((n,), 0.5)
    t, s = schedule.time_at_ratio(ratio), schedule.time_at_ratio(ratio / 2)
    x0, eps, x_t = diffused(mixture, t)
    wrong = schedule.add_noise(x0, eps, s) - schedule.step(x_t, mixture(x_t, t), t, s)
    for phi in (torch.ones_like(x_t), x_t, x_t.flip(1).sin(), x_t.square()):
        product = wrong * phi
        assert bool((product.mean(0).abs() < 5 * product.std(0) / math.sqrt(n)).all())
    other = schedule.add_noise(x0, eps, s) - schedule.step(x_t, x_t, t, s)  # a teacher that takes x_t for clean
    assert bool(((other * x_t).mean(0).abs() > 5 * (other * x_t).std(0) / math.sqrt(n)).all())


def test_the_standard_mixtures_are_what_they_claim() -> None:
    rng = torch.Generator().manual_seed(0)
    points = ring().sample(50_000, rng)
    torch.testing.assert_close(points.std(0), torch.ones(2), atol=0.01, rtol=0)
    assert ring().mode_of(ring().means).tolist() == list(range(8))
    for seed in range(3):
        uneven = asymmetric(seed)
        points = uneven.sample(50_000, rng)
        torch.testing.assert_close(points.mean(0), torch.zeros(2), atol=0.02, rtol=0)
        assert float(points.var(0).mean()) == pytest.approx(1, abs=0.02)
        shares = uneven.mode_of(points).bincount(minlength=5) / len(points)
        torch.testing.assert_close(shares.double(), uneven.weights, atol=0.02, rtol=0)
        assert min(uneven.weights.max() / uneven.weights.min(), uneven.stds.max() / uneven.stds.min()) > 1.3
    assert not torch.equal(asymmetric(0).means, asymmetric(1).means)


def test_random_mixtures_differ_in_dimension_and_modes_and_their_modes_are_apart() -> None:
    rng, found = torch.Generator().manual_seed(0), []
    for seed in range(8):
        mixture = random_mixture(seed)
        assert torch.equal(mixture.means, random_mixture(seed).means), "the seed says everything"
        apart = torch.cdist(mixture.means, mixture.means) / torch.maximum(mixture.stds[:, None], mixture.stds)
        assert float(apart[~torch.eye(len(apart), dtype=torch.bool)].min()) >= 5
        points = mixture.sample(50_000, rng)
        torch.testing.assert_close(points.mean(0), torch.zeros(points.shape[1]), atol=0.03, rtol=0)
        assert float(points.var(0).mean()) == pytest.approx(1, abs=0.02)
        found.append((points.shape[1], len(apart)))
    assert {dimensions for dimensions, _ in found} == set(range(2, 9))
    assert all(5 <= modes <= 9 for _, modes in found) and len({modes for _, modes in found}) > 2


@pytest.mark.parametrize(
    ("means", "stds", "weights"),
    [((2, 2), (3,), (2,)), ((2,), (2,), (2,)), ((2, 2), (2,), (1,))],
)
def test_a_mixture_of_wrong_shape_is_refused(means: tuple, stds: tuple, weights: tuple) -> None:
    with pytest.raises(BadInput, match="means, stds, weights"):
        GaussianMixture(torch.ones(means), torch.ones(stds), torch.ones(weights), Trigonometric())


def test_a_mixture_without_width_is_refused() -> None:
    with pytest.raises(BadInput, match="stds, weights"):
        GaussianMixture(torch.zeros(1, 2), torch.zeros(1), torch.ones(1), Trigonometric())
