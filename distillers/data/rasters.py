"""Georeferenced rasters of a pair: where they lie, which of their bands are meant, and where they hold nothing.

Knows files and arrays; what backscatter means is `models.radiometry`. rasterio is imported when a raster is met.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.models.radiometry import name_bands

RASTER_SUFFIXES = frozenset({".tif", ".tiff"})
DISPLAY = 0.3  # the reflectance that is shown as white
RGB = (("B04", "B4", "RED"), ("B03", "B3", "GREEN"), ("B02", "B2", "BLUE"))  # as Sentinel-2 and others call them
SENTINEL2_COUNTS = (
    12,
    13,
)  # bands of a whole product in their order, with or without B10: red, green, blue are 4, 3, 2
_SAME = 0.01  # px that two corners may differ by


@dataclass(frozen=True)
class Place:
    """Where a raster lies."""

    crs: Any  # rasterio's, or None
    width: int
    height: int
    transform: tuple[float, ...]  # x = a column + b row + c, y = d column + e row + f

    @property
    def corners(self) -> NDArray[np.float64]:
        """(4, 2), clockwise, in the units of the CRS."""
        at = np.array([(0, 0, 1), (self.width, 0, 1), (self.width, self.height, 1), (0, self.height, 1)], np.float64)
        return at @ np.array(self.transform, dtype=np.float64).reshape(2, 3).T

    def fits(self, other: "Place") -> bool:
        """Whether the pixels of both are the same pieces of ground."""
        if (self.crs, self.width, self.height) != (other.crs, other.width, other.height):
            return False
        pixel = np.hypot(self.transform[:2], self.transform[3:5]).min()
        return bool(np.abs(self.corners - other.corners).max() <= _SAME * pixel)

    def __str__(self) -> str:
        numbers = ", ".join(f"{number:.10g}" for number in self.transform)
        return f"{self.crs or 'no CRS'}, {self.width}x{self.height} px, transform ({numbers})"


def place(path: Path) -> Place:
    """Read from the header; BadInput for a file that is no raster."""
    with _open(path) as raster:
        return Place(raster.crs, raster.width, raster.height, tuple(raster.transform)[:6])


def on_one_map(corners: Sequence[NDArray[np.float64]], systems: Sequence[Any]) -> NDArray[np.float64]:
    """(n, 4, 2) of corners in their CRS: as they are where all have the same, else in degrees of EPSG:4326."""
    if all(crs == systems[0] for crs in systems):
        return np.stack(corners)
    _rasterio("EPSG:4326")
    from rasterio.warp import transform

    moved = [transform(crs, "EPSG:4326", *quad.T.tolist())[:2] for quad, crs in zip(corners, systems, strict=True)]
    return np.array(moved).swapaxes(1, 2)


def sar_bands(path: Path, wanted: str | None) -> dict[str, int]:
    """{polarisation: band number}, by `radiometry.name_bands`."""
    with _open(path) as raster:
        try:
            return name_bands(wanted, raster.descriptions, path.stem)[0]
        except BadInput as error:
            raise BadInput(f"{path}: {error.field}", error.given, error.allowed) from None


def read_sar_raster(
    path: Path, bands: dict[str, int], nodata: float | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """((H,W,C) in the raster's numbers, scaled if the file says so; (H,W) whether there are data in all of them)."""
    with _open(path) as raster:
        values, valid, _ = _read(raster, list(bands.values()), path)
    if values.dtype.kind == "c":
        raise BadInput(str(path), "complex values", "detected, terrain-corrected backscatter")
    if nodata is not None:
        valid &= (values != nodata).all(2)
    return values, valid


def read_optical_raster(path: Path, scale: float, offset: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """((H,W,3) red, green, blue, 0..255; (H,W) whether there are data).

    8 bits are taken as they are. All else is reflectance, (numbers - offset) / scale or as the file's own scale says,
    of which 0 to DISPLAY become 0 to 255; there 0 in all three is no data, as in Sentinel-2's products.
    """
    with _open(path) as raster:
        values, valid, scaled = _read(raster, _rgb(raster, path), path)
    if values.dtype == np.uint8:
        return values, valid
    if not scaled:
        valid &= (values != 0).any(2)
        seen = values[valid]
        if seen.size and scale > 100 and seen.max() <= 2:
            given = f"no number above {float(seen.max()):.4g}"
            raise BadInput(
                str(path), given, f"reflectance times optical_scale ({scale:g}); optical_scale = 1 for 0 to 1"
            )
        values = (values.astype(np.float32) - offset) / scale
    levels = np.clip(np.nan_to_num(values) / DISPLAY, 0, 1) * 255
    return np.round(levels).astype(np.uint8), valid


def _rgb(raster: Any, path: Path) -> list[int]:
    """The numbers of the red, the green and the blue band."""
    names = [(name or "").upper() for name in raster.descriptions]
    found = [next((i + 1 for i, name in enumerate(names) if name in wanted), None) for wanted in RGB]
    if None not in found:
        return [i for i in found if i is not None]
    if raster.count == 3 or (raster.count == 4 and raster.dtypes[0] == "uint8"):  # the fourth is a mask
        return [1, 2, 3]
    if raster.count in SENTINEL2_COUNTS:
        return [4, 3, 2]
    given = f"{raster.count} bands ({', '.join(name or 'no description' for name in names)})"
    raise BadInput(str(path), given, "red, green, blue; or bands described B04, B03, B02; or Sentinel-2's 12 or 13")


def _read(raster: Any, indexes: list[int], path: Path) -> tuple[NDArray[Any], NDArray[np.bool_], bool]:
    """((H,W,C), (H,W) valid in all bands, whether the file's own scale was applied)."""
    try:
        values, masks = raster.read(indexes), raster.read_masks(indexes)
    except _rasterio(path).errors.RasterioError as error:
        raise BadInput(str(path), str(error.__cause__ or error), "a complete, readable raster") from None
    valid = (masks > 0).all(0)
    factors = np.array([(raster.scales[i - 1], raster.offsets[i - 1]) for i in indexes])[:, :, None, None]
    if scaled := bool((factors[:, 0] != 1).any() or (factors[:, 1] != 0).any()):
        values = values * factors[:, 0] + factors[:, 1]
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(0)
    return values.transpose(1, 2, 0), valid, scaled


def _open(path: Path) -> Any:
    rasterio = _rasterio(path)
    try:
        with warnings.catch_warnings():  # where a place is needed, its absence is refused
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise BadInput(str(path), str(error), "a complete, readable raster") from None


def _rasterio(what: Path | str) -> Any:
    try:
        import rasterio
        import rasterio.errors
    except ImportError:
        raise BadInput(str(what), "a raster, without rasterio", "pip install 'fewstep[raster]'") from None
    return rasterio
