"""Proofs against exact teachers: a method is right if its one-step map is the exact flow map.

The first three parts train nothing and take seconds. The last, marked slow, trains students, and broken ones too: a
proof that a broken method would pass is none.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from broken_methods import BROKEN
from exact_report import BROKEN_BY, LIMITS, PROOFS, SETTINGS, prove, strain, train_on
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.methods.consistency import Consistency
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import EDM, NoiseSchedule, RectifiedFlow, Trigonometric, VariancePreserving
from distillers.teacher import Teacher
from distillers.training.distiller import follow
from distillers.training.losses import consistency_function, per_sample_mse, pseudo_huber
from distillers.training.toy import GaussianMixture, StudentNetwork, asymmetric, exact_teacher, gaussian_flow_map, ring

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


# --- the exact teacher is exact --------------------------------------------------------------------------------------
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


# --- consistency: what is true without training ----------------------------------------------------------------------
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


def exact_loss(method: Consistency, student: GaussianMixture, teacher: GaussianMixture) -> float:
    """Root of the l2 loss of one step of the method with both networks at the exact solution for `student`."""
    torch.manual_seed(0)
    x0 = teacher.sample(2000, torch.Generator().manual_seed(0)).double()
    solution = ExactStudent(student)
    nets = nn.ModuleDict({"student": solution, "target": solution, "teacher": teacher})
    _, loss = next(method.step(nets, {"x0": x0}, 0.0))
    return float(loss) ** 0.5


@each_schedule
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_the_exact_consistency_function_has_no_loss(
    schedule: NoiseSchedule, solver: Literal["ddim", "heun"], order: int
) -> None:
    """Only the teacher's local error is left: the distance falls with the solver's order plus one."""
    gaussian, stranger = single(schedule), single(schedule, std=0.6)
    coarse, fine = (Consistency(points=n, solver=solver, distance="l2") for n in (80, 160))
    left = exact_loss(fine, gaussian, gaussian)
    assert left < 2e-3
    assert math.log2(exact_loss(coarse, gaussian, gaussian) / left) > order + 0.5
    assert exact_loss(fine, stranger, gaussian) > 3 * left, "another Gaussian's map must be told apart"


@each_schedule
def test_the_boundary_is_the_identity_and_is_gone_where_generators_are_called(schedule: NoiseSchedule) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(StudentNetwork(), schedule, "x0")
    x = torch.randn(64, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            consistency_function(denoiser, x, torch.full((64,), schedule.t_min)), x, atol=1e-6, rtol=0
        )
        top = torch.full((64,), schedule.t_max)
        torch.testing.assert_close(consistency_function(denoiser, x, top), denoiser(x, top), atol=1e-6, rtol=0)


@each_schedule
def test_tuning_times_close_in_on_each_other(schedule: NoiseSchedule) -> None:
    """r < t always; each stage halves the gap 1 - r/t; at the first one most r are the clean end (Geng et al. 2024)."""
    method = Consistency(source="data", ratio_base=2.0, stages=8)
    low = float(schedule.noise_ratio(torch.tensor(schedule.t_min, dtype=torch.float64)))
    gaps = []
    for stage in range(8):
        torch.manual_seed(0)
        t, s = method.tuning_times(schedule, 2000, stage / 8, torch.device("cpu"))
        ratio, below = schedule.noise_ratio(t), schedule.noise_ratio(s)
        assert bool((below < ratio).all()) and bool((below >= low * (1 - 1e-9)).all())
        expected = (ratio * (1 - 0.5 ** (stage + 1) * (1 + 8 * torch.sigmoid(-ratio)))).clamp_min(low)
        torch.testing.assert_close(below, expected, atol=1e-8, rtol=1e-6)
        gaps.append(float((1 - below / ratio).mean()))
    assert gaps[0] > 0.8 and gaps[7] == pytest.approx(gaps[6] / 2, rel=0.1)


def test_distances() -> None:
    a, b = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    b[0, 0], b[1] = torch.tensor([3.0, 4.0]), 0.0
    assert per_sample_mse(a, b).tolist() == pytest.approx([25 / 6, 0])
    assert pseudo_huber(a, b, c=12.0).tolist() == pytest.approx([1, 0])
    c = 0.00054 * math.sqrt(6)
    assert pseudo_huber(a, b).tolist() == pytest.approx([math.sqrt(25 + c * c) - c, 0], abs=1e-6)


# --- consistency: who moves, who stands still ------------------------------------------------------------------------
def state(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def same(net: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(net.state_dict().values(), before, strict=True))


def a_step(method: Consistency, teacher: Teacher) -> tuple[nn.ModuleDict, Tensor, Iterator[tuple[str, Tensor]]]:
    """The method's networks and its first turn, its randomness fixed."""
    nets = method.networks(teacher)
    torch.manual_seed(0)
    turns = method.step(nets, {"x0": ring().sample(32, torch.Generator().manual_seed(0))}, 0.0)
    player, loss = next(turns)
    assert player == "student"
    return nets, loss, turns


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_only_the_student_gets_gradients(source: str) -> None:
    nets, loss, _ = a_step(Consistency(source=source), exact_teacher(ring()))  # type: ignore[arg-type]
    assert set(nets) == ({"student", "target", "teacher"} if source == "teacher" else {"student", "target"})
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in nets["student"].parameters())
    assert all(
        p.grad is None and not p.requires_grad for name in set(nets) - {"student"} for p in nets[name].parameters()
    )


def test_the_target_carries_no_gradient_even_where_it_is_the_student_itself() -> None:
    """With and without a target network of the same weights, the first gradients are the same."""
    gradients = []
    for decay in (0.0, 0.5):
        nets, loss, _ = a_step(Consistency(target_decay=decay), exact_teacher(ring()))
        loss.backward()
        gradients.append([p.grad for p in nets["student"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_target_follows_after_the_student_has_moved() -> None:
    nets, _, turns = a_step(Consistency(target_decay=0.9), exact_teacher(ring()))
    before = [p.clone() for p in nets["target"].parameters()]
    with torch.no_grad():
        for p in nets["student"].parameters():
            p.add_(1.0)
    assert next(turns, None) is None
    for then, now in zip(before, nets["target"].parameters(), strict=True):
        torch.testing.assert_close(now, then + 0.1)


def test_follow_is_the_average_it_says() -> None:
    slow, fast = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        slow.weight.fill_(1.0), fast.weight.fill_(5.0), fast.running_mean.fill_(7.0)
    follow(slow, fast, 0.75)
    assert slow.weight.tolist() == [2.0, 2.0] and fast.weight.tolist() == [5.0, 5.0]
    assert slow.running_mean.tolist() == [7.0, 7.0], "buffers are copied"


def test_a_frozen_teacher_is_the_same_after_training() -> None:
    """A network as the teacher, students beginning as its copy: it must not move with them."""
    exact = exact_teacher(ring())
    teacher = Teacher(exact.denoiser, exact.codec, exact.info)
    before = state(teacher.denoiser)
    run = train_on(teacher, ring(), Consistency(), replace(SETTINGS, iterations=3, warmup=1))
    assert run.nets["teacher"] is teacher.denoiser and same(teacher.denoiser, before)
    assert not same(run.nets["student"], before) and not same(run.nets["target"], before)


def test_what_leaves_is_the_average_of_the_student_and_never_the_target() -> None:
    run = train_on(exact_teacher(ring()), ring(), Consistency(), replace(SETTINGS, iterations=3, warmup=1))
    leaving = run.generator().denoiser
    assert same(leaving, state(run.averages["student"])) and not same(leaving, state(run.nets["target"]))


# --- trainings against thresholds ------------------------------------------------------------------------------------
# the limits, and how far from them every figure is, stand in exact_report and docs/results/exact/margins.md
@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [(method, name) for method in LIMITS for name in PROOFS[method].mixtures])
def test_the_student_is_what_the_exact_teacher_makes_of_it(method: str, name: str) -> None:
    """The exact flow map from each noise, at every stage and time; or samples that lose no mode and keep its weight."""
    found = prove(method, name, seed=0)[1]
    taken = strain(method, found)
    assert taken.keys() == LIMITS[method].keys() and all(share < 1 for share in taken.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_does_not_pass(name: str) -> None:
    found = BROKEN[name].train(0)
    assert not all(share < BROKEN_BY for share in strain(BROKEN[name].method, found).values()), found
