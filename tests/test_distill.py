"""A whole job, from a recipe to a folder: what the manifest of the folder says, for each kind of job there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainings import NETWORK

from distillers.data import open_data
from distillers.jobs.distill import distill
from distillers.jobs.recipe import Recipe

TRAIN = {"iterations": 2, "batch": 4, "samples": 1, "tracker": "none"}
DATA = {"kind": "shapes", "size": 8}
LABELS = open_data("shapes", size=8).labels
SHARES = [list(range(12)), list(range(12, 24))]
COMMON = {
    "task": "class-to-image",
    "data": "shapes",
    "size": [8, 8],
    "labels": list(LABELS),
    "codec": "pixel-unshuffle",
    "patch": 1,
    "guidance_scale": 1.0,
    "sar": None,
    "format": 1,
}
STUDENT = COMMON | {"role": "student", "teacher": "tiny"}


def manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's fewstep.json but for the hashes of its weights, which differ between processors."""
    entries: dict[str, Any] = json.loads((folder / "fewstep.json").read_text())
    assert entries.pop("sha256")
    return entries


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    table = {"name": "tiny", "method": "diffusion", "data": DATA, "train": TRAIN}
    model = {"task": "class-to-image", "network": NETWORK}
    distill(Recipe.from_table(table | {"model": model, "diffusion": {"sampling_steps": 3}}), folder, "cpu")
    return folder


def test_a_teacher_is_described_by_its_own_recipe(teacher: Path) -> None:
    assert manifest(teacher) == COMMON | {
        "name": "tiny",
        "method": "diffusion",
        "role": "teacher",
        "sampler": "ddim",
        "step_times": {},
        "default_steps": 3,
        "teacher": None,
    }


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "consistency",
            {"steps": [1, 2]},
            {"sampler": "consistency", "step_times": {"1": [999.0], "2": [999.0, 499.0]}, "default_steps": 1},
        ),
        ("boot", {}, {"sampler": "ddim", "step_times": {"1": [0.0]}, "default_steps": 1}),
        (
            "hyper_sd",
            {"segments": [2], "points": 4, "adversarial_weights": [0.0]},
            {
                "sampler": "ddim",
                "step_times": {"2": [999.0, 499.0]},
                "default_steps": 2,
                "lora": {"rank": 2, "base": "tiny"},
            },
        ),
        (
            "pso",
            {"mode": "finetune", "steps": 2},
            {"sampler": "ddim", "step_times": {}, "default_steps": 2, "lora": {"rank": 2, "base": "tiny"}},
        ),
    ],
)
def test_a_student_is_described_by_its_recipe_and_names_its_teacher(
    method: str, options: dict[str, Any], said: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    table = {"name": "mine", "method": method, "teacher": str(teacher), "data": DATA, "train": TRAIN, method: options}
    if "lora" in said:
        table["lora"] = {"rank": 2}
    distill(Recipe.from_table(table), tmp_path / "other-name", "cpu")
    assert manifest(tmp_path / "other-name") == STUDENT | {"name": "mine", "method": method} | said


def test_students_of_shares_are_described_alone_and_together(teacher: Path, tmp_path: Path) -> None:
    options = {"students": 2, "base": "consistency", "options": {"steps": [1]}}
    table = {"name": "pair", "method": "multi_student", "teacher": str(teacher), "data": DATA, "train": TRAIN}
    distill(Recipe.from_table(table | {"multi_student": options}), tmp_path / "pair", "cpu")
    alike = STUDENT | {
        "method": "multi_student",
        "sampler": "consistency",
        "step_times": {"1": [999.0]},
        "default_steps": 1,
    }
    assert manifest(tmp_path / "pair") == alike | {"name": "pair", "shares": SHARES}
    for k, share in enumerate(SHARES):
        one = manifest(tmp_path / "pair" / "training" / f"student-{k}")
        assert one == alike | {"name": f"pair-student-{k}", "shares": [share]}


def test_an_autoencoder_is_described_by_its_own_recipe(tmp_path: Path) -> None:
    options = {"channels": [8, 8], "adversarial_start": 1.0}
    table = {"name": "vae", "method": "autoencoder", "data": DATA, "train": TRAIN, "autoencoder": options}
    distill(Recipe.from_table(table), tmp_path / "vae", "cpu")
    assert manifest(tmp_path / "vae") == COMMON | {
        "name": "vae",
        "task": "autoencoder",
        "method": "autoencoder",
        "role": "teacher",
        "sampler": "ddim",
        "step_times": {},
        "default_steps": 1,
        "labels": [],
        "codec": "vae",
        "patch": 2,
        "teacher": None,
    }
