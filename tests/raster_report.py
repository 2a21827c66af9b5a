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
        "rio-cogeo, strict. None of these places was learnt from.", "",
        f"`python tests/raster_report.py {model} {folder} {page}` makes this page again.", "",
    ]  # fmt: skip
    page.write_text("\n".join(lines))
    if not all(same and valid for _, _, same, valid in rows):
        sys.exit("a result is not on its scene's grid, or no valid COG")


if __name__ == "__main__":
    main()
