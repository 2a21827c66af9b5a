"""Commands that draw from noise: generate, pairs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from distillers.cli.arguments import Device, Seed, Steps, columns_of, device_of, label_of, size_of
from distillers.errors import BadInput, Notice, check_file, check_place


def generate(
    weights: Annotated[
        str, typer.Argument(help="A weights folder, or a diffusers pipeline: a folder or hub id.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="A PNG, several pictures in one grid; or .npy: float32 (N, C, H, W), all bands.")
    ] = Path("sample.png"),
    n: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    label: Annotated[str | None, typer.Option(help="Class by name or number; classes in turn if left out.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a text-to-image model is to draw.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from; refused by models that draw without guidance.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the published size if left out.")] = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw pictures from a weights folder or any supported diffusers pipeline.

    Example: `fewstep generate weights/eurosat-consistency --label River --n 8 --steps 2 --out rivers.png`.
    """
    import numpy as np

    from distillers.evaluation.pictures import grid_png
    from distillers.generator import Generator

    if not 1 <= n <= 1024:
        raise BadInput("n", n, "1 to 1024")
    check_file(out, ".png", ".npy")
    generator = Generator.from_pretrained(weights, device_of(device))
    if generator.condition.paired:
        raise BadInput("weights", weights, "one that draws without SAR; `fewstep translate` is for this one")
    classes, chosen = generator.info.classes, None
    if label is not None:
        chosen = [label_of(label, generator.info.labels)] * n
    elif classes:
        chosen = [classes[i % len(classes)] for i in range(n)]
    prompts = None if prompt is None and generator.prompts is None else [prompt or ""] * n
    negatives = None if negative_prompt is None else [negative_prompt] * n
    given = None if size is None else size_of(size)
    pictures = generator.sample(
        range(seed, seed + n), labels=chosen, prompts=prompts, negative_prompts=negatives, steps=steps, size=given
    )
    for encoder, end in (generator.prompts.unread(prompt or "") if generator.prompts else {}).items():
        warnings.warn(f"{encoder} does not read the end of the prompt: {end!r}", Notice, stacklevel=2)
    if out.suffix.lower() == ".npy":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, pictures.numpy())
    else:
        grid_png(pictures, columns=columns_of(n), path=out)
    calls, seeds = steps or generator.info.default_steps, f"seeds {seed} to {seed + n - 1}" if n > 1 else f"seed {seed}"
    typer.echo(f"{out}: {n} from {generator.info.name}, {calls} step{'s' * (calls > 1)} each, {seeds}")


def pairs(
    model: Annotated[str, typer.Argument(help="A weights folder, or a folder or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    reward: Annotated[
        str,
        typer.Option(help="A feature classifier's folder, or module:function.", show_default=False),
    ],
    n: Annotated[int, typer.Option(help="Pairs to draw; ties are left out.")] = 256,
    steps: Annotated[int, typer.Option(help="Network calls per picture.")] = 4,
    seed: Annotated[int, typer.Option(help="Pair i uses seed + 2 i and seed + 2 i + 1.")] = 0,
    device: Device = "auto",
) -> None:
    """Draw pairs of pictures and let a reward choose: a folder for data of kind = "preferences".

    Example: `fewstep pairs weights/eurosat-consistency --out runs/pairs/eurosat-green
    --reward distillers.training.reward:greenness`.
    """
    from distillers.generator import Generator
    from distillers.training.reward import choose_pairs, load_reward

    check_place(out.parent)
    judge = load_reward(reward)
    chosen = choose_pairs(Generator.from_pretrained(model, device_of(device)), judge, out, n=n, steps=steps, seed=seed)
    typer.echo(
        f"{out}: {chosen.pairs} pairs, {chosen.ties} ties left out; "
        f"mean reward of winners {chosen.winners:.4f}, of losers {chosen.losers:.4f}"
    )
