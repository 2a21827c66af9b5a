"""Students of a teacher that predicts noise get another head and start: tests of distillers/training/head.py."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import draw_with_diffusers, unet
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.distill import distill, with_head
from distillers.jobs.inputs import load_data
from distillers.jobs.recipe import Recipe
from distillers.methods.boot import Boot
from distillers.methods.consistency import Consistency
from distillers.methods.diffusion import Diffusion
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.multi_student import MultiStudent
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import EDM, NoiseSchedule, RectifiedFlow, Trigonometric, VariancePreserving
from distillers.teacher import Teacher
from distillers.training.distiller import new_student
from distillers.training.head import HeadFit, StudentSettings, check_start, head_of, usable
from distillers.training.losses import denoising
from distillers.training.settings import TrainSettings
from distillers.training.toy import Points, StudentNetwork, exact_teacher, ring
from distillers.training.trainer import begin

VP = VariancePreserving.from_betas()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock DDPM: linear betas, noise predicted."""
    folder = tmp_path_factory.mktemp("teacher") / "ddpm"
    DDPMPipeline(unet(), cast(Any, DDPMScheduler())).save_pretrained(folder)
    return folder


def recipe(pipeline: Path, method: str = "consistency", student: dict[str, Any] | None = None, **own: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "mine",
        "method": method,
        "teacher": str(pipeline),
        "data": {"kind": "shapes", "size": 8},
        "train": {"iterations": 2, "batch": 4, "samples": 1, "tracker": "none"},
        "student": {"head_iterations": 3, **(student or {})},
    }
    return Recipe.from_table(table | ({method: own} if own else {}))


# --- a schedule with an earlier end ----------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [VP, EDM(), RectifiedFlow(), Trigonometric()], ids=lambda s: s.name)
def test_an_earlier_end_changes_nothing_before_it(schedule: NoiseSchedule) -> None:
    end = 400.0 if schedule.name == "vp" else (schedule.t_min + schedule.t_max) / 2
    shorter = schedule.until(end)
    assert shorter.t_max == end and shorter.t_min == schedule.t_min
    t = torch.linspace(schedule.t_min, end, 50, dtype=torch.float64)
    torch.testing.assert_close(shorter.alpha(t), schedule.alpha(t), atol=1e-9, rtol=0)
    torch.testing.assert_close(shorter.sigma(t), schedule.sigma(t), atol=1e-9, rtol=0)
    assert float(shorter.grid(5)[-1]) == pytest.approx(end)
    with pytest.raises(BadInput, match="t_max"):
        schedule.until(2 * schedule.t_max)


# --- what the student predicts ---------------------------------------------------------------------------------------
def test_the_students_of_a_network_of_noise_predict_v_where_the_schedule_ends_in_noise(pipeline: Path) -> None:
    teacher, auto = Teacher.from_pretrained(pipeline), StudentSettings()
    assert teacher.denoiser.prediction == "eps"
    for method in (Consistency(), Dmd2(), HyperSD(), MultiStudent()):
        assert head_of(auto, method, teacher) == "v", method
    for method in (Boot(), MultiStudent(base="boot")):  # a free head; as its base
        assert head_of(auto, method, teacher) == "eps", method
    assert head_of(auto, Consistency(), teacher, adapters=True) == "eps"
    assert head_of(StudentSettings(head="teacher"), Consistency(), teacher) == "eps"
    assert head_of(StudentSettings(head="x0"), Consistency(), teacher) == "x0"
    with pytest.raises(BadInput, match=r"student\.head"):
        head_of(StudentSettings(head="v"), Boot(), teacher)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_other_teachers_have_students_of_their_own_kind(prediction: Any) -> None:
    schedule = RectifiedFlow() if prediction == "flow" else VP
    teacher = Teacher(Denoiser(unet(), schedule, prediction), cast(Any, None), cast(Any, None))
    assert head_of(StudentSettings(), Consistency(), teacher) == prediction
    assert usable(teacher.denoiser) is schedule


def test_stable_diffusions_noise_is_not_so_loud_that_its_head_must_change() -> None:
    schedule = VariancePreserving.from_betas("scaled_linear", 0.00085, 0.012)
    denoiser = Denoiser(unet(), schedule, "eps")
    assert usable(denoiser) is schedule and float(schedule.noise_ratio(torch.tensor(999.0))) < 20


def test_times_that_are_the_networks_own_error_are_left_out() -> None:
    """At DDPM's last time an error of the output is 157 times as large in x0; where the usable part ends, 17 times."""
    left = usable(Denoiser(unet(), VP, "eps"))
    assert float(VP.noise_ratio(torch.tensor(999.0))) == pytest.approx(157, abs=1)
    assert left.t_max == 749 and float(left.noise_ratio(torch.tensor(left.t_max))) == pytest.approx(17.2, abs=0.1)
    x_t, t = torch.randn(8, 3, 8, 8), torch.tensor(left.t_max)
    output, error = torch.randn_like(x_t), 0.01 * torch.randn_like(x_t)
    moved = {
        kind: float((left.x0_from(kind, output + error, x_t, t) - left.x0_from(kind, output, x_t, t)).std() / 0.01)
        for kind in ("eps", "v")
    }
    assert moved["eps"] == pytest.approx(17.2, rel=0.1) and moved["v"] == pytest.approx(1, rel=0.1)


def test_a_network_of_noise_is_trained_with_the_loss_of_its_output() -> None:
    """min(SNR, cap) |x0 - x0_theta|^2 is |eps - eps_theta|^2 at noisy times, whatever the time."""
    network = unet()
    denoiser, x0, eps = Denoiser(network, VP, "eps"), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.full((4,), 980.0)
    x_t = VP.add_noise(x0, eps, t)
    with torch.no_grad():
        loss = float(denoising(denoiser, x_t, t, x0, None))
        output = denoiser.output(x_t, t)
    assert loss == pytest.approx(float((output - eps).square().mean()), rel=1e-3)


# --- the fit ---------------------------------------------------------------------------------------------------------
class Clocked(nn.Module):
    """The toy's network reads DDPM's clock: 1000 timesteps are a quarter of its slowest wave."""

    def __init__(self) -> None:
        super().__init__()
        self.own = StudentNetwork(frequencies=4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return cast(Tensor, self.own(x, time * (math.pi / 2 / 1000)))


@pytest.mark.slow
def test_the_fit_starts_the_student_as_its_teacher(tmp_path: Path) -> None:
    """A network of noise that knows the ring, and its copy that predicts v: the same x0 at every usable time."""
    torch.manual_seed(0)
    mixture = ring()
    mixture.schedule = VP
    exact = exact_teacher(mixture)
    taught = Teacher(Denoiser(Clocked(), VP, "eps"), exact.codec, exact.info)
    taught = replace(exact, denoiser=taught.denoiser)
    settings = TrainSettings(iterations=1500, batch=256, learning_rate=1e-2, decay="cosine", clip=10.0, tracker="none")

    def trained(distiller: Any, teacher: Teacher, count: int) -> Denoiser:
        run = begin(distiller, teacher, replace(settings, iterations=count), tmp_path, device="cpu")
        for i in range(count):
            run.iteration(i, Points(mixture))
        run.close()
        return cast(Denoiser, run.averages["student"])

    teacher = replace(exact, denoiser=trained(Diffusion(), taught, 1500))
    learner = trained(HeadFit(prediction="v"), teacher, 800)
    left = usable(teacher.denoiser)
    assert learner.prediction == "v" and learner.schedule.t_max == left.t_max
    x0, errors, spread = mixture.sample(2000, torch.Generator().manual_seed(1)), {}, {}
    unfitted = Denoiser(teacher.denoiser.network, left, "v")
    for share in (0.25, 0.5, 0.75, 1.0):
        t = left.spaced(torch.tensor(share, dtype=torch.float64))
        x_t = left.add_noise(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            errors[share] = float((learner(x_t, t) - teacher.denoiser(x_t, t)).square().mean().sqrt())
            spread[share] = float((unfitted(x_t, t) - teacher.denoiser(x_t, t)).square().mean().sqrt())
    assert max(errors.values()) < 0.15, errors
    assert min(spread[share] / errors[share] for share in spread) > 3, (errors, spread)


# --- whole jobs ------------------------------------------------------------------------------------------------------
@pytest.mark.process
def test_a_student_of_a_stock_ddpm_predicts_v_and_stock_diffusers_draws_it(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(recipe(pipeline, student={"start_time": 599.0}, steps=[1, 2, 4]), tmp_path / "mine", "cpu")
    assert "predicts v in place of eps; its x0 is off by" in " ".join(capsys.readouterr().out.split())
    scheduler = json.loads((tmp_path / "mine/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["num_train_timesteps"] == 600
    generator = Generator.from_pretrained(tmp_path / "mine")
    assert generator.times(1) == [599.0] and max(generator.times(4)) == 599.0
    done = draw_with_diffusers(tmp_path, tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "mine.npz")
    for steps in (1, 2, 4):
        ours = generator.sample([0, 1], steps=steps)
        theirs = torch.from_numpy(drawn[f"steps_{steps}"]).permute(0, 3, 1, 2)
        assert ours.std() > 0.1
        torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["consistency", "adversarial_consistency", "dmd2", "hyper_sd", "disback", "scm"])
def test_every_method_starts_its_student_with_the_fitted_head(method: str, pipeline: Path, tmp_path: Path) -> None:
    plan = recipe(pipeline, method, {"start_time": 499.0})
    found = Teacher.from_pretrained(pipeline)
    teacher = with_head(found, plan, load_data(plan), tmp_path, "cpu")
    nets = plan.distiller().networks(teacher)
    assert nets["student"].prediction == "v" and nets["student"].schedule.t_max == 499
    if "critic" in nets:  # it reads the student's samples at every usable time
        assert nets["critic"].prediction == "v" and nets["critic"].schedule.t_max == 749
    batch = {"x0": torch.rand(2 * plan.distiller().draws(0.99), 3, 8, 8) * 2 - 1}
    for player, loss in plan.distiller().step(nets, batch, 0.99):
        assert torch.isfinite(loss), player


def test_a_training_that_began_with_the_teachers_own_head_is_not_read_as_another(
    pipeline: Path, tmp_path: Path
) -> None:
    """Its checkpoint holds weights that predict noise: read as v they would be noise, without a word."""
    plan = recipe(pipeline, student={"head": "teacher"})
    with pytest.warns(UserWarning, match="predicts noise"):
        distill(plan, tmp_path / "mine", "cpu")
    (tmp_path / "mine/fewstep.json").unlink()
    teacher, data = Teacher.from_pretrained(pipeline), load_data(plan)
    with pytest.raises(BadInput, match=r"student\.head.*teacher, for the training in"):
        with_head(teacher, recipe(pipeline), data, tmp_path / "mine/training", "cpu")


def test_a_finished_head_is_not_trained_again(pipeline: Path, tmp_path: Path) -> None:
    plan = recipe(pipeline)
    teacher, data = Teacher.from_pretrained(pipeline), load_data(plan)
    first = with_head(teacher, plan, data, tmp_path, "cpu").initial
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "head" / "checkpoints").rglob("*")}
    second = with_head(teacher, plan, data, tmp_path, "cpu").initial
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert written and all(file.stat().st_mtime_ns == time for file, time in written.items())


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [0.0, 1200.0, 999.0])
def test_a_start_outside_the_usable_times_is_refused(start: float, pipeline: Path) -> None:
    with pytest.raises(BadInput, match=r"student\.start_time.*1 to 749"):
        check_start(StudentSettings(start_time=start), Teacher.from_pretrained(pipeline))


def test_a_start_that_stock_schedulers_would_move_is_refused(pipeline: Path) -> None:
    with pytest.raises(BadInput, match=r"student\.start_time: got 410.*one less than a multiple of 50"):
        check_start(StudentSettings(start_time=410.0), Teacher.from_pretrained(pipeline))


def test_a_start_is_refused_where_no_stock_scheduler_can_begin_there() -> None:
    teacher = Teacher(Denoiser(unet(), RectifiedFlow(), "flow"), cast(Any, None), cast(Any, None))
    with pytest.raises(BadInput, match=r"student\.start_time.*absent"):
        check_start(StudentSettings(start_time=0.5), teacher)


@pytest.mark.parametrize(
    ("table", "field"),
    [({"head": "flow"}, "student.head"), ({"begin": 3}, "student.begin"), ({"head_iterations": -1}, "head_iterations")],
)
def test_wrong_settings_are_refused_by_name(table: dict[str, Any], field: str, pipeline: Path) -> None:
    with pytest.raises(BadInput, match=field):
        recipe(pipeline, student=table)


def test_a_student_that_goes_on_predicting_noise_is_warned_of_with_the_number(pipeline: Path, tmp_path: Path) -> None:
    plan = recipe(pipeline, student={"head": "teacher"})
    teacher, data = Teacher.from_pretrained(pipeline), load_data(plan)
    teacher = with_head(teacher, plan, data, tmp_path, "cpu")
    assert teacher.initial.prediction == "eps"
    with pytest.warns(UserWarning, match="17 times as large in the picture"):
        begin(Consistency(), teacher, plan.settings(), tmp_path, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(Consistency(), replace(teacher, start_time=599), plan.settings(), tmp_path, device="cpu")
        begin(Boot(), teacher, plan.settings(), tmp_path, device="cpu")  # its free head predicts the signal


def test_new_student_keeps_the_start_of_its_teacher(pipeline: Path) -> None:
    teacher = replace(Teacher.from_pretrained(pipeline), start_time=399.0)
    assert new_student(teacher).schedule.t_max == 399
