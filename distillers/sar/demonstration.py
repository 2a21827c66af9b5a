"""A made-up Sentinel-1 scene of fields, a river, roads, a town and a forest, to try the translation with.

Backscatter has C band's levels over such land and multi-looked speckle; the place is invented, so results say nothing
of a model's quality.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from distillers.errors import BadInput, check_file
from distillers.sar.beside import beside
from distillers.sar.raster import import_rasterio

LOOKS = 4.4  # of Sentinel-1 IW GRD
COVERS = {  # VV, VH in dB
    "water": (-19.0, -26.5),
    "bare field": (-13.5, -22.0),
    "crop": (-10.5, -17.5),
    "stubble": (-15.0, -23.5),
    "forest": (-8.5, -14.5),
    "road": (-17.0, -24.5),
    "town": (-4.5, -12.0),
}
UPPER_LEFT, PIXEL_M, EPSG = (565_000.0, 5_335_000.0), 10.0, 32632


def demonstration(path: str | Path, side: int = 512, seed: int = 0) -> None:
    """Write a GeoTIFF of VV and VH in dB, float32, `side` pixels of 10 m a side, with a wedge of no data (NaN).

    Raises:
        BadInput: a side below 64 or above 8192, no rasterio, a place that cannot be written.
    """
    if not 64 <= side <= 8192:
        raise BadInput("side", side, "64 to 8192")
    if seed < 0:
        raise BadInput("seed", seed, "0 or more")
    check_file(Path(path), ".tif", ".tiff")
    rasterio, rng = import_rasterio(), np.random.default_rng(seed)
    cover = land(side, rng)
    levels = np.array(list(COVERS.values()), dtype=np.float32)
    shade = gaussian_filter(rng.standard_normal((side, side)), 12)
    decibels = levels[cover].transpose(2, 0, 1) + np.float32(0.8) * (shade / shade.std()).astype(np.float32)
    power = 10 ** (decibels / 10) * rng.gamma(LOOKS, 1 / LOOKS, decibels.shape)
    power = gaussian_filter(power, (0, 0.6, 0.6))  # 20 m resolution, sampled every 10 m
    backscatter = (10 * np.log10(power)).astype(np.float32)
    rows, columns = np.mgrid[:side, :side]
    backscatter[:, columns + 0.15 * rows > 0.97 * side + 0.08 * rows] = np.nan  # the edge of the swath
    transform = rasterio.transform.from_origin(*UPPER_LEFT, PIXEL_M, PIXEL_M)
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 2,
        "dtype": "float32",
        "nodata": np.nan,
        "crs": f"EPSG:{EPSG}",
        "transform": transform,
        "compress": "deflate",
        "tiled": True,
    }
    try:
        with beside(Path(path)) as whole, rasterio.open(whole, "w", **profile) as raster:
            raster.write(backscatter)
            raster.descriptions = ("VV", "VH")
            raster.update_tags(datetime="2026-06-01T05:26:00", DEMONSTRATION="made by a program; no real place")
    except (rasterio.errors.RasterioError, OSError) as error:
        raise BadInput("out", str(path), f"a place that can be written ({error})") from None


def land(side: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Make up a map of land cover (side, side), in positions of COVERS."""
    names = list(COVERS)
    rows, columns = np.mgrid[:side, :side].astype(float)
    # Fields: rectangles of a turned grid, jittered, each with its crop.
    turn = rng.uniform(0.1, 0.5)
    along, across = columns * np.cos(turn) + rows * np.sin(turn), rows * np.cos(turn) - columns * np.sin(turn)
    centres = rng.uniform(-side, 2 * side, (9 * side * side // 1400, 2))
    _, field = cKDTree(centres).query(np.stack([along, 1.8 * across], -1).reshape(-1, 2), p=np.inf)
    crops = rng.choice([names.index(n) for n in ("bare field", "crop", "stubble")], len(centres), p=(0.4, 0.4, 0.2))
    cover = crops[field].reshape(side, side)
    # Forest where a smooth field is high; a town of blocks and streets; roads; a river that winds.
    smooth = gaussian_filter(rng.standard_normal((side, side)), side / 16)
    cover[smooth > np.quantile(smooth, 0.8)] = names.index("forest")
    middle = rng.uniform(0.3, 0.7, 2) * side
    ragged = 1 + 0.25 * np.sin(5 * np.arctan2(rows - middle[0], columns - middle[1]) + rng.uniform(0, 6))
    town = np.hypot(rows - middle[0], columns - middle[1]) < 0.15 * side * ragged
    streets = (along % 12 < 2) | (across % 18 < 2)
    cover[town] = np.where(streets, names.index("road"), names.index("town"))[town]
    for way, at in ((along, 0.35), (across, 0.3)):
        cover[np.abs(way - at * side) < 1.5] = names.index("road")
    bend = side * (0.72 + 0.06 * np.sin(columns / side * 7 + rng.uniform(0, 6)) + 0.03 * np.sin(columns / side * 17))
    cover[np.abs(rows - bend) < max(4, side / 80)] = names.index("water")
    return cover
