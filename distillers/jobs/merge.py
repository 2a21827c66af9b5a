"""Several students of one teacher become one folder that routes each picture to the student of its class or prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.publish import publish
from distillers.jobs.recipe import Recipe
from distillers.models.denoiser import Denoiser, Routed
from distillers.teacher import Teacher
from distillers.weights.manifest import Info, read_json
from distillers.weights.write import check_target

ALIKE = ("teacher", "task", "sampler", "step_times", "labels", "codec", "patch", "size", "data")


def merge(folders: Sequence[Path], out: Path) -> None:
    """Publish students of one recipe, whose shares cover every class or cluster of prompts once, as one that routes.

    Raises:
        BadInput: a folder that is no student of a share; one that differs from the first in anything but its share; a
            class or cluster that two students have, or none.
    """
    if not folders:
        raise BadInput("folders", [], "the folders of all students")
    recipes = [_recipe_of_job(folder) for folder in folders]
    check_target(out, [*folders, *recipes[0].inputs()])
    opened = [Generator.from_pretrained(folder) for folder in folders]
    first, owner = opened[0].info, dict[int, Path]()
    names = first.clusters.examples if first.clusters else first.labels
    for folder, generator, recipe in zip(folders, opened, recipes, strict=True):
        for key in ALIKE:
            if (given := getattr(generator.info, key)) != (wanted := getattr(first, key)):
                raise BadInput(f"{folder}: {key}", given, f"{wanted}, as in {folders[0]}")
        if (given := recipe.table()) != recipes[0].table():
            differing = [
                key for key in {**given, **recipes[0].table()} if given.get(key) != recipes[0].table().get(key)
            ]
            raise BadInput(f"{folder}: recipe.toml", differing, f"the recipe of {folders[0]} but for the student")
        if (clusters := generator.info.clusters) is not None:
            assert first.clusters is not None  # of one task
            if replace(clusters, students=[]) != replace(first.clusters, students=[]):
                raise BadInput(f"{folder}: clusters", "others", f"the clusters of prompts of {folders[0]}")
        for share in generator.info.part:
            if share in owner:
                allowed = f"no {'cluster' if first.clusters else 'class'} of {owner[share]}, such as {names[share]}"
                raise BadInput(f"{folder}: shares", generator.info.part, allowed)
            owner[share] = folder
    if missing := [name for share, name in enumerate(names) if share not in owner]:
        raise BadInput("folders", list(map(str, folders)), "students of all classes, also of " + ", ".join(missing))

    shares = sorted(generator.info.part for generator in opened)
    by_share = sorted(opened, key=lambda generator: generator.info.part)
    denoisers = [d for generator in by_share if isinstance(d := generator.denoiser, Denoiser)]
    if first.clusters is None:
        info = replace(first, name=recipes[0].name, shares=shares, lora=None, sha256={})
    else:
        whole = replace(first.clusters, students=list(range(len(opened))))
        info = replace(first, name=recipes[0].name, clusters=whole, lora=None, sha256={})
    routed = Routed(denoisers, info.clusters or info.shares)
    merged = Generator(routed, opened[0].codec, info, opened[0].prompts).eval()
    assert recipes[0].teacher is not None  # who learns from data alone has no share
    publish(merged, recipes[0], out, teacher=Teacher.from_pretrained(recipes[0].teacher), data=None)
    _add_costs([folder / "training" / "cost.json" for folder in folders], out / "training" / "cost.json")


def _recipe_of_job(folder: Path) -> Recipe:
    """Read the recipe of the job that a student's folder is a part of. Raises BadInput for any other folder."""
    info = Info.read(folder)
    if info.part:
        recipe = Recipe.load(folder / "recipe.toml")
        if recipe.method == info.method and recipe.whole() != recipe:
            return recipe.whole()
    raise BadInput(str(folder), f"a folder of {info.method}", "one student of a share, made by multi_student")


def _add_costs(files: Sequence[Path], out: Path) -> None:
    """Write the sum of what all trainings took, and the most memory of one. Nothing is written if one is unknown."""
    if not all(file.is_file() for file in files):
        return
    costs: list[dict[str, Any]] = [read_json(file) for file in files]
    whole = {**costs[0], **{key: sum(cost[key] for cost in costs) for key in ("iterations", "seconds")}}
    whole["peak_memory_mb"] = max(cost["peak_memory_mb"] for cost in costs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=2) + "\n")
