"""Commands that make pictures: generate, translate, demonstration, pairs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from distillers.cli.arguments import Device, Seed, Steps, columns_of, device_of, label_of, size_of, with_options
from distillers.errors import BadInput, Notice, check_file, check_place
from distillers.sar.options import WARNING, SceneOptions


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


@with_options(SceneOptions)
def translate(
    sar: Annotated[
        Path, typer.Argument(help="A GeoTIFF of VV, VH or both; or one grey PNG or WebP.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The GeoTIFF to write; for a picture a PNG.", show_default=False)],
    model: Annotated[
        Path, typer.Option(help="A weights folder of sar-to-optical.", envvar="FEWSTEP_TRANSLATOR")
    ] = Path("weights/sar-optical-db-consistency"),
    *,
    options: SceneOptions,
    stac: Annotated[bool, typer.Option("--stac", help="Write a STAC item beside, OUT with .json.")] = False,
    preview: Annotated[Path | None, typer.Option(help="A PNG of the result, 2048 px at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Translate a SAR scene to optical: a GeoTIFF of any size in, a Cloud-Optimised GeoTIFF on the same grid out.

    Colours are inferred, not measured; objects may be invented or missing. Files are written beside and renamed: a file
    that is there is whole.

    Example: `fewstep translate scene.tif optical.tif --samples 8`; without a scene: `fewstep demonstration scene.tif`.
    """
    import json
    from dataclasses import asdict

    from distillers.generator import Generator

    if not sar.is_file():
        raise BadInput("sar", str(sar), "an existing file")
    picture = sar.suffix.lower() not in (".tif", ".tiff")
    if preview is not None:
        check_file(preview, ".png", inputs=[sar])
    if picture:
        check_file(out, ".png", inputs=[sar])
    generator = Generator.from_pretrained(model, device_of(device))
    if picture:
        _translate_picture(generator, sar, out, options)
        return
    from distillers.progress import scene_bar
    from distillers.sar.raster import preview as small
    from distillers.sar.translate import translate as translate_scene
    from distillers.sar.translate import uncertainty_path

    with scene_bar() as show:
        facts = translate_scene(generator, sar, out, options, stac=stac, progress=show)
    if preview is not None:
        from PIL import Image

        Image.fromarray(small(out)).save(preview)
    if as_json:
        typer.echo(json.dumps(asdict(facts), indent=2))
    else:
        used = ", ".join(f"{band} (band {i})" for band, i in facts.bands.items())
        typer.echo(
            f"{out}: {facts.width}x{facts.height} px, {facts.steps} step{'s' * (facts.steps > 1)}, "
            f"{facts.megapixels_per_second:.2f} Mpx/s; {facts.tiles} tiles, {facts.skipped} without data\n"
            f"read as {facts.units}: {facts.units_why}\nbands: {used}, {facts.bands_how}"
        )
        if facts.mean_deviation is not None:
            typer.echo(f"{uncertainty_path(out)}: mean deviation {facts.mean_deviation:.1f} levels of 255")
        if options.samples > 1 and (line := _calibrated(model)):
            typer.echo(line)
    for warning in facts.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _translate_picture(generator: Any, sar: Path, out: Path, options: SceneOptions) -> None:
    """Translate one grey picture, of a size that the network takes at once."""
    from distillers.data import read_sar
    from distillers.evaluation.pictures import grid_png
    from distillers.models.radiometry import Radiometry

    array = read_sar(sar, Radiometry.of(generator.info.sar), options.bands)
    grid_png(generator.translate(array, seed=options.seed, steps=options.steps), columns=1, path=out, gap=0)
    typer.echo(f"{out}: {array.shape[-1]}x{array.shape[-2]} px")
    typer.echo(f"warning: {WARNING}", err=True)


def _calibrated(model: Path) -> str | None:
    """Describe the folder's calibration in one line; None without one."""
    from distillers.weights.manifest import read_json

    figures = read_json(model / "calibration.json")
    if not {"spread_over_skill", "rank_correlation", "n", "data"} <= set(figures):
        return None
    spread, correlation = figures["spread_over_skill"], figures["rank_correlation"]
    return (
        f"calibration on {figures['n']} tiles of {figures['data']}: spread over skill {spread:.2f}, 1 if "
        f"right; rank correlation of deviation and error {correlation:.2f}"
    )


def demonstration(
    out: Annotated[Path, typer.Argument(help="The GeoTIFF to write.", show_default=False)],
    side: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    seed: Annotated[int, typer.Option(help="Another seed, another place.")] = 0,
) -> None:
    """Make up a Sentinel-1 scene (VV and VH in dB, UTM) to try `fewstep translate` with. No real place.

    Example: `fewstep demonstration scene.tif`, then `fewstep translate scene.tif optical.tif --preview optical.png`.
    """
    from distillers.sar.demonstration import demonstration as make

    make(out, side, seed)
    typer.echo(f"{out}: {side}x{side} px of VV and VH in dB")


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
