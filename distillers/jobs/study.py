"""A study compares recipes that share one teacher, trained with the same iterations and batch, on the same noises.

title = "EuroSAT, 64 px: every method from one teacher"
teacher = "weights/eurosat-teacher"
students = ["eurosat-consistency", "eurosat-boot"]  # shipped recipes or TOML files
steps = [1, 2, 4, 8]                # each student is measured at those of them it publishes
teacher_steps = [50, 250]
n = 1000
seed = 0
features = "eurosat-landcover"
pace = 250                          # speed-ups are over the teacher at so many steps; absent: its most
mean_of = 0                         # translators: also the mean of so many samples of each tile
judge = "avatars"                   # text to image: who says whether pictures show what prompts name; absent: nobody
seeds_per_prompt = 4                # with a judge: pictures of one prompt whose diversity is measured
[train]                             # for every student
iterations = 1000
batch = 32
[labels]                            # recipe name = "what the table calls it"
[own.eurosat-boot]                  # where one student's [train] differs; the page says so
iterations = 500
[rewards]                           # column = "module:function" or a feature classifier's folder; means over pictures
green = "distillers.training.reward:greenness"

Paths are relative to where the command runs. One call makes the whole table, and a second one only what is missing or
was measured otherwise. Every training is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillers.data import ImageData
from distillers.errors import BadInput, check_place, checked
from distillers.evaluation.adherence import load_judge
from distillers.evaluation.evaluate import check_evaluation, evaluate
from distillers.evaluation.features import Features, load_features
from distillers.evaluation.latency import latencies_of
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.reference import real_pictures
from distillers.evaluation.report import (
    QUALITY,
    Column,
    Report,
    Row,
    attribute_table,
    class_table,
    markdown_table,
    region_table,
    reward_columns,
)
from distillers.evaluation.student_drift import describe_course, track_training
from distillers.generator import Generator
from distillers.jobs.inputs import hold_out, load_data, load_teacher
from distillers.jobs.publish import draw_rows
from distillers.jobs.recipe import Recipe, read_toml
from distillers.progress import drawing_bar
from distillers.runtime import cpu_quota, device_name, usable_cores
from distillers.training.reward import judges_of, load_reward
from distillers.training.settings import BESIDE
from distillers.training.stored import SHARED
from distillers.weights.manifest import ADAPTER, read_json
from distillers.weights.write import check_target

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A checked description of a study. `Study.load` reads one from a TOML file."""

    title: str
    teacher: str
    students: tuple[str, ...]
    steps: tuple[int, ...] = (1, 2, 4, 8)
    teacher_steps: tuple[int, ...] = tuple(EvaluationOptions.teacher_steps)
    n: int = EvaluationOptions.n
    seed: int = EvaluationOptions.seed
    features: str = "eurosat-landcover"
    pace: int | None = None
    mean_of: int = EvaluationOptions.mean_of
    judge: str | None = None
    seeds_per_prompt: int = EvaluationOptions.seeds_per_prompt
    train: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewards: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "teacher_steps"):
            counts = getattr(self, name)
            if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
                raise BadInput(f"study.{name}", counts, "different step counts of 1 or more, at least one")
        if not self.students:
            raise BadInput("study.students", self.students, "one recipe or more")

    @classmethod
    def load(cls, file: Path) -> Study:
        """Read a study. Raises BadInput for what is missing, unknown or of the wrong type."""
        if not file.is_file() or file.suffix.lower() != ".toml":  # beside it lie its .json, .md and .png
            raise BadInput("study", str(file), "a TOML file, with a name that ends in .toml")
        table = read_toml(file)
        for name in ("title", "teacher", "students"):
            if name not in table:
                raise BadInput(f"study.{name}", None, f"given: a study has a title, a teacher and students ({file})")
        return cls(**checked(cls, table, "study"))

    def overrides(self, name: str) -> list[str]:
        """List what the study changes in a recipe, as overrides for `fewstep distill`."""
        train = {**self.train, **self.own.get(name, {})}
        return [f"teacher={json.dumps(self.teacher)}", *_assignments(train, "train")]

    def plans(self) -> dict[str, tuple[str, Recipe]]:
        """Load the recipes: name -> (as the study names it, the recipe under the study's settings)."""
        plans: dict[str, tuple[str, Recipe]] = {}
        for student in self.students:
            own = Recipe.load(student)
            plan = Recipe.load(student, self.overrides(own.name))
            if own.teacher is None or Path(own.teacher).name != Path(self.teacher).name:
                raise BadInput(
                    "study.students", f"{student}, of {own.teacher or 'data'}", f"students of {self.teacher}"
                )
            for _, other in plans.values():
                if plan.name == other.name:
                    raise BadInput("study.students", student, "recipes of different names")
                # pairs of pictures have no held-out split: such students are measured on the others' data
                if "preferences" not in (plan.data.get("kind"), other.data.get("kind")) and _source(plan) != _source(
                    other
                ):
                    raise BadInput("study.students", f"{student}, on {_source(plan)}", f"on {_source(other)}")
            plans[plan.name] = (student, plan)
        for table in ("labels", "own"):
            for name, value in getattr(self, table).items():
                if name not in plans:
                    raise BadInput(f"study.{table}.{name}", value, ", ".join(plans))
        return plans


def _assignments(table: dict[str, Any], above: str) -> Iterator[str]:
    """Write a table as `key=value` overrides."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _assignments(value, f"{above}.{key}")
        else:
            yield f"{above}.{key}={json.dumps(value)}"


def _source(recipe: Recipe) -> dict[str, Any]:
    """Return what tells two recipes' data apart."""
    return {key: recipe.data.get(key) for key in ("kind", "path", "size") if key in recipe.data}


def run_study(file: Path, *, runs: Path, device: str = "cpu", jobs: int = 1, say: Say = print) -> dict[str, str]:
    """Train what is missing, measure what is not measured, write FILE's .json, .md and .png.

    Args:
        runs: a folder for each student, and the reports.
        jobs: trainings at a time.

    Returns:
        The students whose training failed, with its last words; the table is of the others.

    Raises:
        BadInput: anything that would make the table wrong or impossible, before the first training.
    """
    if jobs < 1:
        raise BadInput("jobs", jobs, "1 or more")
    study = Study.load(file)
    check_place(file.parent)
    plans = {name: (student, hold_out(plan)) for name, (student, plan) in study.plans().items()}
    sources = [plan for _, plan in plans.values() if plan.data.get("kind") != "preferences"]
    if not sources:
        raise BadInput("study.students", list(plans), "one or more that learn from data with a test split")
    test, train = load_data(sources[0], "test"), load_data(sources[0], "train")
    teacher = Generator.from_pretrained(study.teacher, device)
    space = load_features(study.features, Path(study.teacher).parent)
    rewards = {name: load_reward(which) for name, which in study.rewards.items()}
    judge = load_judge(study.judge, Path(study.teacher).parent, device) if study.judge else None
    options = EvaluationOptions(
        n=study.n,
        seed=study.seed,
        mean_of=study.mean_of,
        rewards=rewards,
        judge=judge,
        seeds_per_prompt=study.seeds_per_prompt,
        latency_repeats=0,
    )
    check_evaluation(teacher, test, space, options)
    for steps in (*study.teacher_steps, *([study.pace] if study.pace is not None else [])):
        teacher.times(steps)
    for _, plan in plans.values():
        load_teacher(plan, train)
        if judge is not None and judge.name in _learns_from(plan):
            allowed = f"another than the network whose reward {plan.name} learns from"
            raise BadInput("study.judge", study.judge, allowed)
        check_target(runs / plan.name, plan.inputs())
        _check_folder(runs / plan.name, plan)

    failed = _train_missing(study, plans, runs, device, jobs, say)
    measure = _Measuring(study, teacher, test, train, space, options, device)
    teacher_steps = tuple(sorted(study.teacher_steps))
    pace = study.pace or teacher_steps[-1]
    report = measure.report(teacher, teacher_steps, runs / f"{teacher.info.name}.report.json", floor=True)
    students = {name: Generator.from_pretrained(runs / name, device) for name in plans if name not in failed}
    reports = {
        name: measure.report(
            student,
            _steps(student, study),
            runs / name / "report.json",
            mean_of=study.mean_of,
            history=runs / name / "training" / "samples",
        )
        for name, student in students.items()
    }
    costs = {name: read_json(runs / name / "training" / "cost.json") for name in students}
    paced = _pace([(teacher, report), *((students[name], reports[name]) for name in students)], pace, test)
    lines = _lines(study, report, reports, costs, paced, runs)
    _write(file, study, report, reports, lines, costs, failed)
    before = "teacher" if teacher.info.role == "teacher" else Path(study.teacher).name
    shown = {f"{before}, {_count(teacher_steps[-1])}": (teacher, teacher_steps[-1])}
    for name, student in students.items():
        counts = sorted(_steps(student, study))
        shown |= {f"{_label(study, name)}, {_count(k)}": (student, k) for k in (counts[0], counts[-1])}
    draw_rows(shown, test, file.with_suffix(".png"))
    return failed


def _learns_from(plan: Recipe) -> set[str]:
    """Name the classifiers of attributes whose rewards a recipe's student learns from."""
    named = getattr(plan.distiller(), "reward", None) or ()
    rewards = [load_reward(name) for name in ((named,) if isinstance(named, str) else named)]
    return judges_of(part for reward in rewards if isinstance(reward, nn.Module) for part in reward.modules())


# --- training
def _train_missing(
    study: Study, plans: dict[str, tuple[str, Recipe]], runs: Path, device: str, jobs: int, say: Say
) -> dict[str, str]:
    """Train every student whose folder is not finished; return the failed ones with their last words."""
    runs.mkdir(parents=True, exist_ok=True)
    environment = {SHARED: str(runs.absolute() / "encoded"), **os.environ}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, int(cpu_quota() or usable_cores()) // jobs))

    def distill(name: str) -> tuple[str, str | None]:
        log = runs / f"{name}.log"
        say(f"{name}: training; what it says goes to {log}")
        command = [sys.executable, "-m", "distillers.cli", "distill", plans[name][0], *study.overrides(name)]
        options = ["--out", str(runs / name), "--device", torch.device(device).type]
        with log.open("w") as file:
            ended = subprocess.run([*command, *options], stdout=file, stderr=subprocess.STDOUT, env=environment)
        if ended.returncode == 0:
            say(f"{name}: trained")
            return name, None
        words = [line for line in log.read_text().splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
        say(f"{name}: failed: {words[-1]}")
        return name, words[-1].strip()

    with ThreadPoolExecutor(jobs) as pool:
        ends = list(pool.map(distill, [name for name in plans if not _finished(runs / name)]))
    return {name: words for name, words in ends if words is not None}


def _finished(folder: Path) -> bool:
    """Say whether a folder is published and its training's cost known."""
    return (folder / "fewstep.json").is_file() and (folder / "training" / "cost.json").is_file()


def _check_folder(folder: Path, plan: Recipe) -> None:
    """Raise BadInput if a finished folder is not what the study would make."""

    def decisive(recipe: Recipe) -> dict[str, Any]:
        return replace(recipe, train={k: v for k, v in recipe.train.items() if k not in BESIDE}).table()

    if _finished(folder) and decisive(Recipe.load(folder / "recipe.toml")) != decisive(plan):
        raise BadInput("runs", str(folder), "a student of this recipe and study; move it away, or choose other --runs")


# --- measuring
@dataclass(frozen=True)
class _Measuring:
    """A measuring of the models of one study, all in the same way."""

    study: Study
    teacher: Generator
    data: ImageData
    learnt: ImageData  # the training split
    features: Features
    options: EvaluationOptions
    device: str

    @cached_property
    def drawn_by_teacher(self) -> Tensor:
        """Draw the 256 pictures that students' samples are compared with, at the study's most steps."""
        teacher, steps = self.teacher, max(self.study.teacher_steps)
        parts = [range(first, first + 64) for first in range(0, 256, 64)]
        return torch.cat([teacher.sample(part, steps=steps, **teacher.condition.in_turn(part)) for part in parts])

    def report(
        self,
        generator: Generator,
        steps: tuple[int, ...],
        kept: Path,
        *,
        floor: bool = False,
        mean_of: int = 0,
        history: Path | None = None,
    ) -> Report:
        """Read a report from `kept` if it was measured in the same way on the same weights; measure it otherwise.

        floor: measure the training split too, against the reference.
        """
        s = self.study
        way = {
            "n": s.n,
            "seed": s.seed,
            "features": s.features,
            "steps": list(steps),
            "mean_of": mean_of,
            "rewards": s.rewards,
            "weights": generator.info.sha256,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
        }
        if (judge := self.options.judge) is not None:
            way |= {"judge": judge.describe(), "seeds_per_prompt": s.seeds_per_prompt}
        stored = _read_report(kept)
        if stored.get("measured") == way:
            return Report.from_dict(stored)
        if history is not None and (self.teacher.condition.paired or not any(history.glob("*.npy"))):
            history = None
        with drawing_bar() as show:
            options = replace(self.options, steps=steps, mean_of=mean_of)
            train = self.learnt if floor or judge is not None else None  # a judge asks which pairs were never learnt
            report = evaluate(generator, self.data, self.features, options, train=train, progress=show)
        if history is not None:
            real, _ = real_pictures(self.data, s.n)
            report.history = track_training(history, real, self.drawn_by_teacher, self.features)
            report.notes += describe_course(report.history)
        stored = {**report.to_dict(), "markdown": report.markdown(), "measured": way}
        kept.write_text(json.dumps(stored, indent=2, allow_nan=False) + "\n")
        return report


def _pace(measured: list[tuple[Generator, Report]], steps: int, data: ImageData) -> float:
    """Time every model at every step count, in turns, into the reports; return the teacher's p50 at `steps`, in ms.

    Latencies are always measured anew, for they depend on the machine's load. The first of `measured` is the teacher.
    """
    rows = [
        (generator, row)
        for generator, report in measured
        for row in report.rows
        if row.steps and row.name == f"{generator.info.role}, {_count(row.steps)}"  # not the mean of some
    ]
    teacher = measured[0][0]
    latencies = latencies_of(
        [(teacher, steps), *((generator, row.steps or 0) for generator, row in rows)], data.items([0])
    )
    for (_, row), latency in zip(rows, latencies[1:], strict=True):
        row.latency_ms = latency
    return latencies[0]["p50"]


def _read_report(file: Path) -> dict[str, Any]:
    """Read a report's JSON; {} if it is absent or broken."""
    try:
        return read_json(file)
    except (OSError, ValueError):  # absent, or half written by a killed process
        return {}


def _steps(student: Generator, study: Study) -> tuple[int, ...]:
    """Return the study's step counts that the student publishes; its default if there is none."""
    published = student.info.step_times or study.steps
    return tuple(k for k in study.steps if k in published) or (student.info.default_steps,)


# --- the table
@dataclass(frozen=True)
class _Line:
    """A line of the table: a model's label, its measurements, speed-up over the teacher, training cost, adapter."""

    label: str
    recipe: str | None
    row: Row
    speed_up: float | None
    cost: dict[str, Any] | None
    adapter_mb: float | None = None

    @property
    def seconds_per_iteration(self) -> float | None:
        """Compute seconds per training iteration, if the cost is known."""
        return self.cost["seconds"] / self.cost["iterations"] if self.cost else None

    @property
    def compute(self) -> float | None:
        """Compute the training's seconds times threads on a CPU, its seconds on a GPU."""
        threads = self.cost["threads"] if self.cost and self.cost["device"].startswith("cpu") else 1
        return self.cost["seconds"] * threads if self.cost else None

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        measured = {k: v for k, v in asdict(self.row).items() if v is not None}
        adapter = {} if self.adapter_mb is None else {"adapter_mb": self.adapter_mb}
        return {**measured, "label": self.label, "recipe": self.recipe, "speed_up": self.speed_up, **adapter}


def _adapter_mb(folder: Path) -> float | None:
    """Return the size of a folder's adapter in MB, None where it holds none."""
    file = folder / ADAPTER
    return file.stat().st_size / 1e6 if file.is_file() else None


def _lines(
    study: Study, teacher: Report, students: dict[str, Report], costs: dict[str, Any], paced: float, runs: Path
) -> list[_Line]:
    """Build the lines: real, baselines, teacher, students in the study's order; speed-ups are over `paced` ms."""

    def speed_up(row: Row) -> float | None:
        return None if row.latency_ms is None else paced / row.latency_ms["p50"]

    own = sorted(teacher.rows, key=lambda row: {"real": 0, "baseline": 1}.get(row.role, 2))
    few = Path(study.teacher).name  # what is tuned may be a student itself
    return [
        *(_Line(row.name.replace("student", few, 1), None, row, None, None) for row in own),
        *(
            _Line(row.name.replace("student", _label(study, name), 1), name, row, speed_up(row), costs[name], size)
            for name, report in students.items()
            for size in [_adapter_mb(runs / name)]
            for row in report.rows
            if row.role == "student"
        ),
    ]


def _write(
    file: Path,
    study: Study,
    teacher: Report,
    students: dict[str, Report],
    lines: list[_Line],
    costs: dict[str, Any],
    failed: dict[str, str],
) -> None:
    """Write FILE.json and FILE.md."""
    reports = {Path(study.teacher).name: teacher, **students}
    notes = [*teacher.notes, *_notes(study, students, failed)]
    stored = {
        "title": study.title,
        "study": asdict(study),
        "rows": [line.to_dict() for line in lines],
        "training": costs,
        "settings": {name: report.setting for name, report in reports.items()},
        "features": teacher.features,
        "task": teacher.task,
        "data": teacher.data,
        "split": teacher.split,
        "n": teacher.n,
        "seeds": teacher.seeds,
        "notes": notes,
        "failed": failed,
    }
    file.with_suffix(".json").write_text(json.dumps(stored, indent=2, allow_nan=False) + "\n")
    pace = f"speed-up over the teacher at {study.pace or max(study.teacher_steps)}"
    quality: list[Column[_Line]] = [(head, _of_row(value), form) for head, value, form in QUALITY]
    columns: list[Column[_Line]] = [
        ("method", lambda line: line.label, ""),
        *quality,
        *((head, _of_row(value), form) for head, value, form in reward_columns([line.row for line in lines])),
        ("p50 ms", lambda line: line.row.latency_ms and line.row.latency_ms["p50"], ".1f"),
        (pace, lambda line: line.speed_up, ".1f"),
        ("adapter MB", lambda line: line.adapter_mb, ".2f"),
        ("s per iteration", lambda line: line.seconds_per_iteration, ".3f"),
        ("peak MB", lambda line: line.cost and line.cost["peak_memory_mb"], ".0f"),
        ("compute s", lambda line: line.compute, ".0f"),
    ]
    parts = [f"# {study.title}", f"![samples]({file.with_suffix('.png').name})", markdown_table(columns, lines)]
    if by_attribute := attribute_table([(line.label, line.row) for line in lines]):
        parts += ["Found of what prompts name, %:", by_attribute]
    if by_region := region_table([(line.label, line.row) for line in lines], "method"):
        parts += ["By region:", by_region]
    if by_class := class_table([(line.label, line.row) for line in lines]):
        parts += ["KID x1000 by class, each against the real pictures of that class:", by_class]
    parts += ["\n".join([teacher.conditions(), *notes])]
    parts += [
        f"`fewstep compare {file.name if file.is_absolute() else file.as_posix()}` makes this page, its picture and "
        f"{file.with_suffix('.json').name} again."
    ]
    file.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def _of_row(value: Callable[[Row], Any]) -> Callable[[_Line], Any]:
    """Turn a column of rows into one of lines."""
    return lambda line: value(line.row)


def _notes(study: Study, students: dict[str, Report], failed: dict[str, str]) -> list[str]:
    """Write the notes under the table."""
    trained = ", ".join(_assignments(study.train, "train")) or "as in the recipes"
    own = "".join(f" {_label(study, k)}: {', '.join(_assignments(v, 'train'))}." for k, v in study.own.items())
    notes = [
        f"Training of every student: {trained}; all else as in its recipe.{own} Seconds are those of iterations alone; "
        "compute is seconds times threads on a CPU, seconds on a GPU; peak MB is the whole process on a CPU, tensors "
        "on a GPU.",
        "Latencies are of one picture, warm; all models took turns, so the speed-ups are of one run.",
    ]
    if study.mean_of and any("mean of" in row.name for report in students.values() for row in report.rows):
        notes.append(f"Mean of {study.mean_of}: the mean of so many samples of one tile. It is no sample of anything.")
    missing = [name for name, report in students.items() if not any(row.steps in study.steps for row in report.rows)]
    notes += [
        f"{_label(study, name)} publishes none of the steps asked for; its own were measured." for name in missing
    ]
    for name, report in students.items():
        notes += [f"{_label(study, name)}: {line}" for line in describe_course(report.history)]
    return notes + [f"{_label(study, name)} is missing: {words}" for name, words in failed.items()]


def _label(study: Study, name: str) -> str:
    """Return what the table calls a recipe."""
    return study.labels.get(name, name)


def _count(steps: int) -> str:
    """Write a step count in words."""
    return f"{steps} step{'s' * (steps > 1)}"
