"""Finding the part of a scene that is asked for, by its pixels or by a box on the ground."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from distillers.errors import BadInput
from distillers.sar.options import SceneOptions

EDGE = 1e-3  # px that a box may reach into a pixel without taking it


@dataclass(frozen=True)
class Part:
    """A rectangle of a scene's pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """The scene's rows that it takes."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The scene's columns that it takes."""
        return slice(self.left, self.left + self.width)

    def moved(self, transform: Any) -> Any:
        """Move a scene's affine transform to this part; that of the whole stays the same bit for bit."""
        if not (self.top or self.left):
            return transform
        x, y = transform @ (self.left, self.top)
        return type(transform)(transform.a, transform.b, x, transform.d, transform.e, y)


def find_part(raster: Any, options: SceneOptions) -> Part:
    """Find the part of an open raster that `window` or `bbox` asks for; the whole where neither does.

    A box may reach beyond the scene. Its numbers are the scene's own coordinates or degrees of longitude (0 to 360,
    too) and latitude, whichever meets the scene.

    Raises:
        BadInput: a window that reaches beyond the scene, a box that meets it in no way or in two, a scene without a
            place.
    """
    if options.window:
        left, top, width, height = options.window
        if left + width > raster.width or top + height > raster.height:
            raise BadInput("window", options.window, f"a part of the scene's {raster.width}x{raster.height} pixels")
        return Part(top, left, height, width)
    if not options.bbox:
        return Part(0, 0, raster.height, raster.width)
    if raster.crs is None and raster.transform.is_identity:
        raise BadInput("bbox", options.bbox, "--window, for a scene that has no place on the ground")
    found: dict[str, Part] = {}
    for kind, box in _readings(raster.crs, options.bbox):
        if inside := _inside(raster, box):
            found.setdefault(kind, inside)
    if len(found) > 1:
        ways = ", ".join(f"{p.left} {p.top} {p.width} {p.height} as {kind}" for kind, p in found.items())
        raise BadInput("bbox", options.bbox, f"--window here, for these numbers have two meanings: {ways}")
    if found:
        return next(iter(found.values()))
    bounds = " ".join(f"{number:.8g}" for number in raster.bounds)
    raise BadInput("bbox", options.bbox, f"a box that meets the scene, {bounds} in {raster.crs or 'its coordinates'}")


Box = tuple[float, float, float, float]


def _readings(crs: Any, box: Box) -> Iterator[tuple[str, Box]]:
    """Yield what a box may mean in the scene's coordinates: itself, degrees, degrees around the globe."""
    from rasterio.errors import RasterioError
    from rasterio.warp import transform_bounds

    west, south, east, north = box
    if west < east:
        yield "degrees" if crs is not None and crs.is_geographic else "coordinates", box
    if crs is None or not (-180 <= west <= 360 and -180 <= east <= 360 and -90 <= south <= north <= 90):
        return
    east += 360 if east <= west else 0  # across the antimeridian
    for around in (0, -360, 360):
        if crs.is_geographic:
            yield "degrees", (west + around, south, east + around, north)
        elif -360 <= west + around < 360:
            try:
                yield "degrees", transform_bounds("EPSG:4326", crs, west + around, south, east + around, north)
            except RasterioError:  # a local grid, or degrees that its projection does not reach
                return


def _inside(raster: Any, box: Box) -> Part | None:
    """Return the pixels that a box in the scene's coordinates meets; None if there are none."""
    west, south, east, north = box
    corners = [~raster.transform @ corner for corner in ((west, north), (east, north), (east, south), (west, south))]
    try:
        left, top = (max(floor(min(axis) + EDGE), 0) for axis in zip(*corners, strict=True))
        right, bottom = (ceil(max(axis) - EDGE) for axis in zip(*corners, strict=True))
    except (ValueError, OverflowError):  # degrees that lie at infinity in this projection
        return None
    right, bottom = min(right, raster.width), min(bottom, raster.height)
    return Part(top, left, bottom - top, right - left) if left < right and top < bottom else None
