"""Every method on every family of text to image, whole and as an adapter; and the recipes that ship for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_captioned
from stock_pipelines import build

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.distill import with_head
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.publish import manifest
from distillers.jobs.recipe import Recipe, shipped
from distillers.training.trainer import begin

FAMILIES = ("sd", "sdxl", "lcm", "sd3", "flux", "pixart", "sana")
METHODS = ("consistency", "scm", "dmd2", "hyper_sd", "boot", "disback")
OF = {"sd15": "sd of noise", "sdxl": "sdxl", "sd35": "sd3", "flux1": "flux"}  # what a recipe is for
TINY = (
    "train.iterations=2",
    "train.batch=2",
    "train.accumulation=1",
    "train.warmup=1",
    "train.samples=1",
    "data.flip=false",
)
SIDE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("pictures"), count=6, side=SIDE)


def drawn(folder: Path) -> torch.Tensor:
    return Generator.from_pretrained(folder).sample([0], prompts=["a red circle"])


def learn(recipe: Recipe, folder: Path) -> None:
    """Two iterations, and the folder without what else is published: pictures, card, latencies."""
    data = load_data(recipe)
    teacher = with_head(load_teacher(recipe, data), recipe, data, folder / "training", "cpu")
    run = begin(recipe.distiller(), teacher, recipe.settings(), folder / "training", device="cpu")
    for i in range(2):
        run.iteration(i, data)
    made = run.generator()
    run.close()
    assert isinstance(made, Generator)
    made.info = manifest(made.info, recipe, teacher, data)
    made.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_takes_the_family(family: str, pictures: Path, tmp_path: Path) -> None:
    build(family, tmp_path / "teacher")
    for method in METHODS:
        made = []
        for lora in ({}, {"lora": {"rank": 2}}):
            table: dict[str, Any] = {
                "name": "student", "method": method, "teacher": str(tmp_path / "teacher"), **lora,
                "data": {"kind": "captions", "path": str(pictures), "flip": False, "size": SIDE},
                "train": {"iterations": 2, "batch": 2, "warmup": 1, "samples": 1, "learning_rate": 1e-2},
            }  # fmt: skip
            recipe, out = Recipe.from_table(table), tmp_path / f"{method}-{len(lora)}"
            if method == "boot" and family in ("sd3", "flux", "sana"):
                with pytest.raises(BadInput, match="flow"):
                    learn(recipe, out)
                continue
            learn(recipe, out)
            made.append(drawn(out))
            assert made[-1].isfinite().all() and made[-1].shape == (1, 3, SIDE, SIDE), (method, lora)
        if len(made) == 2:
            assert not torch.equal(*made), f"{method}: an adapter learns otherwise than a whole network"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped() if name.partition("-")[0] in OF])
def test_the_recipes_for_large_teachers_run_on_small_ones(name: str, pictures: Path, tmp_path: Path) -> None:
    build(OF[name.partition("-")[0]], tmp_path / "teacher")
    table = [
        f"teacher={tmp_path / 'teacher'}",
        f"data.path={pictures}",
        f"data.size={SIDE}",
        "lora.rank=2",
        *TINY,
    ]
    learn(Recipe.load(name, table), tmp_path / "student")
    assert drawn(tmp_path / "student").isfinite().all()
