"""Commands that make weights folders: distill, plan, publish, merge, adopt, suggest-student, methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distillers.cli.arguments import Device, device_of, step_counts
from distillers.errors import BadInput


def distill(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: a TOML file, or the name of a shipped one (`fewstep methods`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. train.batch=32 teacher=weights/mine", metavar="[KEY=VALUE]..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; weights/<name of the recipe> if left out.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train what a recipe describes and publish it as a weights folder.

    Stop it whenever you like: the same command goes on from its last checkpoint (under OUT/training). A recipe of
    several students trains them one after another and merges them; with `multi_student.student=1` that one alone.

    Examples: `fewstep distill eurosat-consistency`,
    `fewstep distill weights/eurosat-consistency/recipe.toml train.seed=1 --out weights/second`.
    """
    from accelerate import PartialState

    from distillers.jobs.distill import distill as make
    from distillers.jobs.recipe import Recipe

    plan = Recipe.load(recipe, overrides).named()
    folder = out or Path("weights") / plan.name
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput("device", device, "auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU")
    make(plan, folder, "cpu" if device_of(device) == "cpu" else None)
    is_main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main:
        return
    typer.echo(f"{folder}: {len(list(folder.rglob('*')))} files; samples in {folder / 'grid.png'}")


def plan(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: a TOML file, or the name of a shipped one (`fewstep methods`).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for distill", metavar="[KEY=VALUE]...")
    ] = None,
    device_memory: Annotated[float | None, typer.Option(help="Of the device, in GB; says what to change.")] = None,
    devices: Annotated[int, typer.Option(help="Over how many train.shard=true splits the networks.", min=1)] = 1,
) -> None:
    """Tell what memory a training takes, for each network, before anything is loaded or downloaded.

    Weights, gradients, the optimizer's state and averages are exact; activations are an estimate.

    Example: `fewstep plan mine.toml teacher=stabilityai/stable-diffusion-xl-base-1.0 --device-memory 24`.
    """
    from distillers.jobs.plan import told_plan
    from distillers.jobs.recipe import Recipe

    if device_memory is not None and not device_memory > 0:
        raise BadInput("device-memory", device_memory, "a number of GB above 0")
    typer.echo(told_plan(Recipe.load(recipe, overrides), device_memory, devices))


def publish(
    run: Annotated[Path, typer.Argument(help="The OUT folder of a `fewstep distill`.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The weights folder to make.", show_default=False)],
    which: Annotated[str, typer.Option(help="last, or best: by the watch's Frechet distance.")] = "last",
    autoencoder: Annotated[
        str | None, typer.Option(help="A folder with another autoencoder of the same latents.", show_default=False)
    ] = None,
) -> None:
    """Publish a training as it stands, whether it is still running, was stopped or has ended.

    Example: `fewstep publish runs/eurosat-teacher weights/eurosat-teacher --which best`.
    """
    from distillers.jobs.distill import publish_run

    typer.echo(f"{out}: {publish_run(run, out, which, autoencoder)}; samples in {out / 'grid.png'}")


def merge(
    students: Annotated[list[Path], typer.Argument(help="The folders of all students.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
) -> None:
    """Make one folder of the students of one recipe: every class or prompt is drawn by the student that has it.

    Example: `fewstep merge weights/mine-student-0 weights/mine-student-1 --out weights/mine`.
    """
    from distillers.jobs.merge import merge as make

    make(students, out)
    typer.echo(f"{out}: {len(students)} students; samples in {out / 'grid.png'}")


def adopt(
    pipeline: Annotated[str, typer.Argument(help="A diffusers pipeline: a folder or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The weights folder to make.", show_default=False)],
    steps: Annotated[
        str | None,
        typer.Option(help="Of a few-step model: the steps it was distilled for, with commas.", show_default=False),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="consistency re-noises between steps (LCM, Turbo); ddim does not.")
    ] = "consistency",
    guidance: Annotated[
        float | None, typer.Option(help="Scale; 1 with --steps, else the pipeline's own.", show_default=False)
    ] = None,
    null_class: Annotated[
        int | None,
        typer.Option(help="Of a U-Net with classes: the row that stands for none, for guidance.", show_default=False),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="A few-step LoRA of the pipeline; the folder is then its alone.", show_default=False),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(help="Of a few-step model: the times of its steps, if they are its own.", show_default=False),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="A folder or hub id with another autoencoder of the same latents.", show_default=False),
    ] = None,
) -> None:
    """Make a folder that can be served out of a pipeline that others have trained, at float16 if that holds it.

    Example: `fewstep adopt stabilityai/sdxl-turbo weights/sdxl-turbo --steps 1,2,4`.
    """
    from distillers.jobs.publish import adopt as make

    counts, own = step_counts("steps", steps) if steps else [], _times(times) if times else []
    name = make(pipeline, out, counts, sampler, guidance, null_class, lora, own, autoencoder)
    typer.echo(f"{out}: {name}")


def _times(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput("times", text, "numbers with commas, such as 999,749,499,249") from None


def suggest_student(
    teacher: Annotated[str, typer.Argument(help="A teacher's folder or hub id.", show_default=False)],
    budget_ms: Annotated[
        float | None, typer.Option(help="Of one network pass of one picture, on this device.", show_default=False)
    ] = None,
    candidates: Annotated[int, typer.Option(help="How many, from the largest to the smallest.")] = 10,
    device: Device = "auto",
) -> None:
    """Rank small student networks without training: latency, parameters, likeness to the teacher. Hints, no promises.

    Example: `fewstep suggest-student weights/eurosat-teacher --budget-ms 10`.
    """
    from distillers.jobs.suggest import suggest, table
    from distillers.teacher import Teacher

    opened = Teacher.from_pretrained(teacher, device_of(device))
    typer.echo(table(suggest(opened, budget_ms=budget_ms, candidates=candidates), opened, budget_ms))


def methods() -> None:
    """List the methods, what each needs, and the recipes that ship with the package."""
    from dataclasses import fields

    from distillers import methods as registry
    from distillers.jobs.recipe import shipped

    for name in registry.names():
        kind = registry.find(name)
        first = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name}: {first}")
        for field in fields(kind):
            typer.echo(f"    {name}.{field.name} = {field.default!r}")
    typer.echo("recipes: " + ", ".join(shipped()))
