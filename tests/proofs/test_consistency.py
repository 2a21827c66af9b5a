"""Consistency distillation: what is true without training, who moves, and the exact flow map after a training."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from broken_methods import broken_copies, refute
from exact_report import PROOFS, SETTINGS, hold, judge_samples, train_on
from gaussians import ExactStudent, diffused, each_schedule, same, single, state, under
from torch import Tensor, nn

from distillers.methods.consistency import Consistency
from distillers.methods.diffusion import Diffusion
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import NoiseSchedule, VariancePreserving
from distillers.teacher import Teacher
from distillers.training.distiller import follow
from distillers.training.losses import consistency_function, per_sample_mse, pseudo_huber, teacher_end
from distillers.training.toy import GaussianMixture, StudentNetwork, exact_teacher, gaussian_flow_map, ring


# --- what is true without training -----------------------------------------------------------------------------------
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
    coarse, fine = (Consistency(points=n, solver=solver, distance="l2", anchored=0.0) for n in (80, 160))
    left = exact_loss(fine, gaussian, gaussian)
    assert left < 2e-3
    assert math.log2(exact_loss(coarse, gaussian, gaussian) / left) > order + 0.5
    assert exact_loss(fine, stranger, gaussian) > 3 * left, "another Gaussian's map must be told apart"


@each_schedule
def test_the_teachers_own_end_is_of_second_order(schedule: NoiseSchedule) -> None:
    """From sigma/alpha = 0.08 and half of it to t_min, on a Gaussian whose flow map is known."""
    gaussian = single(schedule)
    errors = []
    for ratio in (0.08, 0.04):
        t = schedule.time_at_ratio(torch.full((500,), ratio, dtype=torch.float64))
        x_t = diffused(gaussian, t)[2].double()
        exact = gaussian_flow_map(gaussian, x_t, t, torch.tensor(schedule.t_min))
        errors.append(float((teacher_end(gaussian, x_t, t, None) - exact).square().mean().sqrt()))
        first_order = schedule.step(x_t, gaussian(x_t, t), t, torch.tensor(schedule.t_min))
        assert errors[-1] < 0.2 * float((first_order - exact).square().mean().sqrt())
    assert errors[1] < 0.3 * errors[0]


@each_schedule
def test_the_exact_consistency_function_is_at_the_teachers_own_end(schedule: NoiseSchedule) -> None:
    gaussian, stranger = single(schedule), single(schedule, std=0.6)
    method = Consistency(points=160, distance="l2", anchored=0.99)
    right, wrong = (exact_loss(method, student, gaussian) for student in (gaussian, stranger))
    assert right < 0.01 and wrong > 3 * right


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
    assert gaps[0] > 0.55 and gaps[7] == pytest.approx(gaps[6] / 2, rel=0.1)


def test_distances() -> None:
    a, b = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    b[0, 0], b[1] = torch.tensor([3.0, 4.0]), 0.0
    assert per_sample_mse(a, b).tolist() == pytest.approx([25 / 6, 0])
    assert pseudo_huber(a, b, c=12.0).tolist() == pytest.approx([1, 0])
    c = 0.00054 * math.sqrt(6)
    assert pseudo_huber(a, b).tolist() == pytest.approx([math.sqrt(25 + c * c) - c, 0], abs=1e-6)


# --- who moves, who is frozen -----------------------------------------------------------------------------------------
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


# --- trainings against thresholds -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("mixture", PROOFS["consistency"].mixtures[:1])
def test_the_student_is_the_exact_flow_map(mixture: str) -> None:
    hold("consistency", mixture)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("name", broken_copies("consistency"))
def test_a_broken_copy_does_not_pass(name: str) -> None:
    refute(name)


@pytest.mark.slow
@pytest.mark.proof
def test_more_steps_are_not_worse_than_fewer_for_answers_at_little_noise_are_right() -> None:
    """What recipes run: DDPM's schedule, an x0 head that starts as a teacher of pictures does, N = 40, few iterations.

    Not anchored, the student's answers at t = 25 have too much power (measured: 1.063, and 1.018 anchored) and nearly
    twice the error, which eight steps add up.
    """
    mixture = under(VariancePreserving.from_betas(), ring())
    teacher = exact_teacher(mixture, prediction="x0")
    begun = train_on(teacher, mixture, Diffusion(), replace(SETTINGS, iterations=1500, learning_rate=5e-3))
    teacher = replace(teacher, denoiser=begun.generator().denoiser)
    x0, eps = mixture.sample(2000, torch.Generator().manual_seed(5)), torch.randn(2000, 2)
    t = torch.full((2000,), 25.0, dtype=torch.float64)
    x_t = mixture.schedule.add_noise(x0, eps, t)
    ends = mixture.flow_map(x_t, 25.0, 0.0, steps=100).float()
    errors, powers = {}, {}
    for anchored in (0.0, 0.1):
        run = train_on(
            teacher, mixture, Consistency(anchored=anchored), replace(SETTINGS, iterations=400, learning_rate=2e-3)
        )
        with torch.no_grad():
            f = consistency_function(run.averages["student"], x_t, t)
        errors[anchored] = float((f - ends).square().sum(1).mean().sqrt())
        powers[anchored] = float(f.var(0).mean() / ends.var(0).mean())
    assert errors[0.1] < 0.8 * errors[0.0] and abs(powers[0.1] - 1) < min(0.035, 0.6 * abs(powers[0.0] - 1))
    energies = [judge_samples(run.generator(), mixture, steps)["energy"] for steps in (1, 2, 4, 8)]
    assert all(more < 1.1 * fewer for fewer, more in pairwise(energies)), energies
