"""The georeferenced rasters of SAR and optical pairs: their place on the ground, their bands, their valid pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.models.band_names import name_bands
from distillers.sar.border import find_border
from distillers.sar.part import Part
from distillers.sar.raster import alpha_bands, import_rasterio, open_raster, read_stored, scaled

RASTER_SUFFIXES = frozenset({".tif", ".tiff"})
DISPLAY = 0.3  # the reflectance that is shown as white
RGB = (("B04", "B4", "RED"), ("B03", "B3", "GREEN"), ("B02", "B2", "BLUE"))  # as Sentinel-2 and others call them
SENTINEL2_COUNTS = (12, 13)  # bands of a whole product, without or with B10: red, green, blue are numbers 4, 3, 2
_SEAM = 1e-9  # degrees that rounding may put a corner before the first
_SAME = 0.01  # px that two corners may differ by


@dataclass(frozen=True)
class Place:
    """The grid of a raster: its CRS, its size in pixels and its affine transform."""

    crs: Any  # rasterio's, or None
    width: int
    height: int
    transform: tuple[float, ...]  # x = a column + b row + c, y = d column + e row + f

    @property
    def corners(self) -> NDArray[np.float64]:
        """The corners (4, 2), clockwise, in the units of the CRS."""
        at = np.array([(0, 0, 1), (self.width, 0, 1), (self.width, self.height, 1), (0, self.height, 1)], np.float64)
        return at @ np.array(self.transform, dtype=np.float64).reshape(2, 3).T

    def fits(self, other: "Place") -> bool:
        """Tell whether the pixels of both are the same pieces of ground."""
        if (self.crs, self.width, self.height) != (other.crs, other.width, other.height):
            return False
        pixel = np.hypot(self.transform[:2], self.transform[3:5]).min()
        return bool(np.abs(self.corners - other.corners).max() <= _SAME * pixel)

    def __str__(self) -> str:
        numbers = ", ".join(f"{number:.10g}" for number in self.transform)
        return f"{self.crs or 'no CRS'}, {self.width}x{self.height} px, transform ({numbers})"


def place(path: Path) -> Place:
    """Read the grid from a file's header. Raises BadInput for a file that is no raster."""
    with _open(path) as raster:
        return Place(raster.crs, raster.width, raster.height, tuple(raster.transform)[:6])


def on_one_map(corners: Sequence[NDArray[np.float64]], systems: Sequence[Any]) -> NDArray[np.float64]:
    """Bring corners to one CRS, (n, 4, 2): to their own where all have the same, else to degrees of EPSG:4326.

    Longitudes are counted from the widest gap between them, so that the antimeridian, and whether a file counts to 180
    or to 360 degrees, divide no ground.

    Raises:
        BadInput: one of several CRSs does not lead to degrees.
    """
    quads = np.stack(corners)
    if any(crs != systems[0] for crs in systems):
        import_rasterio("EPSG:4326")
        from rasterio.warp import transform

        for i, crs in enumerate(systems):
            try:
                quads[i] = np.transpose(transform(crs, "EPSG:4326", *quads[i].T.tolist())[:2])
            except Exception:  # GDAL's own errors have no common class in rasterio's interface
                raise BadInput("path", f"rasters in {crs}", "one CRS, or such that lead to degrees") from None
    elif not getattr(systems[0], "is_geographic", systems[0] == "EPSG:4326"):
        return quads
    longitudes = np.sort(quads[..., 0].ravel() % 360)
    gaps = np.diff(longitudes, append=longitudes[0] + 360)
    quads[..., 0] = (quads[..., 0] - longitudes[(gaps.argmax() + 1) % longitudes.size] + _SEAM) % 360
    return quads


def sar_bands(path: Path, wanted: str | None) -> tuple[dict[str, int], str]:
    """Name a SAR raster's bands, {polarisation: number from 1}, and say how: see `band_names.name_bands`."""
    with _open(path) as raster:
        try:
            return name_bands(wanted, raster.descriptions, path.stem, alpha_bands(raster))
        except BadInput as error:
            raise BadInput(f"{path}: {error.field}", error.given, error.allowed) from None


def read_sar_raster(
    path: Path, bands: dict[str, int], nodata: float | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_], bool]:
    """Read backscatter in the raster's own units.

    Returns:
        (H,W,C); (H,W), where there are data in all bands; and whether a border of zeros was taken for no data, which in
        8 bits, where 0 may be water, it never is.

    Raises:
        BadInput: a damaged file or complex values.
    """
    with _open(path) as raster:
        indexes = list(bands.values())
        stored, valid = _read(raster, indexes, path, nodata)
        values = scaled(raster, indexes, stored)
    if values.dtype.kind == "c":
        raise BadInput(str(path), "complex values", "detected, terrain-corrected backscatter")
    bordered = False
    if stored.dtype != np.uint8 and (zero := valid & (stored == 0).all(0)).any():
        border = find_border(lambda top, rows: (zero[top : top + rows], ~valid[top : top + rows]), *valid.shape)
        bordered, valid = border.pixels > 0, valid & ~border.within(Part(0, 0, *valid.shape))
    return values.transpose(1, 2, 0), valid, bordered


def read_optical_raster(path: Path, scale: float, offset: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read red, green and blue (H,W,3), 0..255, and (H,W), where there are data.

    8 bits are taken as they are. All else is reflectance, (numbers - offset) / scale or as the file's own scale says,
    of which 0 to DISPLAY become 0 to 255; there a stored 0 in all three is no data, as in Sentinel-2's products.
    """
    with _open(path) as raster:
        bands = _rgb(raster, path)
        stored, valid = _read(raster, bands, path)
        values = scaled(raster, bands, stored)
    if values.dtype == np.uint8:
        return values.transpose(1, 2, 0), valid
    valid &= (stored != 0).any(0)
    if values is stored:
        seen = values[:, valid]
        if seen.size and scale > 100 and seen.max() <= 2:
            given = f"no number above {float(seen.max()):.4g}"
            raise BadInput(
                str(path), given, f"reflectance times optical_scale ({scale:g}); optical_scale = 1 for 0 to 1"
            )
        values = (values.astype(np.float32) - offset) / scale
    levels = np.clip(np.nan_to_num(values) / DISPLAY, 0, 1) * 255
    return np.round(levels).astype(np.uint8).transpose(1, 2, 0), valid


def _rgb(raster: Any, path: Path) -> list[int]:
    """Find the numbers of the red, the green and the blue band."""
    names = [(name or "").upper() for name in raster.descriptions]
    found = [next((i + 1 for i, name in enumerate(names) if name in wanted), None) for wanted in RGB]
    if None not in found:
        return [i for i in found if i is not None]
    alpha = alpha_bands(raster)
    if raster.count - len(alpha) == 3:
        return [i for i in range(1, raster.count + 1) if i not in alpha]
    if raster.count == 4 and raster.dtypes[0] == "uint8":  # the fourth is a mask
        return [1, 2, 3]
    if raster.count in SENTINEL2_COUNTS:
        return [4, 3, 2]
    given = f"{raster.count} bands ({', '.join(name or 'no description' for name in names)})"
    raise BadInput(str(path), given, "red, green, blue; or bands described B04, B03, B02; or Sentinel-2's 12 or 13")


def _read(
    raster: Any, indexes: list[int], path: Path, nodata: float | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read bands as `read_stored` does. BadInput names a damaged file."""
    try:
        return read_stored(raster, indexes, nodata=nodata)
    except import_rasterio(str(path)).errors.RasterioError as error:
        raise BadInput(str(path), str(error.__cause__ or error), "a complete, readable raster") from None


def _open(path: Path) -> Any:
    rasterio = import_rasterio(str(path))
    try:
        return open_raster(path)
    except rasterio.errors.RasterioError as error:
        raise BadInput(str(path), str(error), "a complete, readable raster") from None
