"""Commands about scenes: translate, demonstration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from distillers.cli.arguments import Device, device_of, with_options
from distillers.errors import BadInput, check_file, check_place
from distillers.sar.address import PICTURES, UNCERTAINTY, Scene, file_name, find_scenes, is_elsewhere, is_one_scene
from distillers.sar.beside import beside
from distillers.sar.options import WARNING, SceneFacts, SceneOptions

if TYPE_CHECKING:
    from distillers.generator import Generator

Result = Literal["translated", "there already", "failed"]
FOR_PICTURES = ("steps", "seed", "bands")  # the options that a plain picture can honour
FOR_ALL = ("model", "steps", "tile", "overlap")  # errors about these would be every scene's


@with_options(SceneOptions)
def translate(
    sar: Annotated[
        list[str],
        typer.Argument(
            help="Rasters of VV, VH or both: files, folders, 'in/*.tif', https://, s3:// or /vsi addresses; or grey "
            "PNG or WebP pictures.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(help="The GeoTIFF to write, for a picture a PNG; of several a folder.", show_default=False),
    ],
    model: Annotated[
        Path, typer.Option(help="A weights folder of sar-to-optical.", envvar="FEWSTEP_TRANSLATOR")
    ] = Path("weights/sar-optical-db-consistency"),
    *,
    options: SceneOptions,
    stac: Annotated[bool, typer.Option("--stac", help="Write a STAC item beside, OUT with .json.")] = False,
    preview: Annotated[
        Path | None, typer.Option(help="A PNG of the result, 2048 px at most; of several a folder.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Of several: translate those, too, whose result is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Translate SAR scenes to optical: GeoTIFFs of any size in, Cloud-Optimised GeoTIFFs on the same grid out.

    Colours are inferred, not measured; objects may be invented or missing. Files are written beside and renamed: a file
    that is there is whole. Of several scenes a table ends the work, failures at its end make the exit code 1, and what
    is there already is left as it is.

    Example: `fewstep translate scene.tif optical.tif --samples 8`; `fewstep translate 'in/*.tif' out/`; without a
    scene: `fewstep demonstration scene.tif`.
    """
    from distillers.generator import Generator

    for written in (out, *([str(preview)] if preview else [])):
        if is_elsewhere(written):
            raise BadInput("out", written, "a file or a folder of this machine: results are written here")
    scenes = find_scenes(sar)
    several = len(sar) > 1 or not is_one_scene(sar[0]) or out.endswith(os.sep) or Path(out).is_dir()
    work = (
        [Work.of(scene, Path(out), preview) for scene in scenes] if several else [Work(scenes[0], Path(out), preview)]
    )
    _check_options(work, options, {"stac": stac, "preview": preview, "json": as_json and not several})
    _check_files(work, options, stac, Path(out), preview, several)
    if several:
        _translate_all(work, model, device_of(device), options, stac, overwrite, as_json)
        return
    generator, (one,) = Generator.from_pretrained(model, device_of(device)), work
    facts = one.run(generator, options, stac)
    if facts is None:
        typer.echo(f"{one.out}: {one.size()} px")
        typer.echo(f"warning: {WARNING}", err=True)
        return
    _tell(one, facts, options, model, as_json)


@dataclass(frozen=True)
class Work:
    """Hold a scene to translate with the files to write."""

    scene: Scene
    out: Path
    preview: Path | None = None

    @classmethod
    def of(cls, scene: Scene, folder: Path, previews: Path | None) -> Work:
        """Name the files to write into folders after the scene."""
        name = file_name(scene)
        out = folder / f"{name.stem}{'.png' if name.suffix.lower() in PICTURES else '.tif'}"
        return cls(scene, out, previews and previews / f"{name.stem}.png")

    @property
    def picture(self) -> bool:
        """Whether the scene is a plain picture."""
        return file_name(self.scene).suffix.lower() in PICTURES

    def size(self) -> str:
        """Read the size of the picture that was written."""
        from PIL import Image

        with Image.open(self.out) as made:
            return f"{made.width}x{made.height}"

    def files(self, options: SceneOptions, stac: bool) -> list[Path]:
        """List the files to write."""
        more = [self.out.with_suffix(UNCERTAINTY)] * (options.samples > 1) + [self.out.with_suffix(".json")] * stac
        return [self.out, *more, *([self.preview] if self.preview else [])]

    def already(self, options: SceneOptions, stac: bool) -> bool:
        """Tell whether all files that are asked for are there."""
        return all(file.exists() for file in self.files(options, stac))

    def made_otherwise(self, generator: Generator, options: SceneOptions) -> str:
        """Say how the result that is there was made, where that is not what is asked for now; "" where it is."""
        if self.picture:
            return ""
        from distillers.sar.raster import import_rasterio

        now = {
            "MODEL_SHA256": generator.info.digest,
            "STEPS": len(generator.times(options.steps)),
            "SEED": options.seed,
            "SAMPLES": options.samples,
        }
        rasterio = import_rasterio()
        try:
            with rasterio.open(self.out) as raster:
                tags = raster.tags()
        except rasterio.errors.RasterioError:
            tags = {}
        if "FEWSTEP_SYNTHETIC" not in tags:
            return "by another tool"
        found = {key: tags.get(f"FEWSTEP_{key}", "") for key in now}
        other = [key for key in now if found[key] != str(now[key])]
        names = {"MODEL_SHA256": f"by {tags.get('FEWSTEP_MODEL', 'another model')}"}
        ways = [names.get(key, f"with {found[key]} {key.lower()}") for key in other]
        part, asked = tags.get("FEWSTEP_WINDOW", ""), " ".join(map(str, options.window or ()))
        if bool(part) != bool(asked or options.bbox) or (asked and part != asked):
            ways.append(f"of the window {part}" if part else "of the whole scene")
        if isinstance(self.scene, Path) and self.scene.stat().st_mtime > self.out.stat().st_mtime:
            ways.append("before the scene was changed")
        return ", ".join(ways)

    def run(self, generator: Generator, options: SceneOptions, stac: bool) -> SceneFacts | None:
        """Translate the scene; return its facts, None for a picture."""
        if self.picture:
            _translate_picture(generator, Path(self.scene), self.out, options)
            return None
        from distillers.progress import scene_bar
        from distillers.sar.translate import translate

        with scene_bar() as show:
            return translate(generator, self.scene, self.out, options, stac=stac, preview=self.preview, progress=show)


def _check_options(work: Sequence[Work], options: SceneOptions, more: Mapping[str, Any]) -> None:
    """Refuse, by its name, an option that a plain picture among the scenes cannot honour."""
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in FOR_PICTURES}
    usual = {name: getattr(SceneOptions, name) for name in given}
    given |= more
    asked = {name: given[name] for name in given if given[name] not in (None, usual.get(name, False))}
    for one in work:
        if one.picture and asked:
            name, value = next(iter(asked.items()))
            allowed = f"nothing: {file_name(one.scene)} is a plain picture; this goes with a raster"
            raise BadInput(name.replace("_", "-"), str(value), allowed)


def _check_files(
    work: Sequence[Work], options: SceneOptions, stac: bool, out: Path, preview: Path | None, several: bool
) -> None:
    """Check what is to be written before anything is loaded, and make the folders of several scenes.

    Raises:
        BadInput: naming the file or the option.
    """
    made: dict[Path, Scene] = {}
    for one in work:
        if (other := made.setdefault(one.out, one.scene)) != one.scene:
            raise BadInput("sar", f"{other} and {one.scene}", f"different names: both would become {one.out}")
        for file in one.files(options, stac):
            kinds = {one.out: (".png",) if one.picture else (".tif", ".tiff"), one.preview: (".png",)}
            check_file(file, *kinds.get(file, (".tif", ".json")), inputs=[Path(one.scene)])
    if not several:
        return
    if preview is not None and preview.suffix:
        raise BadInput("preview", str(preview), "a folder, for several scenes")
    for folder in (out, *([preview] if preview else [])):
        check_place(folder)
        folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Outcome:
    """What became of one of several scenes."""

    work: Work
    result: Result
    facts: SceneFacts | None = None
    why: str = ""


def _translate_all(
    work: Sequence[Work],
    model: Path,
    device: str,
    options: SceneOptions,
    stac: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Translate several scenes with one model, print a table, and end with 1 if one failed."""
    import json

    from distillers.generator import Generator

    generator, outcomes = Generator.from_pretrained(model, device), list[Outcome]()
    for number, one in enumerate(work, 1):
        if not overwrite and one.already(options, stac):
            outcomes.append(Outcome(one, "there already", why=one.made_otherwise(generator, options)))
            continue
        typer.echo(f"[{number}/{len(work)}] {one.scene}", err=True)
        try:
            outcomes.append(Outcome(one, "translated", one.run(generator, options, stac)))
        except Exception as error:  # whatever is wrong with one scene, the others are translated
            if isinstance(error, BadInput) and error.field in FOR_ALL:
                raise
            why = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(one, "failed", why=why))
            if isinstance(error, BadInput) and error.field == "out":  # a full disk: all others would be drawn in vain
                outcomes += [Outcome(other, "failed", why="not tried after that") for other in work[number:]]
                break
    if as_json:
        rows = [
            {"scene": str(o.work.scene), "out": str(o.work.out), "result": o.result, "why": o.why or None,
             "facts": o.facts and asdict(o.facts)} for o in outcomes
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(outcomes)
    if options.samples > 1 and (line := _calibrated(model)):
        typer.echo(line, err=as_json)
    _print_notes(outcomes)
    if any(outcome.result == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _print_table(outcomes: Sequence[Outcome]) -> None:
    """Print a line for each scene, and one of how many there are of each result."""
    rows = [("scene", "result", "pixels", "read as", "with data", "Mpx/s")]
    for outcome in outcomes:
        facts, cells = outcome.facts, ("", "", "", "")
        if facts is not None:
            pixels, valid = f"{facts.width}x{facts.height}", f"{100 * facts.valid_share:.0f} %"
            cells = (pixels, f"{facts.units} {','.join(facts.bands)}", valid, f"{facts.megapixels_per_second:.2f}")
        rows.append((str(file_name(outcome.work.scene)), outcome.result, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    counts = {kind: sum(outcome.result == kind for outcome in outcomes) for kind in get_args(Result)}
    typer.echo(f"{len(outcomes)} scenes: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))


def _print_notes(outcomes: Sequence[Outcome]) -> None:
    """Print to stderr the warnings of each scene, what was left as it is though made otherwise, and the failures."""
    for outcome in outcomes:
        name = file_name(outcome.work.scene)
        for warning in outcome.facts.warnings if outcome.facts else ():
            if warning != WARNING:
                typer.echo(f"warning: {name}: {warning}", err=True)
        if outcome.result == "there already" and outcome.why:
            typer.echo(f"note: {outcome.work.out} is there, made {outcome.why}: --overwrite makes it anew", err=True)
    if any(outcome.result == "translated" for outcome in outcomes):
        typer.echo(f"warning: {WARNING}", err=True)
    for outcome in outcomes:
        if outcome.result == "failed":
            typer.echo(f"failed: {outcome.work.scene}: {outcome.why}", err=True)


def _tell(one: Work, facts: SceneFacts, options: SceneOptions, model: Path, as_json: bool) -> None:
    """Print what was made of one scene."""
    import json

    from distillers.sar.translate import uncertainty_path

    if as_json:
        typer.echo(json.dumps(asdict(facts), indent=2))
    else:
        used = ", ".join(f"{band} (band {i})" for band, i in facts.bands.items())
        typer.echo(
            f"{one.out}: {facts.width}x{facts.height} px, {facts.steps} step{'s' * (facts.steps > 1)}, "
            f"{facts.megapixels_per_second:.2f} Mpx/s; {facts.tiles} tiles, {facts.skipped} without data\n"
            f"read as {facts.units}: {facts.units_why}\nbands: {used}, {facts.bands_how}"
        )
        if facts.mean_deviation is not None:
            typer.echo(f"{uncertainty_path(one.out)}: mean deviation {facts.mean_deviation:.1f} levels of 255")
        if options.samples > 1 and (line := _calibrated(model)):
            typer.echo(line)
        if facts.band is not None:
            typer.echo(f"its 90 % band {facts.band}")
    for warning in facts.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _translate_picture(generator: Any, sar: Path, out: Path, options: SceneOptions) -> None:
    """Translate one grey picture, of a size that the network takes at once."""
    from distillers.data import read_sar
    from distillers.evaluation.pictures import grid_png
    from distillers.models.radiometry import Radiometry

    array = read_sar(sar, Radiometry.of(generator.info.sar), options.bands)
    out.parent.mkdir(parents=True, exist_ok=True)
    with beside(out) as path:
        grid_png(generator.translate(array, seed=options.seed, steps=options.steps), columns=1, path=path, gap=0)


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
