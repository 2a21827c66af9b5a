"""The head of a student is what its network predicts: a teacher of noise gets students of velocity.

x0 = (x_t - sigma eps) / alpha multiplies an error of eps by sigma / alpha, 157 at the last time of DDPM's linear
schedule, where a one-step student is called; of v it is sigma. A network of noise therefore learns to predict v first,
by teacher score matching: its target is the teacher's own x0 (stage one of Meng, Rombach, Gao, Kingma, Ermon, Ho and
Salimans, "On Distillation of Guided Diffusion Models", 2023). Stock diffusers knows both predictions, so nothing has to
be undone when the student is published. Times whose noise is over 20 times the signal are left out altogether: the
teacher's x0 is its own error there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import EDM, NoiseSchedule, Prediction, VariancePreserving
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, split_batch, trainable_copy
from distillers.training.losses import score_matching, teacher_samples
from distillers.training.settings import TrainSettings
from distillers.weights.write import LCM_POINTS

NOISE_LIMIT = 20.0  # sigma / alpha, above which the x0 of a network of noise is mostly its error
WARN_ABOVE = 10.0  # of the same, where a student that predicts noise starts
SAMPLE_STEPS = 8  # of the teacher, where there are no pictures to learn a head on
LAST_SHARE = 0.1  # of the samples, at the last time: the only one that a one-step student is called at


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The [student] table of a recipe, checked when it is built. Raises BadInput naming the field."""

    head: Literal["auto", "teacher", "v", "x0"] = "auto"  # auto: v where the teacher predicts noise and ends in it
    head_iterations: int = 0  # in which the network learns its head; 0 = a tenth of train.iterations, 200 at least
    start_time: float | None = None  # where sampling starts, in the teacher's t; absent: the end of its schedule

    def __post_init__(self) -> None:
        if self.head_iterations < 0:
            raise BadInput("student.head_iterations", self.head_iterations, "0 or more")


def usable(denoiser: Denoiser) -> NoiseSchedule:
    """Return the part of a teacher's schedule in which its x0 is not mostly error: all of it unless it predicts eps."""
    schedule = denoiser.schedule
    if denoiser.prediction != "eps":
        return schedule
    end = float(schedule.time_at_ratio(torch.tensor(NOISE_LIMIT)))
    if end >= schedule.t_max:
        return schedule
    return schedule.until((end + 1) // LCM_POINTS * LCM_POINTS - 1 if end >= LCM_POINTS else end)


def head_of(student: StudentSettings, distiller: Distiller, teacher: Teacher, adapters: bool = False) -> Prediction:
    """Choose what the students of a teacher predict. Adapters predict what the network does that they are on."""
    fits = distiller.fits_head and not adapters
    own = teacher.denoiser.prediction
    if student.head == "auto":
        return "v" if fits and usable(teacher.denoiser) is not teacher.denoiser.schedule else own
    if student.head == "teacher" or student.head == own:
        return own
    if not fits:
        allowed = "teacher: an adapter, or this method's student, cannot start with another head"
        raise BadInput("student.head", student.head, allowed)
    return student.head


def check_start(student: StudentSettings, teacher: Teacher) -> None:
    """Raise BadInput for a start time that the teacher's schedule does not have, or that no folder can tell."""
    if student.start_time is None:
        return
    schedule = usable(teacher.denoiser)
    if isinstance(schedule, EDM):
        if not schedule.t_min < student.start_time <= schedule.t_max:
            allowed = f"a sigma above {schedule.t_min:g}, up to {schedule.t_max:g}, or absent for the last"
            raise BadInput("student.start_time", student.start_time, allowed)
        return
    if not isinstance(schedule, VariancePreserving):
        raise BadInput("student.start_time", student.start_time, f"absent: schedules of {schedule.name} have one start")
    if not 1 <= student.start_time <= schedule.t_max:
        raise BadInput("student.start_time", student.start_time, f"1 to {schedule.t_max:g}, or absent for the last")
    if (student.start_time + 1) % LCM_POINTS:  # LCMScheduler starts at a multiple of its points, whatever the clock
        allowed = f"one less than a multiple of {LCM_POINTS}, such as 399, where diffusers' LCMScheduler can start"
        raise BadInput("student.start_time", student.start_time, allowed)


def warn_of_noise(generator: Generator) -> None:
    """Warn of a few-step generator that predicts noise, with the factor of its errors where it starts."""
    if not generator.info.step_times or generator.denoiser.prediction != "eps":
        return
    start = max(map(max, generator.info.step_times.values()))
    factor = float(generator.schedule.noise_ratio(torch.tensor(start)))
    if factor > WARN_ABOVE:
        warnings.warn(
            f"the student predicts noise: at t = {start:g}, where its first step is, an error of its output is "
            f"{factor:.0f} times as large in the picture. An earlier student.start_time makes that less",
            stacklevel=2,
        )


@dataclass(frozen=True, kw_only=True)
class HeadFit(Distiller):
    """E (min(SNR, 20) + 1) || x0_learner(x_t, t) - x0_teacher(x_t, t) ||^2, with the learner's own prediction type."""

    prediction: Prediction
    pictures: bool = True  # False: in place of the data's, samples of the teacher in SAMPLE_STEPS steps

    @property
    def needs_pictures(self) -> bool:
        return self.pictures

    def networks(self, teacher: Teacher) -> Networks:
        own = teacher.denoiser
        learner = Denoiser(own.network, usable(own), self.prediction)
        return Networks({"student": trainable_copy(learner), "teacher": frozen(own)})

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        schedule = nets["student"].schedule
        x0, cond = split_batch(batch)
        if not self.pictures:
            x0 = teacher_samples(nets["teacher"], torch.randn_like(x0), cond, SAMPLE_STEPS, schedule=schedule)
        t = schedule.spaced(torch.rand(len(x0), device=x0.device, dtype=torch.float64))
        t = t.masked_fill(torch.rand(len(x0), device=x0.device) < LAST_SHARE, schedule.t_max)
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        yield "student", score_matching(nets["student"], nets["teacher"], x_t, t, cond)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        info = replace(teacher.info, sampler="ddim", step_times={}, default_steps=20)
        return Generator(nets["student"], teacher.codec, info, teacher.prompts)


def fit_settings(settings: TrainSettings, student: StudentSettings) -> TrainSettings:
    """Make the settings of the fit from those of the training that follows."""
    iterations = student.head_iterations or max(200, settings.iterations // 10)
    return replace(
        settings,
        iterations=iterations,
        learning_rates=None,
        warmup=min(settings.warmup, iterations // 10),
        decay="cosine",
        ema=min(settings.ema, 0.99),
        samples=1,
        sample_every=0,
        watch_every=0,
        publish="last",
    )


@torch.no_grad()
def head_errors(learner: Denoiser, teacher: Teacher, data: ImageData, count: int = 64) -> dict[float, float]:
    """Measure how far a learner's x0 is from its teacher's: root mean square, by time (four of them, ascending)."""
    items = data.items(range(min(count, len(data))))
    batch = teacher.encode_batch(items, next(learner.parameters()).device)
    x0, cond = split_batch(batch)
    schedule, errors = learner.schedule, {}
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    if not data.pictured:
        x0 = teacher_samples(teacher.denoiser, noise, cond, SAMPLE_STEPS, schedule=schedule)
    for share in (0.25, 0.5, 0.75, 1.0):
        t = schedule.spaced(torch.tensor(share, dtype=torch.float64))
        x_t = schedule.add_noise(x0, noise, t)
        gap: Tensor = learner(x_t, t, cond) - teacher.denoiser(x_t, t, cond)
        errors[round(float(t), 3)] = float(gap.square().mean().sqrt())
    return errors
