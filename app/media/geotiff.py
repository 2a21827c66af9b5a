"""Check uploaded GeoTIFFs, distinguish them from plain pictures by their header, and show them in grey.

The bytes are not trusted. They lie in a private folder under a name of the server's. Their first bytes must be a TIFF's
before GDAL sees them, and GDAL looks at nothing beside the file, so that no VRT or
sidecar can name another file or URL.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL, ImageFileDirectory_v2

from app.errors import ApiError
from app.media.image_files import Pixels, too_many_pixels
from distillers.errors import BadInput

if TYPE_CHECKING:
    from distillers.sar.options import SceneFacts

CLASSIC, BIG = (b"II*\0", b"MM\0*"), (b"II+\0", b"MM\0+")
GEOREFERENCE = (33550, 33922, 34264, 34735)  # pixel scale, tie points, transformation, geo keys
PLAIN = {
    (1, 1, 1),
    (1, 8, 1),
    (1, 16, 1),
    (1, 32, 3),
    (3, 8, 1),
}  # bands, bits, kind: what image_files.decode_sar reads
ENV = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": False}
MAX_BLOCK = 1 << 28  # bytes that GDAL holds for one block of a file, however few pixels the file has
KINDS = "one whole GeoTIFF"


def is_scene(data: bytes) -> bool:
    """Return whether a TIFF is more than a plain picture: georeferenced, BigTIFF, or of other types of numbers."""
    if data[:4] not in CLASSIC:
        return data[:4] in BIG
    try:
        file, tags = io.BytesIO(data), ImageFileDirectory_v2(data[:8])
        file.seek(tags.next)
        tags.load(file)
        bits, kind = (int(np.max(tags.get(tag, 1))) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
        return any(tag in tags for tag in GEOREFERENCE) or (tags.get(SAMPLESPERPIXEL, 1), bits, kind) not in PLAIN
    except Exception:  # a broken directory: decode_sar refuses it
        return False


def import_rasterio() -> Any:
    """Import rasterio. ApiError 501 where it is not installed, with how to install it."""
    from distillers.sar.raster import import_rasterio

    try:
        return import_rasterio()
    except BadInput:
        message = "this server reads no GeoTIFF: rasterio is not installed (pip install 'fewstep[raster]')"
        raise ApiError(501, message, param="image", code="rasterio_missing") from None


def check(path: Path, max_pixels: int | None = None) -> None:
    """Check a GeoTIFF by its header, before any pixel is decoded.

    Args:
        max_pixels: of a scene that is translated at once; None for no limit.

    Raises:
        BadInput: no TIFF, or blocks that are too large to read.
        ApiError: 413 for too many pixels, 501 without rasterio.
    """
    rasterio = import_rasterio()
    with path.open("rb") as file:
        head = file.read(4)
    if head not in CLASSIC + BIG:
        raise BadInput("image", f"{path.stat().st_size} bytes that are no TIFF", KINDS)
    try:
        with rasterio.Env(**ENV), rasterio.open(path, driver="GTiff") as raster:
            height, width = raster.shape
            together = raster.count if raster.profile.get("interleave") == "pixel" else 1
            block = max((rows * columns for rows, columns in raster.block_shapes), default=0) * together
            depth = max((16 if "complex" in kind else np.dtype(kind).itemsize for kind in raster.dtypes), default=0)
    except rasterio.errors.RasterioError:
        raise BadInput("image", f"{path.stat().st_size} bytes that do not open as a TIFF", KINDS) from None
    if max_pixels is not None and height * width > max_pixels:
        refused = too_many_pixels(f"{width}x{height}", max_pixels)
        refused.body.message += " at once; larger scenes are jobs: POST /v1/jobs/translations"
        raise refused
    if block * depth > MAX_BLOCK:
        given = f"blocks of {block * depth} bytes"
        raise BadInput("image", given, f"a file tiled or in strips, {MAX_BLOCK} bytes a block (gdal_translate -of COG)")


def grey(path: Path, facts: "SceneFacts", nodata: float | None, holes: NDArray[np.bool_]) -> Pixels:
    """Show the first band that was used in grey, (h, w) uint8: 2 to 98 % of its decibels as 1..255, no data as 0.

    Args:
        nodata: the stored number that the caller said to mean no data.
        holes: (h, w), where the result has no data; the picture is as large.
    """
    from rasterio.enums import Resampling

    from distillers.models.radiometry import decibels
    from distillers.sar.raster import scaled

    rasterio = import_rasterio()
    index = next(iter(facts.bands.values()))
    with rasterio.Env(**ENV), rasterio.open(path, driver="GTiff") as raster:
        # an average would mix in what only the caller knows to be no data
        how = Resampling.average if nodata is None else Resampling.nearest
        read = raster.read([index], out_shape=(1, *holes.shape), masked=True, resampling=how)
        stored: NDArray[Any] = read.astype(np.float64).filled(np.nan)
        if nodata is not None:
            stored[stored == nodata] = np.nan
        values = scaled(raster, [index], stored)[0]
    values[holes] = np.nan
    db = decibels(values, facts.units)
    low, high = np.nanquantile(db, (0.02, 0.98)) if np.isfinite(db).any() else (0.0, 1.0)
    levels = 1 + 254 * (db - low) / max(high - low, 1e-6)
    return np.nan_to_num(np.clip(levels, 1, 255), nan=0).astype(np.uint8)
