"""Every folder in weights/, as it is published: whole, small, honest on its card, and open to stock diffusers."""

import json
import os
import re
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from draw_with_diffusers import COUNT, PROMPTS, labels_of, ramp
from processes import run
from safetensors import safe_open

from distillers.data import read_sar
from distillers.generator import Generator
from distillers.jobs.recipe import Recipe, shipped
from distillers.models.radiometry import Radiometry
from distillers.models.schedule import VariancePreserving
from distillers.weights.manifest import Info, draws, find, verify

ROOT = Path(os.environ.get("FEWSTEP_WEIGHTS", Path(__file__).parents[1] / "weights"))
FOLDERS = {name: folder for name, folder in find(ROOT).items() if draws(folder)}
AUTOENCODERS = {name: folder for name, folder in find(ROOT).items() if name not in FOLDERS}
LIMITS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["fewstep"]["limits"]
HARMLESS = (
    "[transformers] `CLIPImageProcessor` requires torchvision", "[transformers] `SiglipImageProcessor` requires",
    "No LoRA keys associated to CLIPTextModel",  # an adapter of the network alone
)  # fmt: skip
SCRIPT = Path(__file__).parent / "draw_with_diffusers.py"

pytestmark = pytest.mark.skipif(not FOLDERS, reason="weights/ holds no published folder (fewstep distill makes one)")


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return FOLDERS[request.param]


@pytest.fixture(params=FOLDERS | AUTOENCODERS)
def whichever(request: pytest.FixtureRequest) -> Path:
    """Also a folder that draws nothing."""
    return (FOLDERS | AUTOENCODERS)[request.param]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What stock diffusers drew from every folder in a process that cannot import us, and what it said meanwhile."""
    out = tmp_path_factory.mktemp("drawn")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(out), *map(str, FOLDERS.values())]
    done = run(command, env=environment, cwd=out)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def condition_of(info: Info) -> dict[str, Any]:
    """What COUNT pictures of a model are to show."""
    return {
        "class-to-image": lambda: {"labels": labels_of(asdict(info))},
        "sar-to-optical": lambda: {"sar": ramp(info.sar_channels, *info.size)},
        "text-to-image": lambda: {"prompts": PROMPTS},
    }.get(info.task, dict)()


def published(folder: Path) -> list[Path]:
    """The folder's files; training/ is not published."""
    return [path for path in folder.rglob("*") if path.is_file() and "training" not in path.relative_to(folder).parts]


@pytest.mark.process
def test_stock_diffusers_draws_the_same_pictures(folder: Path, stock: tuple[Path, str]) -> None:
    generator = Generator.from_pretrained(folder)
    drawn = np.load(stock[0] / f"{folder.name}.npz")
    assert drawn.files
    for key in drawn.files:
        ours = generator.sample(range(COUNT), steps=int(key.removeprefix("steps_")), **condition_of(generator.info))
        theirs = torch.from_numpy(drawn[key]).permute(0, 3, 1, 2)
        torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3, rtol=0)


@pytest.mark.process
def test_stock_diffusers_has_nothing_to_warn_about(stock: tuple[Path, str]) -> None:
    said = [line for line in stock[1].splitlines() if not line.startswith(HARMLESS)]
    assert not said


def test_every_weight_is_half_precision_and_listed(whichever: Path) -> None:
    info = Info.read(whichever)
    verify(whichever, info)
    tensors = [path for path in published(whichever) if path.suffix == ".safetensors"]
    assert tensors and {str(path.relative_to(whichever)) for path in tensors} <= set(info.sha256)
    for path in tensors:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds == {"F16"}


def test_nothing_that_runs_on_opening_is_in_the_folder(whichever: Path) -> None:
    allowed = {".safetensors", ".json", ".md", ".png", ".toml"}
    assert {path.suffix for path in published(whichever)} <= allowed


def test_the_folders_are_small(whichever: Path) -> None:
    assert sum(path.stat().st_size for path in published(whichever)) < LIMITS["folder"] * 1e6


def test_all_folders_together_are_small() -> None:
    folders = (FOLDERS | AUTOENCODERS).values()
    assert sum(path.stat().st_size for one in folders for path in published(one)) < LIMITS["weights"] * 1e6


def test_the_manifest_makes_sense(folder: Path) -> None:
    info = Info.read(folder)
    assert info.name == folder.name and info.data
    assert bool(info.labels) == (info.task == "class-to-image") and len(set(info.labels)) == len(info.labels)
    assert (info.sar is not None) == (info.task == "sar-to-optical")
    assert info.role == ("student" if info.teacher else "teacher")
    if info.role == "student":
        assert info.teacher in FOLDERS or info.teacher in shipped()  # published, or made by one command
        if info.teacher in FOLDERS:
            assert FOLDERS[info.teacher] != folder
            teacher = Info.read(FOLDERS[info.teacher])
            same = ("task", "data", "size", "labels", "sar", "patch", "codec")
            assert [getattr(info, key) for key in same] == [getattr(teacher, key) for key in same]
        assert info.default_steps == min(info.step_times)
        for times in info.step_times.values():
            assert times == sorted(times, reverse=True) and times[0] > 900
    else:
        assert not info.step_times and info.sampler == "ddim" and 1 < info.default_steps <= 250
    schedule = Generator.from_pretrained(folder).schedule
    assert isinstance(schedule, VariancePreserving)


def test_it_draws_at_its_default_steps(folder: Path) -> None:
    generator = Generator.from_pretrained(folder)
    info = generator.info
    told = {"labels": [0, len(info.labels) - 1]} if info.labels else condition_of(info)
    pictures = generator.sample([0, 1], **told)
    assert pictures.shape == (2, 3, *info.size) and bool(torch.isfinite(pictures).all())
    assert pictures.std() > 0.02 and not torch.equal(pictures[0], pictures[1])
    assert float((pictures.abs() == 1).float().mean()) < 0.9  # not saturated


def test_the_recipe_makes_this_folder(whichever: Path) -> None:
    recipe, info = Recipe.load(whichever / "recipe.toml"), Info.read(whichever)
    assert (recipe.name, recipe.method) == (info.name, info.method)
    assert (Path(recipe.teacher).name if recipe.teacher else None) == info.teacher


def test_the_card_shows_the_picture_and_the_report(whichever: Path) -> None:
    """What stands under "Measured" is what report.json and calibration.json print, and nothing else."""
    card = (whichever / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"]  # the front matter that model hubs read
    assert (whichever / "grid.png").is_file() and "(grid.png)" in card
    measured = card.split("## Measured\n")[1].split("\n## ")[0].strip()
    if not (whichever / "report.json").is_file():
        assert not re.search(r"\d", measured)
        return
    printed = [whichever / name for name in ("report.json", "calibration.json") if (whichever / name).is_file()]
    assert all((whichever / name).is_file() for name in re.findall(r"!\[\w+\]\((.+?)\)", measured))
    without_pictures = re.sub(r"!\[\w+\]\(.+?\)", "", measured)
    assert without_pictures.split() == "\n".join(json.loads(file.read_text())["markdown"] for file in printed).split()


def test_no_path_of_the_training_machine_is_published(whichever: Path) -> None:
    for path in published(whichever):
        if path.suffix in (".json", ".md", ".toml") and path.parent.name != "tokenizer":
            assert not re.search(r'"(/|[A-Z]:\\)|/(home|root|Users|tmp)/', path.read_text()), path


def test_a_translator_ships_sar_to_try(folder: Path) -> None:
    examples = sorted((folder / "examples").glob("*.png"))
    if Info.read(folder).task != "sar-to-optical":
        assert not examples
        return
    assert len(examples) >= 4
    sar = read_sar(examples[0], Radiometry.of(Info.read(folder).sar))
    assert Generator.from_pretrained(folder).translate(sar).shape == (1, 3, *sar.shape[-2:])
