"""What is true of the methods without training: at the closed form the loss is zero, and only there.

A Gaussian's probability flow is a formula, and so is what each method should learn from it: the end of the trajectory
(scm, consistency under guidance), the lower end of a segment (hyper_sd), the signal beside a noise (boot). Each student
here *is* that formula. A loss that does not vanish on it is another loss; one that vanishes elsewhere too is none; and
one that a mutation of the method does not raise was not looked at.
"""

import copy
import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from draw_with_diffusers import COUNT, draw_with_pipeline
from gaussians import ExactStudent, diffused, each_schedule, same, single, start, state
from mutate import mutated
from networks import describe, transformer, unet
from torch import Tensor, nn
from trainings import batch_for, iterate, teacher_for

from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.methods import boot, consistency, hyper_sd, scm
from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot
from distillers.methods.consistency import Consistency
from distillers.methods.hyper_sd import HyperSD, jump
from distillers.methods.scm import ContinuousConsistency, TimeWeight, derivative_along
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.guidance import Guided, GuidedTime
from distillers.models.lora import LoraSettings, lora_rank, set_lora_scale
from distillers.models.schedule import EDM, NoiseSchedule, RectifiedFlow, VariancePreserving, from_config, like
from distillers.teacher import Teacher
from distillers.training.distiller import Distiller, on_one_base
from distillers.training.losses import (
    consistency_function,
    gan_loss,
    per_sample_mse,
    sampling_times,
)
from distillers.training.toy import GaussianMixture, exact_teacher, gaussian_flow_map, ring
from distillers.weights.manifest import ADAPTER, Info

Solver = Literal["ddim", "heun"]
VP = VariancePreserving.from_betas()


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=8)


def loss_of(method: Any, nets: Any, gaussian: GaussianMixture, progress: float = 0.0, **cond: Tensor) -> float:
    """The student's loss on 2000 samples of the Gaussian, float64; all of sCM's times weigh alike."""
    torch.manual_seed(0)
    x0 = gaussian.sample(2000, torch.Generator().manual_seed(0)).double()
    turns = dict(method.step(nn.ModuleDict({"weight": Even(), **nets}), {"x0": x0, **cond}, progress))
    return float(turns["student"])


class Even(nn.Module):
    """A weight of 1 at all times; it can learn."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, ratio: Tensor) -> Tensor:
        return self.w.expand(len(ratio))


# --- scm: the consistency function stands still along the trajectory -------------------------------------------------
def inner_times(schedule: NoiseSchedule, n: int = 200) -> Tensor:
    """Times whose sigma/alpha runs from 0.05 to 20, float64 (n,)."""
    return schedule.time_at_ratio(torch.logspace(math.log10(0.05), math.log10(20), n, dtype=torch.float64))


@each_schedule
def test_the_derivative_is_zero_at_the_exact_solution(schedule: NoiseSchedule) -> None:
    gaussian, stranger, t = single(schedule), single(schedule, std=0.6), inner_times(schedule)
    x_t = diffused(gaussian, t)[2]
    f, df = derivative_along(ExactStudent(gaussian), x_t, t, gaussian(x_t, t), None)  # type: ignore[arg-type]
    torch.testing.assert_close(f, gaussian_flow_map(gaussian, x_t, t, torch.tensor(schedule.t_min)))
    assert float(df.abs().max()) < 1e-6
    along_another = derivative_along(ExactStudent(gaussian), x_t, t, stranger(x_t, t), None)[1]  # type: ignore[arg-type]
    assert float(along_another.abs().mean()) > 0.03


def by_differences(denoiser: Any, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None, h: float) -> Tensor:
    """df/dphi by central differences of size h in the angle, along the line x0 + eps that the trajectory touches."""
    schedule = denoiser.schedule
    phi = torch.atan(schedule.noise_ratio(t))

    def f(angle: Tensor) -> Tensor:
        time = schedule.time_at_ratio(angle.tan())
        return consistency_function(denoiser, schedule.step(x_t, x0, t, time), time, cond)

    with torch.no_grad():
        return (f(phi + h) - f(phi - h)) / (2 * h)


@each_schedule
def test_the_derivative_of_a_wrong_student_is_the_finite_difference(schedule: NoiseSchedule) -> None:
    gaussian, student, t = single(schedule), ExactStudent(single(schedule, std=0.5)), inner_times(schedule)
    x_t = diffused(gaussian, t)[2]
    given: Any = (student, x_t, t, gaussian(x_t, t), None)
    expected = by_differences(*given, h=1e-5)
    assert float(expected.abs().mean()) > 0.05
    torch.testing.assert_close(derivative_along(*given)[1], expected, atol=1e-5, rtol=1e-4)
    for old, new in (
        ("(dx, dt))", "(dx, 0 * dt))"),
        (") * eps\n", ") * -eps\n"),
        ("** 2 + s**2) / (", "** 2 + 2 * s**2) / ("),
    ):
        broken = mutated(scm, old, new).derivative_along(*given)[1]
        assert float((broken - expected).abs().mean()) > 0.02, f"{new!r} went unnoticed"


@each_schedule
def test_a_finite_step_along_the_trajectory_comes_to_the_same(schedule: NoiseSchedule) -> None:
    """First order: half the step, half the distance to the derivative; at t_min, where there is no way down, zero."""
    gaussian, student, t = single(schedule), ExactStudent(single(schedule, std=0.5)), inner_times(schedule)
    x_t = diffused(gaussian, t)[2]
    given: Any = (student, x_t, t, gaussian(x_t, t), None)
    f, df = derivative_along(*given)
    errors = []
    for step in (2e-3, 1e-3):
        same_f, difference = ContinuousConsistency(tangent_step=step, sigma_data=1.0).derivative(*given)
        assert torch.equal(same_f, f)
        errors.append(float((difference - df).square().mean().sqrt()))
    assert errors[1] < 0.01 * float(df.square().mean().sqrt())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    along_eps = mutated(scm, "schedule.step(x_t, x0, t, s)", "schedule.step(x_t, x_t, t, s)")
    broken = along_eps.ContinuousConsistency(tangent_step=1e-3, sigma_data=1.0).derivative(*given)[1]
    assert float((broken - df).square().mean().sqrt()) > 10 * errors[1]
    low = torch.full((5,), schedule.t_min, dtype=torch.float64)
    x_low = diffused(gaussian, low)[2]
    at_the_end = ContinuousConsistency(tangent_step=0.1).derivative(student, x_low, low, x_low, None)  # type: ignore[arg-type]
    assert torch.equal(at_the_end[1], torch.zeros_like(x_low))


def test_a_finite_step_is_not_taken_in_half_precision() -> None:
    """Rounding to bfloat16 is larger than what a short step changes."""
    denoiser = Denoiser(unet(num_class_embeds=4, add_attention=False), from_config({"name": "trig"}), "v").eval()
    rng = torch.Generator().manual_seed(0)
    x_t, x0 = torch.randn(2, 6, 3, 8, 8, generator=rng)
    given: Any = (denoiser, x_t, torch.linspace(0.2, 1.4, 6, dtype=torch.float64), x0, {"label": torch.arange(6) % 3})
    for method in (ContinuousConsistency(tangent_step=0.0), ContinuousConsistency(tangent_step=0.01)):
        with torch.no_grad():
            expected = method.derivative(*given)[1]
            with torch.autocast("cpu", torch.bfloat16):
                under_autocast = method.derivative(*given)[1]
        assert (under_autocast - expected).norm() < 0.01 * expected.norm(), method.tangent_step


@each_schedule
@pytest.mark.parametrize("tangent", ["normalised", "clipped"])
def test_the_exact_solution_has_no_continuous_loss(
    schedule: NoiseSchedule, tangent: Literal["normalised", "clipped"]
) -> None:
    gaussian, stranger = single(schedule), single(schedule, std=0.6)
    method = ContinuousConsistency(tangent=tangent, tangent_step=0.0, last_time_share=0.0)
    right, wrong = (
        loss_of(method, {"student": ExactStudent(g), "teacher": gaussian}, gaussian, 1.0) for g in (gaussian, stranger)
    )
    assert right < 1e-6 and wrong > 1e-3  # VP draws 0.5 % of its times at t_min, where f is x_t whatever the student


@each_schedule
def test_the_tangent_is_faded_in_from_the_teachers_estimate(schedule: NoiseSchedule) -> None:
    """At the exact solution df = 0, so that the towards-term (1 - r) cos^2 (f - x0) / sin is all there is."""
    gaussian = single(schedule)
    student, method = (
        ExactStudent(gaussian),
        ContinuousConsistency(
            tangent_step=0.0,
            tangent_warmup=0.5,
            tangent="clipped",
            sigma_data=1.0,
            log_mean=-1.0,
            log_std=1.4,
            last_time_share=0.0,
        ),
    )
    torch.manual_seed(0)
    x0 = gaussian.sample(2000, torch.Generator().manual_seed(0)).double()
    t = schedule.time_at_ratio((-1 + 1.4 * torch.randn(2000, dtype=torch.float64)).exp())
    torch.rand(2000)  # which of them are at t_max: none
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    sin, cos = (like(c, x_t) for c in method.sin_cos(schedule, t))
    torch.testing.assert_close((sin / cos).flatten(), schedule.noise_ratio(t))
    towards = cos**2 * (consistency_function(student, x_t, t) - gaussian(x_t, t)) / sin  # type: ignore[arg-type]
    weight = (1 / sin.flatten() ** 2).clamp(max=20)
    for progress, left in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0)):
        expected = (weight * per_sample_mse(sin * (left * towards).clamp(-1, 1), torch.zeros_like(x_t))).mean()
        loss = loss_of(method, {"student": student, "teacher": gaussian}, gaussian, progress)
        assert loss == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    without = loss_of(
        replace(method, tangent_warmup=0.0), {"student": student, "teacher": gaussian}, gaussian, progress=0.0
    )
    assert without < 1e-6, "no warm-up: the whole tangent from the first iteration"


@pytest.mark.parametrize("source", ["teacher", "data"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("tangent_step", [0.0, 1e-3])
@pytest.mark.parametrize("tangent", ["normalised", "clipped"])
def test_the_continuous_loss_is_the_one_written_out_by_hand(
    tangent: Literal["normalised", "clipped"], tangent_step: float, sigma_data: float, source: Any
) -> None:
    """Value and gradient, at a student that is wrong and half-way through the warm-up; the target has no gradient.

    A fifth of the samples is at t_max; the weight's own loss is e^w error - w, and moves nothing but the weight.
    """
    gaussian, schedule, n = single(VP), VP, 500
    student, weight = Denoiser(Shift(), schedule, "v"), Even(0.7)
    nets: Any = nn.ModuleDict({"student": student, "weight": weight, "teacher": gaussian})
    x0 = gaussian.sample(n, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    method = ContinuousConsistency(
        source=source, tangent=tangent, tangent_step=tangent_step, tangent_warmup=0.5, sigma_data=sigma_data,
        log_mean=-1.0, log_std=1.4, last_time_share=0.2,
    )  # fmt: skip
    (first, of_weight), (second, loss) = method.step(nets, {"x0": x0}, 0.25)
    assert (first, second) == ("weight", "student")
    ours = torch.autograd.grad(loss, list(student.parameters()))
    torch.manual_seed(0)
    t = schedule.time_at_ratio((-1 + 1.4 * torch.randn(n, dtype=torch.float64)).exp())
    t = t.masked_fill(torch.rand(n) < 0.2, 999)
    assert 70 < int((t == 999).sum()) < 130
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    phi, f = torch.atan(schedule.noise_ratio(t) / sigma_data), consistency_function(student, x_t, t)
    sin, cos = like(phi.sin(), x_t), like(phi.cos(), x_t)
    end = gaussian(x_t, t) if source == "teacher" else x0
    df = method.derivative(student, x_t, t, end, None)[1]
    g = (0.5 * cos**2 * (f - end) / sin + 0.5 * cos * df) / sigma_data
    size = g.square().mean(1, keepdim=True).sqrt()
    target = f / sigma_data - sin * (g / (size + 0.1) if tangent == "normalised" else g.clamp(-1, 1))
    error = (1 / sin**2).clamp(max=20) * (f / sigma_data - target.detach()) ** 2
    by_hand = torch.autograd.grad(math.exp(0.7) * error.mean(), list(student.parameters()), retain_graph=True)
    torch.testing.assert_close(loss, math.exp(0.7) * error.mean())
    torch.testing.assert_close(ours, by_hand)
    torch.testing.assert_close(of_weight, math.exp(0.7) * error.mean() - 0.7)
    of_weight.backward()
    torch.testing.assert_close(weight.w.grad, math.exp(0.7) * error.mean().detach() - 1)
    assert all(p.grad is None for p in student.parameters())


@each_schedule
def test_the_derivative_for_data_of_another_deviation(schedule: NoiseSchedule) -> None:
    """df/dphi of phi = atan(sigma / (alpha sigma_data)): the same slope in another unit, and what the step measures."""
    gaussian, student, t = single(schedule), ExactStudent(single(schedule, std=0.5)), inner_times(schedule)
    given: Any = (student, x_t := diffused(gaussian, t)[2], t, gaussian(x_t, t), None)
    for sigma_data in (0.5, 2.0):
        ratio = schedule.noise_ratio(t)
        angle_per_angle = sigma_data * (1 + (ratio / sigma_data) ** 2) / (1 + ratio**2)  # dphi_1 / dphi_sigma_data
        expected = derivative_along(*given)[1] * like(angle_per_angle, x_t)
        torch.testing.assert_close(derivative_along(*given, sigma_data)[1], expected)
        method = ContinuousConsistency(tangent_step=1e-3, sigma_data=sigma_data)
        step = method.derivative(*given)[1]
        assert float((step - expected).norm()) < 0.02 * float(expected.norm())


def test_a_tangent_is_normalised_by_the_size_of_an_element() -> None:
    """c = 0.1 is a tenth of an element, whatever the picture's size; over all elements it would be nothing."""
    method = ContinuousConsistency(tangent="normalised")
    for side in (2, 64):
        g = 0.2 * torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        size = float(method.normalised(g).square().mean().sqrt())
        assert size == pytest.approx(0.2 / 0.3, rel=0.15)


def test_at_first_there_is_no_tangent_in_half_precision_either() -> None:
    """The student is its teacher: what their difference is in bfloat16 is rounding, which training would follow."""
    denoiser = Denoiser(unet(num_class_embeds=4, add_attention=False), VP, "v").eval()
    nets: Any = nn.ModuleDict({"student": copy.deepcopy(denoiser), "teacher": denoiser, "weight": Even()})
    batch = {"x0": torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(64) % 3}
    losses = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            *_, (_, loss) = ContinuousConsistency(tangent="clipped").step(nets, batch, 0.0)
        losses.append(float(loss.detach()))
    assert losses[0] < 1e-4, "what the boundary at t_min makes"
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_the_weight_of_a_time_levels_the_loss() -> None:
    """e^w learns one over the mean error there: the weighted loss is 1 at all times."""
    torch.manual_seed(0)
    weight = TimeWeight()
    ratio = torch.logspace(-2, 2, 400, dtype=torch.float64)
    assert float(weight(ratio).abs().max()) == 0, "it starts even"
    error = (0.01 + 0.3 * ratio / (1 + ratio)).float()
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02)
    for _ in range(500):
        w = weight(ratio)
        loss = (w.exp() * error - w).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    torch.testing.assert_close(weight(ratio).exp() * error, torch.ones(400), atol=0.15, rtol=0)


def test_a_continuous_student_leaves_as_a_consistency_model(shapes: ImageData) -> None:
    teacher = teacher_for("class-to-image", shapes)
    method = ContinuousConsistency(steps=(2, 4))
    info = method.generator(method.networks(teacher), teacher).info
    assert (info.sampler, info.default_steps) == ("consistency", 2)
    assert info.step_times == {k: sampling_times(VP, k) for k in (2, 4)}


def test_the_student_moves_towards_the_teachers_estimate_at_first() -> None:
    """The sign: one step of descent brings a free student nearer to the teacher's x0."""
    gaussian = single(VP)
    free = Denoiser(Shift(), VP, "x0")
    nets = {"student": free, "teacher": gaussian}

    def distance() -> Tensor:
        t = inner_times(VP)
        x_t = diffused(gaussian, t)[2].float()
        return (free(x_t, t) - gaussian(x_t, t)).square().mean()

    before = distance()
    torch.manual_seed(0)
    x0 = gaussian.sample(500, torch.Generator().manual_seed(0))
    turns = dict(ContinuousConsistency().step(nn.ModuleDict({**nets, "weight": Even()}), {"x0": x0}, 0.0))
    turns["student"].backward()
    with torch.no_grad():
        for p in free.parameters():
            p -= 0.05 * p.grad / p.grad.norm()
    assert distance() < before - 1e-3


class Shift(nn.Module):
    """A network that answers its input times one number, plus another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.full((), -1.0))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.scale * x + self.shift


def dit(**options: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=4, num_embeds_ada_norm=3, norm_num_groups=4, **options,
    )  # fmt: skip


NETWORKS = {
    "attention blocks": lambda: unet(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=4,
    ),
    "attention in the middle": lambda: unet(add_attention=True, num_class_embeds=4),
    "transformer": dit,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_through_stock_networks(name: str) -> None:
    """Attention and group norm included; no graph is kept, and the network is as before."""
    denoiser = Denoiser(NETWORKS[name](), from_config({"name": "trig"}), "v").eval()
    rng = torch.Generator().manual_seed(0)
    x_t, x0 = torch.randn(2, 6, 3, 8, 8, generator=rng)
    t, cond = torch.linspace(0.2, 1.4, 6, dtype=torch.float64), {"label": torch.tensor([0, 1, 2, 0, 1, 2])}
    f, df = derivative_along(denoiser, x_t, t, x0, cond)
    expected = by_differences(denoiser, x_t, t, x0, cond, h=3e-3)
    assert (df - expected).norm() < 3e-3 * expected.norm()
    assert not f.requires_grad and not df.requires_grad and all(p.grad is None for p in denoiser.parameters())
    torch.testing.assert_close(f, consistency_function(denoiser, x_t, t, cond).detach(), atol=1e-5, rtol=1e-5)
    still = mutated(scm, "(dx, dt))", "(dx, 0 * dt))").derivative_along(denoiser, x_t, t, x0, cond)[1]
    assert (still - expected).norm() > 0.03 * expected.norm(), "the network's clock is part of the derivative"


@pytest.mark.parametrize(
    "method",
    [ContinuousConsistency(), Consistency(), HyperSD(segments=(1,), adversarial_weights=(0.0,)), Boot()],
    ids=lambda method: type(method).__name__,
)
def test_a_student_that_trains_is_a_function_of_its_label(method: Distiller) -> None:
    """A DiT drops labels at random in training mode: its target would be of another class than what is pulled to it."""
    generator = transformer(describe("class-to-image"))
    student = method.networks(Teacher(generator.denoiser, generator.codec, generator.info))["student"]
    x_t, t, cond = torch.randn(64, 4, 8, 8), torch.tensor(500.0), {"label": torch.zeros(64, dtype=torch.long)}
    with torch.no_grad():
        assert float((student(x_t, t, cond) - student(x_t, t, cond)).abs().max()) == 0


# --- hyper_sd: jumps to the lower end of a segment -------------------------------------------------------------------
class ExactSegments(nn.Module):
    """A denoiser whose DDIM jump from t is a Gaussian's exact flow map to the lower end of t's segment."""

    def __init__(self, gaussian: GaussianMixture, points: int, k: int) -> None:
        super().__init__()
        self.gaussian, self.schedule, self.length = gaussian, gaussian.schedule, points // k
        self.grid = self.schedule.segment_grid(points)

    def lower_end(self, t: Tensor) -> Tensor:
        n = torch.searchsorted(self.grid, t.double().contiguous())
        return self.grid[(n - 1).clamp_min(0) // self.length * self.length]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """x_b = a_b D + (s_b / s_t)(x_t - a_t D), solved for D."""
        t = t.expand(len(x_t))
        b = self.lower_end(t)
        (a_t, s_t), (a_b, s_b) = self.schedule._at(t, x_t), self.schedule._at(b, x_t)
        x_b = gaussian_flow_map(self.gaussian, x_t, t, b)
        return torch.where(like(b < t, x_t) > 0, (x_b - s_b / s_t * x_t) / (a_b - s_b / s_t * a_t), x_t)


K = pytest.mark.parametrize("k", [8, 4, 2, 1])


@each_schedule
@K
def test_each_jump_is_the_exact_map_of_its_segment(schedule: NoiseSchedule, k: int) -> None:
    """Segment by segment and through all of them; the generator that leaves calls them at the segments' upper ends."""
    gaussian, points = single(schedule), 64
    student, grid = ExactSegments(gaussian, points, k), schedule.segment_grid(points)
    ends = grid[:: points // k]
    assert len(ends) == k + 1
    assert ends[[0, -1]].tolist() == pytest.approx([schedule.t_min, schedule.t_max])
    for b, top in pairwise(ends):
        t = grid[(grid > b) & (grid <= top)]
        x_t = diffused(gaussian, t)[2]
        exact = gaussian_flow_map(gaussian, x_t, t, b)
        torch.testing.assert_close(jump(student, x_t, t, b.expand(len(t))), exact)  # type: ignore[arg-type]
        torch.testing.assert_close(jump(student, x_t, t, t), x_t)  # type: ignore[arg-type]
    made = HyperSD(segments=(k,), adversarial_weights=(0.0,), points=points).generator(
        nn.ModuleDict({"student": student}),
        exact_teacher(ring()),  # type: ignore[arg-type]
    )
    noise = start(gaussian, 200) / float(torch.hypot(*(f(ends[-1]) for f in (schedule.alpha, schedule.sigma))))
    exact = gaussian_flow_map(gaussian, start(gaussian, 200), ends[-1], ends[0])
    assert float((made(noise, steps=k) - exact).square().mean().sqrt()) < 0.02  # t_min is not quite clean


@each_schedule
@K
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_the_exact_segment_maps_have_no_loss(schedule: NoiseSchedule, k: int, solver: Solver, order: int) -> None:
    gaussian, stranger = single(schedule), single(schedule, std=0.6)

    def distance(points: int, of: GaussianMixture, module: Any = hyper_sd) -> float:
        method = module.HyperSD(
            segments=(k,), adversarial_weights=(0.0,), points=points, solver=solver, distance="l2", target_decay=0.5
        )
        student = ExactSegments(of, points, k)
        return loss_of(method, {"student": student, "target": student, "teacher": gaussian}, gaussian) ** 0.5

    left = distance(200, gaussian)
    assert left < 3e-3
    assert math.log(distance(40, gaussian) / left) / math.log(5) > order + 0.4
    assert distance(200, stranger) > 3 * left, "another Gaussian's segments must be told apart"
    for old, new in (
        ("jump(target, x_m, m, b, cond)", "jump(target, x_m, t, b, cond)"),  # at the wrong time
        ("jump(target, x_m, m, b, cond)", "jump(target, x_t, m, b, cond)"),  # the teacher's step left out
        (
            "grid[n - 1], grid[first]",
            "grid[n - 1], torch.lerp(grid[first], grid[n - 1], 0.5)",
        ),  # to no end of a segment
    ):
        assert distance(200, gaussian, mutated(hyper_sd, old, new)) > 3 * left, f"{new} went unnoticed"


def test_the_last_stage_has_half_of_the_training_and_the_others_share_the_rest() -> None:
    method = HyperSD(segments=(8, 4, 2, 1), adversarial_weights=(0.0, 0.1, 0.2, 0.3))
    given = (0.0, 0.1666, 0.1667, 0.3333, 0.3334, 0.4999, 0.5, 0.9999, 1.0)
    stages = [(8, 0.0), (8, 0.0), (4, 0.1), (4, 0.1), (2, 0.2), (2, 0.2), (1, 0.3), (1, 0.3), (1, 0.3)]
    assert [method.stage(p) for p in given] == stages
    assert HyperSD(segments=(1,), adversarial_weights=(0.0,)).stage_starts() == [0.0]
    assert HyperSD(segments=(2, 1), adversarial_weights=(0.0, 0.0)).stage_starts() == [0.0, 0.5]


@pytest.mark.parametrize("k", [8, 4, 2])
def test_a_student_of_segments_is_drawn_by_stock_ddim(k: int, shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("class-to-image", shapes)
    method = HyperSD(segments=(8, k), adversarial_weights=(0.0, 0.0))
    made = method.generator(method.networks(teacher), teacher)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(k)
    assert (made.info.sampler, made.info.default_steps) == ("ddim", k)
    assert made.info.step_times == {k: scheduler.timesteps.tolist()}
    drawn_alike_by_stock(made.eval(), tmp_path / "made")


def drawn_alike_by_stock(made: Generator, folder: Path) -> None:
    """Opened again and by diffusers' pipeline, the folder draws one and the same pictures at every step count."""
    made.save_pretrained(folder)
    opened = Generator.from_pretrained(folder)
    for steps in opened.info.step_times:
        ours = (opened.sample(range(COUNT), labels=list(range(COUNT)), steps=steps) + 1) / 2
        theirs = draw_with_pipeline(folder, json.loads((folder / "fewstep.json").read_text()), steps)
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=1e-3, rtol=0)


def test_after_the_last_stage_it_is_a_consistency_model(shapes: ImageData) -> None:
    teacher = teacher_for("class-to-image", shapes)
    method = HyperSD(steps=(1, 4))
    info = method.generator(method.networks(teacher), teacher).info
    assert (info.sampler, info.default_steps) == ("consistency", 1)
    assert info.step_times == {k: sampling_times(VP, k) for k in (1, 4)}


def turns_of(method: Distiller, teacher: Teacher, data: ImageData, progress: float) -> tuple[Any, Iterator[Any]]:
    nets = method.networks(teacher)
    torch.manual_seed(0)
    return nets, method.step(nets, batch_for(teacher, data, method.draws(progress)), progress)


def touched(net: nn.Module) -> bool:
    return any(p.grad is not None for p in net.parameters())


def test_each_players_turn_leaves_the_other_one_alone(shapes: ImageData) -> None:
    """Heads, critic and student: a turn puts gradients into its own player only."""
    method = HyperSD(segments=(1,), adversarial_weights=(1.0,), points=8, score_weight=1.0, critic_turns=2)
    nets, turns = turns_of(method, teacher_for("class-to-image", shapes), shapes, 0.5)
    played = []
    for player, loss in turns:
        assert loss > 0
        loss.backward()
        assert {name for name in ("student", "discriminator", "critic") if touched(nets[name])} == {player}
        assert all(p.requires_grad for p in nets["discriminator"].parameters())
        assert not touched(nets["teacher"]) and not touched(nets["backbone"]) and not touched(nets["target"])
        nets.zero_grad()
        played.append(player)
    assert played == ["discriminator", "critic", "critic", "student"]


@pytest.mark.parametrize(("score_weight", "critic_turns"), [(0.0, 3), (1.0, 1), (1.0, 3)])
def test_the_critic_is_there_for_the_score_alone_and_in_the_last_stage(
    score_weight: float, critic_turns: int, shapes: ImageData
) -> None:
    method = HyperSD(
        segments=(2, 1), adversarial_weights=(0.0, 0.0), score_weight=score_weight, critic_turns=critic_turns
    )
    teacher = teacher_for("image", shapes)
    nets = method.networks(teacher)
    assert ("critic" in nets) == (score_weight > 0) and "discriminator" not in nets
    for progress, turns in ((0.2, 0), (0.7, critic_turns if score_weight else 0)):
        players = iterate(method, nets, batch_for(teacher, shapes, method.draws(progress)), progress)
        assert players == ["critic"] * turns + ["student"]


def brightness(pixels: Tensor, cond: Cond | None) -> Tensor:
    """A reward: "test_trajectory:brightness"."""
    return pixels.mean((1, 2, 3))


def test_feedback_raises_the_reward_and_stops_at_the_margin(shapes: ImageData) -> None:
    teacher = teacher_for("image", shapes)

    def drawn(nets: Any) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return hyper_sd.sample_student(nets["student"], torch.randn(8, 3, 8, 8))

    for margin, moves in ((5.0, True), (-5.0, False)):
        method = HyperSD(
            segments=(1,), adversarial_weights=(0.0,), reward="test_trajectory:brightness", reward_weight=1.0,
            reward_margin=margin,
        )  # fmt: skip
        nets = method.networks(teacher)
        before = brightness(drawn(nets), None).mean()
        loss = method.one_step_terms(nets, torch.zeros(8, 3, 8, 8), None)
        loss.backward()
        gradients = [p.grad for p in nets["student"].parameters()]
        assert any(bool(g.any()) for g in gradients) == moves
        assert bool(loss > 0) == moves
        with torch.no_grad():
            for p in nets["student"].parameters():
                p -= 0.1 * p.grad
        assert (float(brightness(drawn(nets), None).mean() - before) > 1e-3) == moves


def test_heads_call_the_target_real_and_the_student_wants_to_be_called_that(shapes: ImageData) -> None:
    """D's loss, written out with the logits of what was shown; what is added to the student's gradient lowers its own.

    Of the loss that is shown, the student's own term is left out: its weight differs from batch to batch.
    """
    teacher = teacher_for("image", shapes)
    batch = batch_for(teacher, shapes)
    torch.manual_seed(3)
    nets = HyperSD(segments=(1,), adversarial_weights=(1.0,)).networks(teacher)
    backbone, heads = Watched(nets["backbone"]), nets["discriminator"]
    nets["backbone"] = backbone

    def losses(weight: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        backbone.views.clear()
        steps = HyperSD(segments=(1,), adversarial_weights=(weight,)).step(nets, batch, 0.0)
        return dict(islice(steps, 2 if weight else 1))  # no further: nothing follows

    alone, played = losses(0.0), losses(2.0)
    fake, real, again = (heads(backbone.denoiser.features(x, t, None)) for x, t in backbone.views)
    torch.testing.assert_close(played["discriminator"], gan_loss(fake, real=False) + gan_loss(real, real=True))
    torch.testing.assert_close(played["student"], alone["student"])
    learning = list(nets["student"].parameters())
    with_it, without = (torch.autograd.grad(losses(weight)["student"], learning) for weight in (2.0, 0.0))
    with torch.no_grad():
        size = sum(float((a - b).square().sum()) for a, b in zip(with_it, without, strict=True)) ** 0.5
        for p, a, b in zip(learning, with_it, without, strict=True):
            p -= 1e-2 * (a - b) / size
    losses(2.0)
    after = heads(backbone.denoiser.features(*backbone.views[-1], None))
    assert gan_loss(after, real=True) < gan_loss(again, real=True)


def test_the_score_term_pulls_from_the_critics_estimate_to_the_teachers() -> None:
    """Teacher right of the student, critic left of it: the student's samples move to the right, and the reverse."""

    def at(mean: float) -> GaussianMixture:
        return GaussianMixture(torch.full((1, 2), mean), torch.tensor([0.7]), torch.ones(1), VP)

    for sign in (1, -1):
        student = Denoiser(Shift(), VP, "x0")
        nets: Any = nn.ModuleDict({"student": student, "teacher": at(sign * 1.0), "critic": at(sign * -3.0)})
        loss = HyperSD(score_weight=1.0).one_step_terms(nets, torch.zeros(64, 2), None)
        (gradient,) = torch.autograd.grad(loss, [student.network.shift])  # type: ignore[list-item]
        assert sign * float(gradient) < -0.1


def test_the_score_term_is_at_rest_while_the_critic_is_the_teacher(shapes: ImageData) -> None:
    """Real and fake are denoised from one noised sample; unequal critics move the student."""
    teacher = teacher_for("class-to-image", shapes)
    method = HyperSD(segments=(1,), adversarial_weights=(0.0,), score_weight=1.0)
    nets, batch = method.networks(teacher), batch_for(teacher, shapes)

    def gradient() -> Tensor:
        loss = method.one_step_terms(nets, batch["x0"], {"label": batch["label"]})
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(nets["student"].parameters()))])

    nets["critic"].eval()
    assert float(gradient().abs().max()) < 1e-7
    with torch.no_grad():
        for p in nets["critic"].parameters():
            p.mul_(0.9)
    assert float(gradient().abs().max()) > 1e-4


class Watched(nn.Module):
    """A denoiser whose calls and views are remembered: their times, and what was shown."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.calls, self.views = list[Tensor](), list[tuple[Tensor, Tensor]]()

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        self.calls.append(t)
        return self.denoiser(x_t, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, layers: Any) -> list[Tensor]:
        self.views.append((x.detach(), t))
        return self.denoiser.features(x, t, cond, layers)


def test_heads_judge_within_the_segment_at_one_noise(shapes: ImageData) -> None:
    """Fake and real are shown at one time u above b, below the segment's end, and differ in their signal only."""
    teacher = teacher_for("image", shapes)
    method = HyperSD(segments=(4, 1), adversarial_weights=(1.0, 1.0))
    nets, batch = method.networks(teacher), {"x0": batch_for(teacher, shapes)["x0"].repeat(8, 1, 1, 1)}
    ends = VP.segment_grid(64)[::16].contiguous()
    student, backbone = Watched(nets["student"]), Watched(nets["backbone"])
    nets["student"], nets["backbone"] = student, backbone
    torch.manual_seed(0)
    list(method.step(nets, batch, 0.0))
    (t,), ((fake, u), (real, u_again), (again, _)) = student.calls, backbone.views
    segment = torch.searchsorted(ends, t) - 1
    assert torch.equal(u, u_again) and len(segment.unique()) == 4
    assert bool((u >= ends[segment]).all()) and bool((u <= ends[segment + 1]).all())
    assert float((u > ends[segment]).double().mean()) > 0.8, "noised, not at the clean end"
    assert float((fake - real).abs().max()) > 0 and torch.equal(fake, again), "the student is judged by what it showed"
    torch.manual_seed(0)
    fake_first, real_first = "features(x_b.detach()), features(y)", "features(y), features(x_b.detach())"
    mixed = mutated(hyper_sd, f"fake, real = {fake_first}", f"fake, real = {real_first}")
    backbone.views.clear()
    list(mixed.HyperSD(segments=(4, 1), adversarial_weights=(1.0, 1.0)).step(nets, batch, 0.0))
    assert torch.equal(backbone.views[0][0], real) and torch.equal(backbone.views[1][0], fake)


@pytest.mark.parametrize(
    "method",
    [
        Consistency(), ContinuousConsistency(tangent_step=0.0), Boot(),
        HyperSD(segments=(1,), adversarial_weights=(0.1,), layers=("transformer_blocks.0",), score_weight=1.0),
        AdversarialConsistency(adversarial_start=0.0, layers=("transformer_blocks.0",), colour_weight=1.0),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_methods_on_a_transformer_in_a_latent_space(method: Distiller) -> None:
    generator = transformer(describe("class-to-image"))
    teacher = Teacher(generator.denoiser.requires_grad_(False), generator.codec, generator.info)
    n = 4 * method.draws(0.9)
    batch = {"x0": torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(n) % 3}
    nets = method.networks(teacher)
    torch.manual_seed(0)
    assert iterate(method, nets, batch, 0.9)[-1] == "student"
    assert method.generator(nets, teacher).eval().sample([0], labels=[1]).isfinite().all()


def test_the_one_step_sample_is_the_generators(shapes: ImageData) -> None:
    method, teacher = HyperSD(), teacher_for("image", shapes)
    for schedule in (VP, EDM()):
        teacher.denoiser.schedule = schedule
        nets = method.networks(teacher)
        noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            leaving = method.generator(nets, teacher)(noise, steps=1)
            torch.testing.assert_close(hyper_sd.sample_student(nets["student"], noise), leaving)


def test_a_lora_is_all_that_moves_and_all_that_its_folder_adds(shapes: ImageData, tmp_path: Path) -> None:
    teacher = on_one_base(teacher_for("class-to-image", shapes), LoraSettings(rank=4))
    method, batch = HyperSD(), batch_for(teacher, shapes)
    nets = method.networks(teacher)
    start = {name: p.clone() for name, p in nets["student"].named_parameters()}
    assert lora_rank(nets["student"].network) == 4
    x_t, t, cond = batch["x0"], torch.tensor(500.0), {"label": batch["label"]}
    with torch.no_grad():
        assert torch.equal(nets["student"](x_t, t, cond), teacher.denoiser(x_t, t, cond))
    learning = {name for name, p in nets["student"].named_parameters() if p.requires_grad}
    assert learning and all(".adapter." in name for name in learning)
    optimizer = torch.optim.SGD(nets["student"].parameters(), lr=0.1)
    for _ in range(2):  # B is zero at first, and A has no gradient then
        for player, loss in method.step(nets, batch, 0.1):
            assert player == "student"
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = {name for name, p in nets["student"].named_parameters() if not torch.equal(p, start[name])}
    assert moved == learning
    made = method.generator(nets, teacher)
    made.save_pretrained(tmp_path / "made")
    assert (tmp_path / "made" / ADAPTER).is_file() and Info.read(tmp_path / "made").lora
    with torch.no_grad():
        assert not torch.equal(nets["student"](x_t, t, cond), teacher.denoiser(x_t, t, cond))
        set_lora_scale(nets["student"].network, 0)
        assert torch.equal(nets["student"](x_t, t, cond), teacher.denoiser(x_t, t, cond))


# --- boot: the signal beside a noise ---------------------------------------------------------------------------------
class ExactSignal(nn.Module):
    """y(eps, t) of the trajectory that begins at x_T = alpha y_T + sigma eps with y_T = E[x0 | eps], exactly.

    What BOOT's two terms together ask for. `off` is added at t_max alone, where only the boundary term looks.
    """

    def __init__(self, gaussian: GaussianMixture, off: float = 0.0) -> None:
        super().__init__()
        self.gaussian, self.schedule, self.off = gaussian, gaussian.schedule, off

    def forward(self, x_in: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        schedule, top = self.schedule, torch.tensor(self.schedule.t_max, dtype=torch.float64)
        eps = x_in / schedule.start(torch.ones_like(x_in), t)
        y_top = self.gaussian(schedule.start(eps, top), top)
        x_t = gaussian_flow_map(self.gaussian, schedule.add_noise(y_top, eps, top), top, t)
        a, s = schedule._at(t, x_t)
        return (x_t - s * eps) / a + self.off * (like(t, x_t) == top)


def boot_loss(teacher: GaussianMixture, student: nn.Module, module: Any = boot, **options: Any) -> float:
    return loss_of(module.Boot(**options), {"student": student, "teacher": teacher}, teacher)


@each_schedule
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_the_exact_signal_has_no_bootstrap_loss(schedule: NoiseSchedule, solver: Solver, order: int) -> None:
    """What is left is the increment's own error, delta^order in the root of the weighted loss."""
    gaussian, stranger = single(schedule), single(schedule, std=0.6)
    left = [
        boot_loss(gaussian, ExactSignal(gaussian), delta=delta, solver=solver, boundary_weight=0.0) ** 0.5
        for delta in (0.02, 0.01)
    ]
    assert left[1] < 0.02
    assert math.log2(left[0] / left[1]) > order - 0.2
    wrong = boot_loss(gaussian, ExactSignal(stranger), delta=0.01, solver=solver, boundary_weight=0.0) ** 0.5
    assert wrong > 3 * left[1], "another Gaussian's signal must be told apart"


@each_schedule
def test_the_exact_signal_ends_at_the_exact_flow_map(schedule: NoiseSchedule) -> None:
    """y(eps, t_min), called as the generator that leaves calls it."""
    gaussian = single(schedule)
    nets: Any = nn.ModuleDict({"student": ExactSignal(gaussian)})
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top, bottom = torch.tensor(schedule.t_max), torch.tensor(schedule.t_min)
    exact = gaussian_flow_map(gaussian, schedule.start(noise, top), top, bottom)
    made = Boot().generator(nets, exact_teacher(ring()))(noise, steps=1)
    assert float((made - exact).square().mean().sqrt()) < 0.02  # sigma at t_min, alpha at t_max


FRESH = ("signal(student, eps, t, cond), eps, t)", "signal(student, eps, t, cond), torch.randn_like(eps), t)")


@each_schedule
@pytest.mark.parametrize(
    ("old", "new"),
    [
        FRESH,  # the trajectory of another noise
        ("x_t, t, s, cond, self.solver", "x_t, s, t, cond, self.solver"),  # up instead of down
        ("like(schedule.sigma(s), eps) * eps", "like(schedule.sigma(t), eps) * eps"),  # another share of the noise
    ],
)
def test_broken_bootstraps_have_a_loss_at_the_exact_signal(schedule: NoiseSchedule, old: str, new: str) -> None:
    gaussian = single(schedule)
    given: dict[str, Any] = dict(delta=0.02, boundary_weight=0.0)
    right = boot_loss(gaussian, ExactSignal(gaussian), **given)
    assert boot_loss(gaussian, ExactSignal(gaussian), mutated(boot, old, new), **given) > 100 * right


@each_schedule
def test_the_boundary_term_looks_at_the_top_alone(schedule: NoiseSchedule) -> None:
    gaussian = single(schedule)
    for off in (0.0, 0.5):
        student = ExactSignal(gaussian, off)
        without, full, double = (boot_loss(gaussian, student, boundary_weight=beta) for beta in (0.0, 1.0, 2.0))
        assert full - without == pytest.approx(off**2, abs=1e-9)
        assert double - without == pytest.approx(2 * off**2, abs=1e-9)
        assert without == boot_loss(gaussian, ExactSignal(gaussian), boundary_weight=0.0)


def test_the_target_of_boot_carries_no_gradient() -> None:
    """Gradients are those of the loss written out by hand with a target from another copy of the student.

    The loss's value, and a training on the ring, would not tell.
    """
    teacher, eps_count, delta = exact_teacher(ring()), 16, 0.04

    def gradients(module: Any) -> list[Tensor]:
        method = module.Boot(delta=delta)
        nets = method.networks(teacher)
        torch.manual_seed(0)
        next(method.step(nets, {"x0": torch.zeros(eps_count, 2)}, 0.0))[1].backward()
        return [p.grad for p in nets["student"].parameters()]

    nets = Boot(delta=delta).networks(teacher)
    student, frozen, schedule = nets["student"], Boot().networks(teacher)["student"], nets["student"].schedule
    torch.manual_seed(0)
    eps = torch.randn(eps_count, 2)
    u = delta + (1 - delta) * torch.rand(eps_count, dtype=torch.float64)
    t, s, top = schedule.spaced(u), schedule.spaced(u - delta), torch.tensor(schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        y_t = boot.signal(frozen, eps, t)
        rho = like(schedule.noise_ratio(s) / schedule.noise_ratio(t), eps)
        wanted = y_t + (1 - rho) * (nets["teacher"](schedule.add_noise(y_t, eps, t), t) - y_t)
        wanted_top = nets["teacher"](schedule.start(eps[:4], top), top)
    bootstrap = ((boot.signal(student, eps, s) - wanted) / (1 - rho)).square().mean()
    (bootstrap + (boot.signal(student, eps[:4], top) - wanted_top).square().mean()).backward()
    expected = [p.grad for p in student.parameters()]
    for ours, by_hand in zip(gradients(boot), expected, strict=True):
        torch.testing.assert_close(ours, by_hand, atol=2e-5 * float(by_hand.abs().max()), rtol=1e-3)
    old = "per_sample_mse(y[:-k], y_s)"
    leak = mutated(
        boot, old, "per_sample_mse(y[:-k], y_s + signal(student, eps, t) - signal(student, eps, t).detach())"
    )
    assert any((a - b).norm() > 0.05 * b.norm() for a, b in zip(gradients(leak), expected, strict=True))


def test_boot_never_looks_at_the_data(shapes: ImageData) -> None:
    teacher = teacher_for("class-to-image", shapes)
    nets, batch = Boot().networks(teacher), batch_for(teacher, shapes)

    def loss(**changed: Tensor) -> float:
        torch.manual_seed(0)
        return float(next(Boot().step(nets, {**batch, **changed}, 0.0))[1].detach())

    assert loss() == loss(x0=batch["x0"] * math.nan) != loss(label=batch["label"].flip(0))


class OfItsLabel(nn.Module):
    """Answers each sample's label."""

    schedule = VP

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return cond["label"][:, None].to(x_t).expand_as(x_t)


def test_each_sample_of_boot_keeps_its_own_label_in_both_terms() -> None:
    """Where signal and estimate are one number for each label, there is nothing to learn."""
    nets: Any = {"student": OfItsLabel(), "teacher": OfItsLabel()}
    label = torch.randint(9, (2000,), generator=torch.Generator().manual_seed(0))
    assert loss_of(Boot(), nets, single(VP), label=label) < 1e-9
    for old, new in (("value, value[:k]]", "value, value[-k:]]"), ("name: value[:k] for", "name: value[-k:] for")):
        assert loss_of(mutated(boot, old, new).Boot(), nets, single(VP), label=label) > 1


def test_a_schedule_that_does_not_end_in_noise_is_warned_about_with_the_number(shapes: ImageData) -> None:
    teacher = teacher_for("image", shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Boot().networks(teacher)
    teacher.denoiser.schedule = VariancePreserving.from_betas(num_train_timesteps=100)
    left = 1 / float(teacher.denoiser.schedule.noise_ratio(torch.tensor(99.0)))
    assert left > 0.5
    with pytest.warns(UserWarning, match=rf"boot.*{left:.3f}"):
        Boot().networks(teacher)


def test_what_boot_makes_is_one_step_that_stock_diffusers_draws(shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("class-to-image", shapes)
    method = Boot()
    nets = method.networks(teacher)
    made = method.generator(nets, teacher).eval()
    assert (made.info.step_times, made.info.sampler, made.info.default_steps) == ({1: [0.0]}, "ddim", 1)
    assert nets["student"].prediction == "x0" and teacher.denoiser.prediction == "v"
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"label": torch.tensor([0, 1])}
    with torch.no_grad():
        assert torch.equal(made(noise, cond), boot.signal(nets["student"], noise, torch.tensor(0.0), cond))
    drawn_alike_by_stock(made, tmp_path / "made")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "made" / "scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [0]


# --- consistency under guidance (LCM) --------------------------------------------------------------------------------
class ConditionalGaussians(nn.Module):
    """E[x0 | x_t, label] of Gaussians of one width and a mean for each label, the last one for the null label."""

    MEANS = torch.tensor([[0.9, -0.3], [-0.5, 0.7], [0.2, 0.1]], dtype=torch.float64)
    NULL = 2

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule, self.centred = schedule, single(schedule, mean=0.0)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mean = self.MEANS[cond["label"]]
        return mean + self.centred(x_t - self.schedule._at(t, x_t)[0] * mean, t)

    def guided_mean(self, label: Tensor, w: Tensor) -> Tensor:
        return self.MEANS[self.NULL] + w[:, None] * (self.MEANS[label] - self.MEANS[self.NULL])


class ExactGuided(nn.Module):
    """A denoiser whose consistency function is the exact flow map under the scale it is told, plus `off`."""

    def __init__(self, gaussians: ConditionalGaussians, off: float = 0.0, fixed: float | None = None) -> None:
        super().__init__()
        self.gaussians, self.schedule, self.off, self.fixed = gaussians, gaussians.schedule, off, fixed
        self.centred = ExactStudent(gaussians.centred)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        w = (cond["guidance"].double() if self.fixed is None else torch.full((len(x_t),), self.fixed)) + self.off
        mean = self.gaussians.guided_mean(cond["label"], w)
        a, a_end = self.schedule._at(t, x_t)[0], self.schedule._at(torch.tensor(self.schedule.t_min), x_t)[0]
        skip = consistency_function(Zero(self.schedule), torch.ones_like(x_t), t)  # type: ignore[arg-type]
        # f(x) = a_end m + f_centred(x - a m), whose skip part is that of x - a m
        y = self.centred(x_t - a * mean, t)
        return torch.where(skip < 1, y + (a_end - skip * a) / (1 - skip) * mean, x_t)


class Zero(nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.zeros_like(x_t)


def guided_loss(student: ExactGuided, scales: tuple[float, float], module: Any = consistency) -> float:
    gaussians = student.gaussians
    method = module.Consistency(
        points=160, distance="l2", guidance_range=scales, guidance_scale=scales[0], target_decay=0.5
    )
    nets = {"student": student, "target": student, "teacher": Guided(gaussians, 99.0, gaussians.NULL)}
    return loss_of(method, nets, gaussians.centred, label=torch.arange(2000) % 2) ** 0.5


@each_schedule
def test_the_exact_guided_map_has_no_loss_at_its_own_scale_only(schedule: NoiseSchedule) -> None:
    """Guidance of Gaussians of one width is a Gaussian with the mean m_u + w (m_c - m_u)."""
    gaussians, w = ConditionalGaussians(schedule), 3.0
    x_t, t, label = torch.randn(50, 2).double(), inner_times(schedule, 50), torch.arange(50) % 2
    mean = gaussians.guided_mean(label, torch.full((50,), w))
    expected = mean + gaussians.centred(x_t - like(schedule.alpha(t), x_t) * mean, t)
    torch.testing.assert_close(Guided(gaussians, w, gaussians.NULL)(x_t, t, {"label": label}), expected)
    left = guided_loss(ExactGuided(gaussians, fixed=w), (w, w))
    assert left < 3e-3
    for other in (w - 1, w + 1):
        assert guided_loss(ExactGuided(gaussians, fixed=other), (w, w)) > 3 * left, "LCM counts from 0, we from 1"
    counted_from_0 = mutated(consistency, '"guidance": low + (high - low)', '"guidance": 1 + low + (high - low)')
    assert guided_loss(ExactGuided(gaussians, fixed=w), (w, w), counted_from_0) > 3 * left


def test_each_sample_is_told_the_scale_that_its_teacher_was_guided_by() -> None:
    gaussians = ConditionalGaussians(VP)
    left = guided_loss(ExactGuided(gaussians), (1.0, 4.0))
    assert left < 3e-3
    assert guided_loss(ExactGuided(gaussians, off=0.5), (1.0, 4.0)) > 3 * left
    assert guided_loss(ExactGuided(gaussians, fixed=1.0), (1.0, 4.0)) > 3 * left
    told_another = mutated(
        consistency,
        'teacher_step(nets["teacher"], x_t[k:], t[k:], s[k:], others,',
        "teacher_step(nets[\"teacher\"], x_t[k:], t[k:], s[k:], {**others, 'guidance': others['guidance'].flip(0)},",
    )
    assert guided_loss(ExactGuided(gaussians), (1.0, 4.0), told_another) > 3 * left


def test_a_range_down_to_the_teacher_itself_is_still_a_range() -> None:
    """Up to w = 1: the teacher must follow the scales below it, too."""
    generator = transformer(describe("class-to-image"))
    teacher = Teacher(generator.denoiser, generator.codec, generator.info)
    nets = Consistency(guidance_range=(0.0, 1.0)).networks(teacher)
    x_t, cond = torch.randn(2, 4, 8, 8), {"label": torch.tensor([0, 1])}
    t = torch.tensor(500.0)
    with torch.no_grad():
        answers = [nets["teacher"](x_t, t, {**cond, "guidance": torch.full((2,), w)}) for w in (0.0, 1.0)]
    assert float((answers[0] - answers[1]).abs().max()) > 0.01


def test_a_guided_student_trains_leaves_as_a_stock_network_and_is_opened_again(
    shapes: ImageData, tmp_path: Path
) -> None:
    teacher = teacher_for("class-to-image", shapes)
    method, batch = Consistency(guidance_range=(1.0, 5.0), guidance_scale=3.0), batch_for(teacher, shapes)
    nets = method.networks(teacher)
    before = state(teacher.denoiser)
    for progress in (0.0, 0.5, 0.99):
        assert iterate(method, nets, batch, progress) == ["student"]
    assert same(teacher.denoiser, before)
    inside = nets["student"].network.state_dict().keys()
    made = method.generator(nets, teacher).eval()
    assert made.denoiser.network.state_dict().keys() == teacher.denoiser.network.state_dict().keys() != inside
    assert nets["student"].network.state_dict().keys() == inside, "the one that trains on is still told"
    assert not any(isinstance(m, GuidedTime) for m in made.denoiser.modules()) and made.info.guidance_scale == 1
    x_t, t, cond = batch["x0"], torch.tensor(400.0), {"label": batch["label"]}
    with torch.no_grad():
        told = nets["student"].eval()(x_t, t, {**cond, "guidance": torch.full((4,), 3.0)})
        torch.testing.assert_close(made.denoiser(x_t, t, cond), told, atol=1e-5, rtol=1e-5)
    drawn_alike_by_stock(made, tmp_path / "made")


@pytest.mark.parametrize("scales", [(2.0, 5.0), (0.0, 0.5), (-1.0, 3.0), (5.0, 1.0)])
def test_a_range_that_does_not_hold_the_scale_is_refused(scales: tuple[float, float]) -> None:
    with pytest.raises(BadInput, match=r"consistency\.guidance_range"):
        Consistency(guidance_range=scales)


def test_a_range_is_refused_where_nobody_can_be_guided(shapes: ImageData) -> None:
    with pytest.raises(BadInput, match=r"consistency\.guidance_range"):
        Consistency(source="data", guidance_range=(1.0, 2.0))
    with pytest.raises(BadInput, match=r"guidance_scale.*null class"):
        Consistency(guidance_range=(1.0, 2.0)).networks(teacher_for("image", shapes))
    with pytest.raises(BadInput, match="guidance_range"):
        Consistency(guidance_range=(1.0, 2.0)).networks(exact_teacher(ring()))


# --- consistency: its grid and its distances -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "points", "grids"), [(10, 40, [10, 20, 40]), (10, 50, [10, 20, 40, 50]), (7, 7, [7]), (0, 40, [40])]
)
def test_the_grid_doubles_from_the_first_points_to_the_last(first: int, points: int, grids: list[int]) -> None:
    method = Consistency(first_points=first, points=points)
    seen = [method.grid_points(i / 1000) for i in range(1000)]
    assert list(dict.fromkeys(seen)) == grids and method.grid_points(1.0) == points
    assert all(abs(seen.count(n) - 1000 / len(grids)) < 2 for n in grids), "each for an equal share"


def test_lpips_without_torchvision_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, shapes: ImageData) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(BadInput, match=r"distance: got 'lpips'.*torchvision"):
        Consistency(distance="lpips").networks(teacher_for("image", shapes))


# --- wrong fields ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        (HyperSD, {"segments": (8, 5)}, "hyper_sd.segments"),
        (HyperSD, {"segments": ()}, "hyper_sd.segments"),
        (HyperSD, {"segments": (0,)}, "hyper_sd.segments"),
        (HyperSD, {"points": 0}, "hyper_sd.points"),
        (HyperSD, {"segments": (4, 2), "adversarial_weights": (0.0, 0.0), "score_weight": 1.0}, "hyper_sd.segments"),
        (HyperSD, {"segments": (4, 2), "adversarial_weights": (0.0, 0.0), "reward": "x:y"}, "hyper_sd.segments"),
        (HyperSD, {"adversarial_weights": (0.1,)}, "hyper_sd.adversarial_weights"),
        (HyperSD, {"adversarial_weights": (0.0, 0.0, 0.0, -0.1)}, "hyper_sd.adversarial_weights"),
        (HyperSD, {"critic_turns": 0}, "hyper_sd.critic_turns"),
        (HyperSD, {"target_decay": 1.0}, "hyper_sd.target_decay"),
        (HyperSD, {"steps": (1, 1)}, "hyper_sd.steps"),
        (Boot, {"delta": 0.0}, "boot.delta"),
        (Boot, {"delta": 1.0}, "boot.delta"),
        (Boot, {"boundary_share": 0.0}, "boot.boundary_share"),
        (Boot, {"boundary_weight": -1.0}, "boot.boundary_weight"),
        (Consistency, {"first_points": 1}, "consistency.first_points"),
        (Consistency, {"first_points": 41}, "consistency.first_points"),
        (ContinuousConsistency, {"steps": ()}, "scm.steps"),
        (ContinuousConsistency, {"tangent_constant": 0.0}, "scm.tangent_constant"),
        (ContinuousConsistency, {"log_std": -1.0}, "scm.log_std"),
        (ContinuousConsistency, {"weight_cap": 0.0}, "scm.weight_cap"),
        (ContinuousConsistency, {"tangent_step": -0.1}, "scm.tangent_step"),
        (ContinuousConsistency, {"tangent_warmup": 1.5}, "scm.tangent_warmup"),
        (ContinuousConsistency, {"guidance_scale": -1.0}, "scm.guidance_scale"),
    ],
)
def test_wrong_fields_are_refused_by_name(kind: type[Distiller], options: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as refused:
        kind(**options)
    method, _, name = field.partition(".")
    assert refused.value.field.startswith(f"{method}.") and name in refused.value.field


def test_more_segments_than_the_clock_has_ticks_are_refused_before_the_first_iteration(shapes: ImageData) -> None:
    teacher = teacher_for("image", shapes)
    teacher.denoiser.schedule = VariancePreserving.from_betas(num_train_timesteps=100)
    with pytest.raises(BadInput, match="points"):
        method = HyperSD()
        method.generator(method.networks(teacher), teacher)


def test_a_signal_that_no_stock_scheduler_draws_is_refused_before_the_first_iteration(
    shapes: ImageData, tmp_path: Path
) -> None:
    """BOOT's head answers x0; diffusers' flow schedulers know only flow."""
    teacher = teacher_for("image", shapes)
    teacher.denoiser.schedule, teacher.denoiser.prediction = RectifiedFlow(), "flow"
    with pytest.raises(BadInput, match="flow"):
        method = Boot()
        method.generator(method.networks(teacher), teacher)
