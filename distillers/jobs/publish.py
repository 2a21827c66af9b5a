"""Publishing writes a trained generator as a folder: weights, manifest, recipe, picture, card.

The card is written from the manifest, the recipe and the report alone, so that every number on it was measured.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from distillers.autoencoder import Autoencoder
from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.evaluation.pictures import grid_png, side_by_side
from distillers.evaluation.self_check import write_reference
from distillers.generator import Generator
from distillers.jobs.card import write_card
from distillers.jobs.inputs import held_out_data, load_data
from distillers.jobs.recipe import Recipe
from distillers.models.codec import Vae, fold_shift
from distillers.models.denoiser import Denoiser
from distillers.models.lora import NAME, attach, network_digest
from distillers.models.schedule import VariancePreserving
from distillers.runtime import package_versions
from distillers.teacher import Teacher
from distillers.weights.lora_file import read_lora
from distillers.weights.manifest import SAMPLERS, Info
from distillers.weights.network import guided, null_class_last
from distillers.weights.read import origin, read_autoencoder
from distillers.weights.write import check_target, lcm_times, staged, write_pipeline

COLUMNS = 10  # of grid.png
PACKAGES = ("fewstep", "torch", "diffusers", "accelerate", "peft", "numpy")  # whose versions recipe.toml records


def publish(
    made: Generator | Autoencoder,
    recipe: Recipe,
    folder: Path,
    *,
    teacher: Teacher | None,
    data: ImageData | None,
    iteration: int | None = None,
    autoencoder: str | None = None,
) -> None:
    """Write a published folder: weights, manifest, recipe, picture, reference picture and card.

    It is written beside `folder` and then takes its place; `fewstep.json` comes last, so a folder that is found is
    whole.

    Args:
        teacher: the teacher that it was distilled from; None for a teacher or an autoencoder.
        data: what it was trained on; None for students that are merged without their data.
        iteration: where the training stood, if it had not ended; the recipe and the card say so.
        autoencoder: whose takes the place of the one that it was trained with; the recipe and the card say so.
    """
    if autoencoder is not None:
        put_autoencoder(made, autoencoder)
    made.info = manifest(made.info, recipe, teacher, data)
    with staged(folder) as new:
        stood: dict[str, Any] = {} if iteration is None else {"iteration": iteration}
        stood |= {} if autoencoder is None else {"autoencoder": autoencoder}
        recipe.write(new / "recipe.toml", {"python": platform.python_version(), **package_versions(*PACKAGES), **stood})
        made.save_pretrained(new)
        if isinstance(made, Autoencoder):
            if data is not None:
                reconstructions(made, recipe, data, new / "grid.png")
        else:
            above = None
            if teacher is not None:
                above = Generator(teacher.denoiser, teacher.codec, teacher.info, teacher.prompts).eval().to("cpu")
            picture(made, above, held_out_data(recipe) if made.condition.from_data else None, new)
            write_reference(made, new)
        write_card(new)


def manifest(info: Info, recipe: Recipe, teacher: Teacher | None, data: ImageData | None) -> Info:
    """Build the manifest of what a recipe has made, from the teacher's with the student's way of sampling."""
    return replace(
        info,
        name=recipe.name,
        method=recipe.method,
        role="teacher" if teacher is None else "student",
        data=info.data if data is None else data.name,
        teacher=None if teacher is None else teacher.info.name,
        sha256={},
    )


def adopt(
    pipeline: str | Path,
    folder: Path,
    steps: Sequence[int],
    sampler: str,
    guidance: float | None,
    null_class: int | None = None,
    lora: Path | None = None,
    times: Sequence[float] = (),
    autoencoder: str | None = None,
) -> str:
    """Make a folder that can be served out of a pipeline that others have trained; return what it draws, in words.

    Args:
        steps: a few-step model's, at the times where stock schedulers take them; empty: a teacher, any number.
        sampler: of a few-step model: "consistency" or "ddim".
        guidance: None: 1 for a few-step model, else the pipeline's own.
        null_class: the row of a U-Net's class embedding that stands for no class, for guidance; the classes behind it
            are one less afterwards. None: all rows are classes.
        lora: a few-step LoRA of the pipeline, as a file; the folder is then an adapter's, without its base.
        times: those of one more number of steps, where they are not the stock scheduler's.
        autoencoder: a folder or hub id whose autoencoder takes the place of the pipeline's.

    Raises:
        BadInput: naming the argument; a LoRA that is not the pipeline's, or changes its text encoders too.
    """
    if lora is not None and not (steps or times):
        raise BadInput("steps", None, "with lora: the steps it was distilled for, such as 4")
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise BadInput("times", list(times), "descending times")
    if len(set(steps)) < len(steps):
        raise BadInput("steps", steps, "different step counts")
    if sampler not in SAMPLERS:
        raise BadInput("sampler", sampler, ", ".join(SAMPLERS))
    check_target(folder, [pipeline])
    generator = Generator.from_pretrained(pipeline)
    if autoencoder is not None:
        if lora is not None:
            raise BadInput("autoencoder", autoencoder, "none with lora: the folder of an adapter has no autoencoder")
        put_autoencoder(generator, autoencoder)
    info = replace(generator.info, name=folder.name, sha256={})
    if null_class is not None:
        null_class_last(generator.denoiser.network, null_class)
        numbered, labels = info.labels == list(map(str, range(len(info.labels)))), list(info.labels)
        del labels[null_class]
        info = replace(info, labels=list(map(str, range(len(labels)))) if numbered else labels)
    if steps or times:
        lcm = sampler == "consistency" and isinstance(generator.schedule, VariancePreserving)
        found = {n: lcm_times(generator.schedule, n) if lcm else generator.times(n) for n in steps}  # type: ignore[arg-type]
        found |= {len(times): list(times)} if times else {}
        if times and not generator.schedule.t_min <= min(times) <= max(times) <= generator.schedule.t_max:
            raise BadInput("times", list(times), f"{generator.schedule.t_min:g} to {generator.schedule.t_max:g}")
        sampling = {"role": "student", "method": "adopted", "sampler": sampler, "guidance_scale": 1.0}
        info = replace(info, **sampling, step_times=found, default_steps=min(found))  # type: ignore[arg-type]
    generator.info = info if guidance is None else replace(info, guidance_scale=guidance)
    guided(generator.denoiser, generator.info, generator.info.guidance_scale)  # refused here, not when served
    if lora is None:
        generator.save_pretrained(folder)
    else:
        _save_adapter(generator, pipeline, lora, folder)
    height, width = info.size
    counts = ", ".join(map(str, info.step_times))
    return f"{info.task}, {width}x{height}, " + (f"steps {counts}" if counts else "any steps")


def put_autoencoder(made: Generator | Autoencoder, path_or_hub_id: str) -> None:
    """Replace a generator's autoencoder by another one of the same latents, such as a smaller one that learnt them.

    Raises:
        BadInput: latents of other channels or sides, or a generator that has no autoencoder.
    """
    codec, bands = read_autoencoder(path_or_hub_id)[0], made.info.channels
    if not (isinstance(made, Generator) and isinstance(made.codec, Vae)):
        raise BadInput("autoencoder", path_or_hub_id, f"none: {made.info.name} does not draw in latents")
    given, own = ((each.channels(bands), each.factor) for each in (codec, made.codec))
    if given != own:
        has, wanted = (f"{channels} channels at 1/{factor} of the side" for channels, factor in (given, own))
        raise BadInput("autoencoder", f"{path_or_hub_id}, whose latents are {has}", wanted)
    made.codec = fold_shift(codec) if made.prompts is not None else codec


def _save_adapter(generator: Generator, base: str | Path, lora: Path, folder: Path) -> None:
    """Write the folder of an adapter out of a file of others, as `write_pipeline` does with one of ours."""
    network = generator.denoiser.network
    if generator.prompts is None or not isinstance(generator.denoiser, Denoiser):
        raise BadInput("lora", str(lora), "nothing: adapters of others are for text to image")
    if (place := Path(base)).exists() and not (
        (beside := folder.absolute().parent / place.name).is_dir() and beside.samefile(place)
    ):
        raise BadInput(
            "pipeline", str(base), f"with lora: a folder beside {folder}, where it is looked for, or a hub id"
        )
    origin_of_base = replace(origin(str(base)), sha256=network_digest(network))
    state = read_lora(lora, network, generator.prompts)
    part = generator.prompts.family.part
    if set(state) != {part}:
        raise BadInput(str(lora), f"layers of {', '.join(sorted(state))}", f"a few-step LoRA, of {part} alone")
    attach(network, state[part], NAME, str(lora))
    info = replace(generator.info, teacher=place.name)
    write_pipeline(folder, generator.denoiser, generator.codec, info, origin=origin_of_base)


def picture(generator: Generator, teacher: Generator | None, data: ImageData | None, folder: Path) -> None:
    """Draw grid.png: a row for every step count, the teacher above on the same noises and conditions.

    For translators the columns are held-out SAR tiles, which also go to examples/*.png, ready to send.
    """
    models = [model for model in (teacher, generator) if model is not None]
    draw_rows({_row(model, k): (model, k) for model in models for k in _shown(model)}, data, folder / "grid.png")
    condition = generator.condition
    if data is not None:
        for name, grey in condition.files(condition.of_items(data.items(_columns(data)))).items():
            grid_png(grey[None], columns=1, path=folder / "examples" / name, gap=0)


def reconstructions(autoencoder: Autoencoder, recipe: Recipe, data: ImageData, path: Path) -> None:
    """Draw a PNG of originals above their reconstructions, from the held-out split where the data have one."""
    try:
        data, name = load_data(recipe, "test"), "originals, held out"
    except BadInput:
        name = "originals, learnt from"
    originals = data.items(_columns(data))["image"]
    rows = {name: originals, "reconstructions": autoencoder.reconstruct(originals)}
    side_by_side(rows, path, zoom=max(1, 96 // originals.shape[-1]))


def draw_rows(models: Mapping[str, tuple[Generator, int]], data: ImageData | None, path: Path) -> None:
    """Draw a PNG with a labelled row for each (model, steps), on the same noises and conditions.

    Translators have the SAR above and the truth below.

    data: where translators take their SAR from; other models ignore it.
    """
    last = list(models.values())[-1][0]
    condition, below = last.condition, {}
    if condition.from_data and data is not None:
        items = data.items(_columns(data))
        given = condition.of_items(items)
        below = {"optical, the truth": items["image"]} if condition.paired else {}
    else:
        given = condition.spread(COLUMNS)
    made = {row: model.sample(range(COLUMNS), steps=k, **given) for row, (model, k) in models.items()}
    side_by_side({**condition.pictures(given), **made, **below}, path, zoom=max(1, 96 // last.info.size[0]))


def _columns(data: ImageData) -> list[int]:
    """Choose the items of the columns, evenly over the data."""
    return [i * len(data) // COLUMNS for i in range(COLUMNS)]


def _row(generator: Generator, steps: int) -> str:
    """Return the label of a row."""
    return f"{generator.info.role}, {steps} step{'s' * (steps > 1)}"


def _shown(generator: Generator) -> list[int]:
    """Return the step counts that get a row."""
    return sorted(generator.info.step_times) or [generator.info.default_steps]
