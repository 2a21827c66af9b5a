"""A whole job: from a recipe to a published folder, and from the students of one teacher to one folder.

A recipe of several students is several trainings, each a job of its own that may run anywhere. Here they run one after
another; what is finished is not made again, so a job that was stopped goes on where it stood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distillers.autoencoder import Autoencoder
from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.publish import publish, splits
from distillers.jobs.recipe import Recipe
from distillers.methods.multi_student import NAME, MultiStudent
from distillers.models.denoiser import Denoiser, Routed
from distillers.training.latents import encoded_once
from distillers.training.trainer import begin, newest_checkpoint, train
from distillers.training.watch import best_iteration
from distillers.weights.manifest import MANIFEST, Info


def distill(recipe: Recipe, folder: Path, device: str | None = None) -> None:
    """Train what a recipe describes and publish it as `folder`; what it does meanwhile is below folder/training.

    Several students that no job was told apart are trained one after another, each published as
    folder/training/student-k, and merged.

    Args:
        device: "cpu", or None for the GPU where there is one.

    Raises:
        BadInput: whatever the recipe, its teacher, its data or the folder cannot do.
        TrainingStopped: as `train`; the same call goes on.
    """
    from accelerate import PartialState

    students = one_by_one(recipe)
    if not students:
        _train(recipe, folder, device)
        return
    places = [folder / "training" / f"student-{k}" for k in range(len(students))]
    for student, place in zip(students, places, strict=True):
        if not _finished(place, student):
            _train(student, place, device)
    if PartialState().is_main_process:
        merge(places, folder)


def named(recipe: Recipe) -> Recipe:
    """The recipe under the name of what it makes: one student of several is called NAME-student-k."""
    k = recipe.options.get("student") if recipe.method == NAME else None
    method = recipe.distiller()
    if k is None or not isinstance(method, MultiStudent) or method.students == 1:
        return recipe
    return replace(recipe, name=_common(recipe).name + f"-student-{k}")


def one_by_one(recipe: Recipe) -> list[Recipe]:
    """The recipes of all students, where a recipe has several and says nothing of which; else none."""
    method = recipe.distiller()
    if not isinstance(method, MultiStudent) or method.students == 1 or method.student is not None:
        return []
    return [named(replace(recipe, options={**recipe.options, "student": k})) for k in range(method.students)]


def _common(recipe: Recipe) -> Recipe:
    """What the recipes of all students have in common."""
    options = {key: value for key, value in recipe.options.items() if key != "student"}
    return replace(recipe, name=recipe.name.removesuffix(f"-student-{recipe.options.get('student')}"), options=options)


def _train(recipe: Recipe, folder: Path, device: str | None) -> None:
    """One training, published by the first process while the others wait."""
    from accelerate import PartialState

    whole, method, settings = recipe.open_data(), recipe.distiller(), recipe.settings()
    teacher = recipe.open_teacher(whole)
    data = method.data(whole, teacher)
    seen = encoded_once(data, teacher.codec)
    made = train(
        method, teacher, seen, settings, folder / "training", description=recipe.table(), device=device,
        held_out=method.data(held_out_data(recipe), teacher) if settings.watch_every else None,
    )  # fmt: skip
    if isinstance(method, MultiStudent) and method.students > 1:
        made.info = replace(made.info, shares=[method.share(teacher)])
    if PartialState().is_main_process:
        if isinstance(made, Autoencoder):
            made.standardise(spread(data))
        publish(made, recipe, data, folder)
    PartialState().wait_for_everyone()


def spread(data: ImageData, pictures: int = 4096, batch: int = 64) -> Iterator[Tensor]:
    """Yield batches (B, 3, H, W) in [-1, 1] of at most so many pictures, evenly spread over the data."""
    count = min(pictures, len(data))
    places = [i * len(data) // count for i in range(count)]
    for start in range(0, count, batch):
        yield data.items(places[start : start + batch])["image"]


def held_out_data(recipe: Recipe) -> ImageData:
    """The test split of a recipe's data; the training data themselves where there is none."""
    try:
        return splits(recipe)[0]
    except BadInput:
        return recipe.open_data()


def publish_run(run: Path, folder: Path, which: str = "last") -> str:
    """Publish the averaged weights of a training from its newest checkpoint, without training on.

    Args:
        run: the folder of a `distill`, or its training/ folder.
        which: "last", or "best" by the watch.

    Returns:
        What was published, in words.

    Raises:
        BadInput: no checkpoint there, no watched weights, or a student of several, which `merge` needs whole.
    """
    if which not in ("last", "best"):
        raise BadInput("which", which, "last or best")
    place = run / "training" if (run / "training").is_dir() else run
    found = newest_checkpoint(place)
    if found is None:
        raise BadInput("run", str(run), "the folder of a training with a checkpoint")
    about = json.loads((found / "about.json").read_text())
    recipe = Recipe.from_table(about["description"])
    if recipe.method == NAME:
        raise BadInput("run", str(run), f"a training of another method: students of {NAME} are published when they end")
    whole, method = recipe.open_data(), recipe.distiller()
    teacher = recipe.open_teacher(whole)
    state = begin(method, teacher, recipe.settings(), place, description=recipe.table(), device="cpu")
    done = state.resume()
    if which == "best":
        done = best_iteration(place)
    state.close()
    made, data = state.generator(which), method.data(whole, teacher)  # type: ignore[arg-type]
    if isinstance(made, Autoencoder):
        made.standardise(spread(data))
    publish(made, recipe, data, folder, iteration=done)
    return f"the averages of iteration {done} of {recipe.settings().iterations}"


def _finished(folder: Path, recipe: Recipe) -> bool:
    """BadInput if another recipe made what is there."""
    if not (folder / MANIFEST).is_file():
        return False
    if Recipe.load(folder / "recipe.toml").table() != recipe.table():
        raise BadInput(str(folder), "a student of another recipe", "a folder that this recipe made, or none")
    return True


# --- students of one teacher, as one ---------------------------------------------------------------------------------
ALIKE = ("teacher", "task", "sampler", "step_times", "labels", "codec", "patch", "size", "data")


def merge(folders: Sequence[Path], out: Path) -> None:
    """Publish students of one recipe, whose shares cover every class once, as one folder that routes by class.

    Raises:
        BadInput: a folder that is no student of a share; one that differs from the first in anything but its share; a
            class that two students have, or none.
    """
    if not folders:
        raise BadInput("folders", [], "the folders of all students")
    for folder in folders:
        info = Info.read(folder)
        if info.method != NAME or len(info.shares) != 1:
            raise BadInput(str(folder), f"a folder of {info.method}", f"one student of a share, made by {NAME}")
    opened = [Generator.from_pretrained(folder) for folder in folders]
    recipes = [_common(Recipe.load(folder / "recipe.toml")) for folder in folders]
    first, owner = opened[0].info, dict[int, Path]()
    for folder, generator, recipe in zip(folders, opened, recipes, strict=True):
        for key in ALIKE:
            if (given := getattr(generator.info, key)) != (wanted := getattr(first, key)):
                raise BadInput(f"{folder}: {key}", given, f"{wanted}, as in {folders[0]}")
        if (given := recipe.table()) != recipes[0].table():
            differing = [
                key for key in {**given, **recipes[0].table()} if given.get(key) != recipes[0].table().get(key)
            ]
            raise BadInput(f"{folder}: recipe.toml", differing, f"the recipe of {folders[0]} but for the student")
        for label in generator.info.shares[0]:
            if label in owner:
                allowed = f"no class of {owner[label]}, such as {first.labels[label]}"
                raise BadInput(f"{folder}: shares", generator.info.shares[0], allowed)
            owner[label] = folder
    if missing := [name for label, name in enumerate(first.labels) if label not in owner]:
        raise BadInput("folders", list(map(str, folders)), "students of all classes, also of " + ", ".join(missing))

    shares = sorted(generator.info.shares[0] for generator in opened)
    by_share = sorted(opened, key=lambda generator: generator.info.shares[0])
    denoisers = [d for generator in by_share if isinstance(d := generator.denoiser, Denoiser)]
    info = replace(first, name=recipes[0].name, shares=shares, lora=None, sha256={})
    merged = Generator(Routed(denoisers, shares), opened[0].codec, info).eval()
    publish(merged, recipes[0], None, out)
    _add_costs([folder / "training" / "cost.json" for folder in folders], out / "training" / "cost.json")


def _add_costs(files: Sequence[Path], out: Path) -> None:
    """What all trainings took: their sum, and the most memory that one of them took. Nothing where one is unknown."""
    if not all(file.is_file() for file in files):
        return
    costs: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    whole = {**costs[0], **{key: sum(cost[key] for cost in costs) for key in ("iterations", "seconds")}}
    whole["peak_memory_mb"] = max(cost["peak_memory_mb"] for cost in costs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=2) + "\n")
