"""Studies from TOML to table: real trainings in processes of their own, real measurements, all of it tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image
from processes import run
from trainings import NETWORK

from distillers.data import open_data
from distillers.errors import BadInput
from distillers.evaluation.evaluate import evaluate
from distillers.evaluation.options import EvaluationOptions
from distillers.generator import Generator
from distillers.jobs import study as module
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.publish import publish
from distillers.jobs.recipe import Recipe
from distillers.jobs.study import Study, run_study
from distillers.training.trainer import train

SHAPES: dict[str, Any] = {"kind": "shapes", "size": 8}
TRAIN: dict[str, Any] = {"samples": 2, "warmup": 0, "tracker": "none"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield


def make_teacher(folder: Path, task: str, data: dict[str, Any]) -> None:
    table = {"name": folder.name, "method": "diffusion", "data": data, "model": {"task": task, "network": NETWORK}}
    recipe = Recipe.from_table(table)
    opened = load_data(recipe)
    teacher = load_teacher(recipe, opened)
    recipe.distiller().generator(recipe.distiller().networks(teacher), teacher).save_pretrained(folder)


def write_recipe(file: Path, teacher: Path, data: dict[str, Any], **options: Any) -> str:
    table = {"name": file.stem, "method": "consistency", "teacher": str(teacher), "data": data, "train": TRAIN}
    file.write_text(tomli_w.dumps({**table, "consistency": {"solver": "ddim", **options}}))
    return str(file)


def write_study(file: Path, **changes: Any) -> Path:
    file.write_text(tomli_w.dumps(changes))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and four recipes of it: two that train, one that breaks, one on other data."""
    root = tmp_path_factory.mktemp("study")
    teacher = root / "weights" / "tiny-teacher"
    make_teacher(teacher, "class-to-image", SHAPES)
    write_recipe(root / "steps.toml", teacher, SHAPES, steps=[1, 2, 8])
    write_recipe(root / "tuned.toml", teacher, SHAPES, steps=[1, 4], source="data")
    write_recipe(root / "larger.toml", teacher, {**SHAPES, "size": 16})
    write_recipe(root / "foreign.toml", root / "weights" / "another", SHAPES)
    broken = Recipe.load(root / "steps.toml").table() | {"name": "broken"}
    broken["train"] = broken["train"] | {"learning_rate": 1e20, "clip": 1e20}
    (root / "broken.toml").write_text(tomli_w.dumps(broken))
    return root


@pytest.fixture(scope="module")
def keys(place: Path) -> dict[str, Any]:
    return {
        "title": "Tiny",
        "teacher": str(place / "weights" / "tiny-teacher"),
        "students": [str(place / f"{name}.toml") for name in ("steps", "broken", "tuned")],
        "steps": [1, 2, 4],
        "teacher_steps": [3, 2],
        "n": 140,
        "seed": 7,
        "features": "shapes",
        "train": {"iterations": 2, "batch": 4},
        "labels": {"tuned": "tuned without teacher"},
        "own": {"tuned": {"iterations": 3}},
        "rewards": {"green": "distillers.training.reward:greenness"},
    }


@pytest.fixture(scope="module")
def done(place: Path, keys: dict[str, Any]) -> tuple[Path, Any]:
    """The study through the command, and what it answered."""
    study = write_study(place / "tiny.toml", **keys)
    command = [sys.executable, "-m", "distillers.cli", "compare", str(study), "--runs", str(place / "runs")]
    ended = run([*command, "--jobs", "2", "--device", "cpu"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    return study, ended


@pytest.mark.process
def test_one_command_makes_the_table(done: tuple[Path, Any], place: Path) -> None:
    study, ended = done
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert "broken: failed: stopped: the loss of student is not finite" in ended.stderr
    told = json.loads(study.with_suffix(".json").read_text())
    labels = [row["label"] for row in told["rows"]]
    ours = ["steps, 1 step", "steps, 2 steps", "tuned without teacher, 1 step", "tuned without teacher, 4 steps"]
    assert labels == ["real, train split", "teacher, 2 steps", "teacher, 3 steps", *ours]
    assert all(row["n"] == 140 and row["frechet"] > 0 for row in told["rows"]) and told["seeds"] == [7, 146]
    rows = {row["label"]: row for row in told["rows"]}
    for label in ours:
        teacher, row = rows["teacher, 3 steps"], rows[label]
        assert 0.2 < row["speed_up"] * row["latency_ms"]["p50"] / teacher["latency_ms"]["p50"] < 5  # timed twice
    assert set(told["training"]) == {"steps", "tuned"} and set(told["failed"]) == {"broken"}
    for name, cost in told["training"].items():
        assert (cost["iterations"], cost["batch"]) == (2 + (name == "tuned"), 4) and cost["seconds"] > 0
        assert cost == json.loads((place / "runs" / name / "training" / "cost.json").read_text())
    assert told["study"]["students"] == [str(place / f"{name}.toml") for name in ("steps", "broken", "tuned")]
    text = study.with_suffix(".md").read_text()
    assert text in ended.stdout and text.startswith("# Tiny\n")
    assert all(-1 <= row["rewards"]["green"] <= 1 for row in told["rows"])
    heads = "| method | NFE | Frechet | KID x1000 | precision | recall | reward green | p50 ms |"
    heads += " speed-up over the teacher at 3 |"
    assert f"{heads} s per iteration | peak MB | compute s |" in text  # 8 px are too small for SSIM, and no pairs
    assert "train.iterations=2, train.batch=4" in text and "broken is missing: stopped: " in text
    assert "tuned without teacher: train.iterations=3." in text
    with Image.open(study.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and picture.height == 5 * (20 + 8 * 12 + 2 * 2)


@pytest.mark.process
def test_the_figures_are_those_of_the_real_evaluation(done: tuple[Path, Any], place: Path) -> None:
    rows = {row["label"]: row for row in json.loads(done[0].with_suffix(".json").read_text())["rows"]}
    student = Generator.from_pretrained(place / "runs" / "tuned")
    space, data = module.load_features("shapes"), open_data(**{**SHAPES, "split": "test"})
    report = evaluate(student, data, space, EvaluationOptions(n=140, seed=7, steps=[4], latency_repeats=0))
    measured = next(row for row in report.rows if row.role == "student")
    assert rows["tuned without teacher, 4 steps"]["frechet"] == pytest.approx(measured.frechet, rel=1e-6)


@pytest.mark.process
def test_a_second_call_makes_only_what_is_missing_or_was_measured_otherwise(
    done: tuple[Path, Any], place: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, list[int]]] = []
    real = module.evaluate

    def counted(generator: Generator, data: Any, features: Any, options: EvaluationOptions, **more: Any) -> Any:
        measured.append((generator.info.name, list(options.steps or ())))
        return real(generator, data, features, options, **more)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(module, "evaluate", counted)
    monkeypatch.setattr(subprocess, "run", refused)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 1)  # as the command ran
    two = keys | {"students": [keys["students"][0], keys["students"][2]]}
    study = write_study(place / "second.toml", **two)
    assert run_study(study, runs=place / "runs") == {} and measured == []
    first = json.loads(done[0].with_suffix(".json").read_text())
    again = json.loads(study.with_suffix(".json").read_text())
    timed = ("latency_ms", "speed_up")  # anew each time
    kept = [[{k: v for k, v in row.items() if k not in timed} for row in told["rows"]] for told in (first, again)]
    assert kept[0] == kept[1]

    write_study(study, **two | {"steps": [1, 2]})  # of these, "tuned" has one step only
    assert run_study(study, runs=place / "runs") == {} and measured == [("tuned", [1])]
    write_study(study, **two | {"steps": [1, 2], "n": 141})
    (place / "runs" / "steps" / "report.json").write_text('{"half')
    assert run_study(study, runs=place / "runs") == {}
    assert measured[1:] == [("tiny-teacher", [2, 3]), ("steps", [1, 2]), ("tuned", [1])]

    write_study(study, **two | {"train": {"iterations": 3, "batch": 4}})
    with pytest.raises(BadInput, match="move it away") as otherwise:
        run_study(study, runs=place / "runs")
    assert otherwise.value.field == "runs"


def wrong(**changes: Any) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
    return lambda keys, place: {k: v for k, v in (keys | changes).items() if v is not None}


def student(name: str) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
    return lambda keys, place: keys | {"students": [keys["students"][0], str(place / name)]}


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        (wrong(colour=1), "study.colour", "features"),
        (wrong(title=None), "study.title", "given"),
        (wrong(students=None), "study.students", "given"),
        (wrong(students=[]), "study.students", "one recipe or more"),
        (wrong(students="steps"), "study.students", "array"),
        (wrong(students=["nowhere"]), "recipe", "a TOML file or one of"),
        (wrong(students=["shapes-teacher"]), "teacher", "absent"),
        (wrong(steps=[]), "study.steps", "at least one"),
        (wrong(steps=[0]), "study.steps", "1 or more"),
        (wrong(teacher_steps=[2, 2]), "study.teacher_steps", "different"),
        (wrong(teacher_steps=[2000]), "steps", "1 to 1000"),
        (wrong(teacher="nowhere"), "study.students", "students of nowhere"),
        (wrong(n=128), "n", "more than the 128 features"),
        (wrong(n="many"), "study.n", "integer"),
        (wrong(mean_of=4), "mean_of", "SAR"),
        (wrong(features="nonsense"), "features", "shapes"),
        (wrong(train={"batch": 0}), "train.batch", "above 0"),
        (wrong(train={"nonsense": 1}), "train.nonsense", "iterations"),
        (wrong(labels={"stpes": "x"}), "study.labels.stpes", "steps, broken, tuned"),
        (wrong(own={"stpes": {"batch": 1}}), "study.own.stpes", "steps, broken, tuned"),
        (wrong(own={"tuned": {"nonsense": 1}}), "train.nonsense", "iterations"),
        (wrong(rewards={"x": "nowhere:nothing"}), "reward", "module:function"),
        (student("steps.toml"), "study.students", "different names"),
        (student("larger.toml"), "study.students", "'size': 8"),
        (student("foreign.toml"), "study.students", "tiny-teacher"),
    ],
)
def test_studies_that_make_no_table_are_refused_before_anything_is_trained(
    change: Any, field: str, allowed: str, place: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    study = write_study(tmp_path / "wrong.toml", **change(keys, place))
    with pytest.raises(BadInput) as refused:
        run_study(study, runs=tmp_path / "runs")
    assert refused.value.field == field and allowed in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_no_study_and_no_jobs_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a TOML file"):
        Study.load(tmp_path / "nowhere.toml")
    with pytest.raises(BadInput, match="jobs"):
        run_study(place / "tiny.toml", runs=tmp_path / "runs", jobs=0)


def test_translators_have_means_regions_sar_and_truth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("north", "south"):
            for folder, shape in (("sar", (144, 144)), ("opt", (144, 144, 3))):
                (tmp_path / "pairs" / split / folder).mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
                picture.save(tmp_path / "pairs" / split / folder / f"{split}-{name}.png")
    about = [{"id": f"{s}-{name}", "region": name.title()} for s in ("train", "test") for name in ("north", "south")]
    (tmp_path / "pairs" / "metadata.json").write_text(json.dumps(about))
    data = {"kind": "pairs", "path": str(tmp_path / "pairs"), "split": "train", "size": 16}
    teacher = tmp_path / "weights" / "sar-teacher"
    make_teacher(teacher, "sar-to-optical", data)
    recipe = write_recipe(tmp_path / "sar.toml", teacher, data, steps=[1, 2])
    study = write_study(
        tmp_path / "study.toml", title="SAR", teacher=str(teacher), students=[recipe], steps=[1, 2], teacher_steps=[2],
        n=140, features="eurosat-landcover", mean_of=2, train={"iterations": 1, "batch": 2},
    )  # fmt: skip
    (_, plan), folder = Study.load(study).plans()["sar"], tmp_path / "runs" / "sar"
    opened = load_data(plan)
    loaded = load_teacher(plan, opened)
    made = train(plan.distiller(), loaded, opened, plan.settings(), folder / "training", device="cpu")
    publish(made, plan, folder, teacher=loaded, data=opened)
    assert run_study(study, runs=tmp_path / "runs") == {}
    text = study.with_suffix(".md").read_text()
    labels = ["constant colour", "SAR copied to three bands", "teacher, 2 steps", "sar, 1 step, mean of 2"]
    assert [label for label in labels if text.count(f"| {label} |") == 2] == labels, text  # in both tables
    assert "| method | North (n = 70), PSNR |" in text and "Mean of 2:" in text
    told = json.loads(study.with_suffix(".json").read_text())
    mean = next(row for row in told["rows"] if row["label"] == "sar, 1 step, mean of 2")
    assert mean["nfe"] == 2 and mean["speed_up"] is None and set(mean["regions"]) == {"North", "South"}
    with Image.open(study.with_suffix(".png")) as picture:
        assert picture.height == 5 * (20 + 16 * 6 + 2 * 2)  # SAR, teacher, student twice, truth
