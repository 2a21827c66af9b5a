"""Translates real rasters with a published model and checks every result: docs/results/rasters.md and .png.

    python tests/raster_report.py weights/sar-optical-db-consistency ../shared/data/geotiff docs/results/rasters.md

A raster NAME_s1rtc.tif or NAME_sar.tif is shown beside NAME_s2rgb.tif or NAME_opt.tif, the true optical picture.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from rio_cogeo import cog_validate

from distillers.evaluation.pictures import side_by_side
from distillers.evaluation.report import markdown_table, setting
from distillers.generator import Generator
from distillers.models.radiometry import Radiometry
from distillers.sar.options import SceneFacts, SceneOptions
from distillers.sar.part import Part
from distillers.sar.raster import Source, preview
from distillers.sar.translate import translate, uncertainty_path

SHOWN = 160  # px a side, from the upper left
SAMPLES = 8
HALVED = "sentinel_014_sar.tif"  # the largest; of 8 bits, so that both halves have one white
TRUTH = {"_s1rtc": "_s2rgb", "_sar": "_opt"}


def shown(path: Path) -> torch.Tensor:
    """The upper left of a colour raster, (3, SHOWN, SHOWN) in [-1, 1], black where there is none."""
    sheet = np.zeros((SHOWN, SHOWN, 3), np.uint8)
    part = preview(path, side=1 << 20)[:SHOWN, :SHOWN]
    sheet[: part.shape[0], : part.shape[1]] = part
    return torch.from_numpy(sheet).permute(2, 0, 1) / 127.5 - 1


def grey(path: Path) -> torch.Tensor:
    """The upper left of the first band in dB, 2 to 98 %, (3, SHOWN, SHOWN) in [-1, 1]."""
    source = Source(path, Radiometry())
    values, _ = source.read(Part(0, 0, *(min(SHOWN, side) for side in source.shape)))
    part = 20 * np.log10(np.maximum(values[0, :, :SHOWN] / 2 + 0.5, 1e-3))
    low, high = np.quantile(part, (0.02, 0.98))
    sheet = np.full((SHOWN, SHOWN), -1.0, np.float32)
    sheet[: part.shape[0], : part.shape[1]] = np.clip((part - low) / (high - low), 0, 1) * 2 - 1
    return torch.from_numpy(sheet)[None].expand(3, -1, -1)


def part_of(scene: Path, left: int, right: int, out: Path, placed: bool = True) -> Path:
    """Copies some columns of a scene, with their place on the ground or without any."""
    with rasterio.open(scene) as raster:
        window = Window(left, 0, right - left, raster.height)
        profile = raster.profile | {"width": right - left, "transform": raster.window_transform(window)}
        profile |= {} if placed else {"crs": None, "transform": None}
        with rasterio.open(out, "w", **profile) as copy:
            copy.write(raster.read(window=window))
            copy.descriptions = raster.descriptions
    return out


def halves(generator: Generator, scene: Path, place: Path, picture: Path) -> list[str]:
    """Translates a scene whole and in two halves, draws where they meet and says how far they differ."""

    def drawn(left: int, right: int, placed: bool = True) -> np.ndarray:
        bands = "VH" if "_VH" in scene.stem or "sentinel" in scene.stem else None
        cut = part_of(scene, left, right, place / "part.tif", placed)
        translate(generator, cut, place / "drawn.tif", SceneOptions(bands=bands))
        with rasterio.open(place / "drawn.tif") as made:
            return made.read().astype(int)

    with rasterio.open(scene) as raster:
        width = raster.width
    cut, margin = width // 2 - 12, 240  # px; no tile begins at the cut, and one that reaches to a pixel ends this near
    whole, lost = drawn(0, width), drawn(0, width, False)
    shared = [drawn(0, cut + 250)[:, :, :cut], drawn(cut - 250, width)[:, :, 250:]]
    ways = {
        "whole": (whole, whole),
        "cut to the line": (np.concatenate([drawn(0, cut), drawn(cut, width)], 2), whole),
        "500 px shared, cut in their middle": (np.concatenate(shared, 2), whole),
        "cut to the line, without a georeference": (
            np.concatenate([drawn(0, cut, False), drawn(cut, width, False)], 2), lost,
        ),
    }  # fmt: skip
    away, rows = np.abs(np.arange(width) + 0.5 - cut), []
    for way, (made, right) in ways.items():
        apart, step = np.abs(made - right), np.abs(made[:, :, cut] - made[:, :, cut - 1]).mean()
        near = [apart[:, :, (low < away) & (away < high)].mean() for low, high in ((0, 16), (16, 64), (64, margin))]
        rows.append((way, step, *near, apart[:, :, away > margin].max()))
    middle = np.s_[:, 384:576, cut - 256 : cut + 256]
    side_by_side({way: torch.from_numpy(made[middle])[None] / 127.5 - 1 for way, (made, _) in ways.items()}, picture)
    columns = [
        ("halves", lambda r: r[0], ""), ("step across the cut", lambda r: r[1], ".2f"),
        ("within 16 px", lambda r: r[2], ".2f"), ("16 to 64", lambda r: r[3], ".2f"),
        (f"64 to {margin}", lambda r: r[4], ".2f"), ("farther: largest", lambda r: r[5], ".0f"),
    ]  # fmt: skip
    return [
        "## Two halves of one scene", "", f"![halves]({picture.name})", "", markdown_table(columns, rows), "",
        f"{scene.name}, cut at column {cut}, which is the middle of these pictures. The step is the mean difference of "
        "the two columns at the cut; then follow mean differences to the whole by the distance from the cut, all in "
        "levels of 255. Without a georeference noise and tiles hang on each file's corner, as once everywhere; "
        "the whole of that row has none either.", "",
    ]  # fmt: skip


def main() -> None:
    """All rasters of backscatter in the folder."""
    model, folder, page = map(Path, sys.argv[1:4])
    generator = Generator.from_pretrained(model)
    rows: list[tuple[Path, SceneFacts, bool, bool]] = []
    pictures: dict[str, list[torch.Tensor]] = {
        "SAR": [],
        "one sample": [],
        "mean of samples": [],
        "optical, the truth": [],
    }
    joined: list[str] = []
    files = [f for f in sorted(folder.glob("*.tif")) if not f.stem.endswith(tuple(TRUTH.values()))]
    with tempfile.TemporaryDirectory() as place:
        for file in files:
            out = Path(place) / file.name
            facts = translate(generator, file, out, SceneOptions(samples=SAMPLES))
            with rasterio.open(file) as given, rasterio.open(out) as made:
                same = (given.crs, given.transform, given.shape) == (made.crs, made.transform, made.shape)
            valid = all(cog_validate(str(path), strict=True)[0] for path in (out, uncertainty_path(out)))
            rows.append((file, facts, same, valid))
            with rasterio.open(uncertainty_path(out)) as spread:
                mean = torch.from_numpy(spread.read([1, 2, 3])[:, :SHOWN, :SHOWN].astype(np.float32) / 256)
            sheet = torch.zeros(3, SHOWN, SHOWN)
            sheet[:, : mean.shape[1], : mean.shape[2]] = mean
            pictures["SAR"].append(grey(file))
            pictures["one sample"].append(shown(out))
            pictures["mean of samples"].append(sheet / 127.5 - 1)
            names = [file.with_name(file.name.replace(a, b)) for a, b in TRUTH.items() if a in file.name]
            truth = shown(names[0]) if names and names[0].is_file() else torch.ones(3, SHOWN, SHOWN)
            pictures["optical, the truth"].append(truth)
        if (scene := folder / HALVED).is_file():
            joined = halves(generator, scene, Path(place), page.with_name(f"{page.stem}-halves.png"))
    side_by_side({row: torch.stack(found) for row, found in pictures.items()}, page.with_suffix(".png"))
    columns = [
        ("raster", lambda r: r[0].name, ""), ("px", lambda r: f"{r[1].width} x {r[1].height}", ""),
        ("bands", lambda r: ", ".join(f"{band} = {i}" for band, i in r[1].bands.items()), ""),
        ("units", lambda r: r[1].units, ""), ("why", lambda r: r[1].units_why, ""),
        ("CRS, transform, size equal", lambda r: "yes" if r[2] else "NO", ""),
        ("valid COG", lambda r: "yes" if r[3] else "NO", ""),
        ("mean deviation, levels", lambda r: r[1].mean_deviation, ".1f"),
    ]  # fmt: skip
    s = setting("cpu")
    lines = [
        "# Real rasters", "", f"![rasters]({page.with_suffix('.png').name})", "", markdown_table(columns, rows), "",
        f"{generator.info.name}, 1 step, {SAMPLES} samples, seed 0; the upper left {SHOWN} px of each, in the order of "
        f"the table, white where no true picture is known; {s['device']}, torch {s['torch']}, {s['date']}. COGs: "
        "rio-cogeo, strict. None of these places was learnt from.", "", *joined,
        f"`python tests/raster_report.py {model} {folder} {page}` makes this page again.", "",
    ]  # fmt: skip
    page.write_text("\n".join(lines))
    if not all(same and valid for _, _, same, valid in rows):
        sys.exit("a result is not on its scene's grid, or no valid COG")


if __name__ == "__main__":
    main()
