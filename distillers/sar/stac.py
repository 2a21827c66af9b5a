"""A STAC item beside a translated scene, so that catalogues find it and know that it is synthetic.

Items are of STAC 1.1 with the extensions projection, raster, processing and sar (https://stacspec.org).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from distillers.errors import BadInput
from distillers.sar.address import Scene, file_name, is_address
from distillers.sar.beside import beside
from distillers.sar.options import WARNING, SceneFacts
from distillers.sar.part import Part

EXTENSIONS = ("projection/v2.0.0", "raster/v2.0.0", "processing/v1.2.0", "sar/v1.3.0")
POLARISATIONS = ("HH", "VV", "HV", "VH")  # that the sar extension knows
TOLD = ("model", "model_sha256", "steps", "seed", "samples", "units", "window")  # facts among the properties
TIMES = (  # tags that hold the time of acquisition, in small letters and digits
    "datetime", "acquisitiondatetime", "acquisitionstarttime", "acquisitiontime", "acquisitiondate",
    "zerodopplerstarttime", "startdatetime", "starttime", "firstlinetime", "sensingstart", "sensingtime",
)  # fmt: skip
WRITTEN = "tifftagdatetime"  # the same of some tools, of others the time that the file was written
FIRST_YEAR = 1978  # of Seasat, the first SAR in orbit
NO_TIME = "The scene tells no time of its own: the STAC item has the time of this work for it."
EARTH = "EPSG:4326"
ALONG = 8  # pieces that an edge is projected in
STRAIGHT = 1e-6  # degrees that a point may lie off its neighbours' line to be left out

Ring = list[tuple[float, float]]


@dataclass(frozen=True)
class Origin:
    """Hold where and when a scene was taken, as GeoJSON and STAC say it."""

    geometry: dict[str, Any]
    bbox: list[float]  # west > east across the antimeridian (RFC 7946, 5.2)
    projection: dict[str, Any]
    time: datetime | None
    told_by: str  # where the time was found


def origin_of(raster: Any, scene: Scene, part: Part) -> Origin:
    """Find where and when a part of an open scene was taken.

    Raises:
        BadInput: a raster without a CRS, or with one that does not lead to longitude and latitude.
    """
    transform, crs = part.moved(raster.transform), raster.crs
    if crs is None:
        raise BadInput("stac", f"{file_name(scene)}, which has no CRS", "a georeferenced scene: an item needs a place")
    steps = np.linspace(0, 1, ALONG, endpoint=False)
    x = np.concatenate([steps, np.ones(ALONG), 1 - steps, np.zeros(ALONG)]) * part.width
    y = np.concatenate([np.zeros(ALONG), steps, np.ones(ALONG), 1 - steps]) * part.height
    own = [transform @ place for place in zip(x.tolist(), y.tolist(), strict=True)]
    geometry, bbox = footprint(_degrees(crs, own, file_name(scene)))
    epsg, (xs, ys) = crs.to_epsg(), zip(*own, strict=True)
    projection = {
        "proj:code": f"EPSG:{epsg}" if epsg else None,
        **({} if epsg else {"proj:wkt2": crs.to_wkt(version="WKT2_2019")}),
        "proj:shape": [part.height, part.width],
        "proj:transform": list(transform),
        "proj:bbox": [min(xs), min(ys), max(xs), max(ys)],
    }
    return Origin(geometry, bbox, projection, *time_of({**raster.tags(), **raster.tags(ns="IMAGERY")}, scene))


def _degrees(crs: Any, places: Sequence[tuple[float, float]], name: Path) -> Ring:
    """Convert coordinates to longitude and latitude. BadInput where their CRS does not lead there."""
    from rasterio.warp import transform

    try:
        longitudes, latitudes = transform(crs, EARTH, *map(list, zip(*places, strict=True)))
    except Exception as error:  # GDAL's own errors have no common class in rasterio's interface
        given = f"{name}, whose CRS leads to no longitude and latitude ({str(error)[:80]})"
    else:
        if np.isfinite([longitudes, latitudes]).all():
            return list(zip(longitudes, latitudes, strict=True))
        given = f"{name}, which lies beyond what its CRS is good for"
    raise BadInput("stac", given, "a CRS that leads to longitude and latitude: an item needs a place")


# --- the place


def footprint(ring: Ring) -> tuple[dict[str, Any], list[float]]:
    """Make a GeoJSON geometry and a bbox of a ring of longitudes, of any turn, and latitudes (RFC 7946).

    Neighbours lie less than half a turn apart. Exterior rings are counterclockwise (3.1.6); what crosses the
    antimeridian is cut there (3.1.9); a ring around a pole has the pole in it.
    """
    longitude = np.unwrap([x for x, _ in (*ring, ring[0])], period=360)
    latitude = np.clip([y for _, y in (*ring, ring[0])], -90, 90)
    if abs(longitude[-1] - longitude[0]) > 180:
        pole = 90.0 if latitude.mean() > 0 else -90.0
        longitude = np.array([*longitude, longitude[-1], longitude[0]])
        latitude = np.array([*latitude, pole, pole])
    else:
        longitude, latitude = longitude[:-1], latitude[:-1]
    longitude -= 360 * np.floor((longitude.mean() + 180) / 360)
    whole = list(zip(longitude.tolist(), latitude.tolist(), strict=True))
    pieces = []
    for turn in (-360, 0, 360):
        piece = _cut(_cut(whole, -180 + turn, 1), 180 + turn, -1)
        if abs(area := _area(piece)) > 1e-12:
            shifted = [(x - turn, y) for x, y in piece]
            pieces.append(_straightened(shifted if area > 0 else shifted[::-1]))
    pieces.sort(key=lambda piece: -max(x for x, _ in piece))  # what ends at the antimeridian, then what begins there
    closed = [[[[round(n, 7) for n in place] for place in (*piece, piece[0])]] for piece in pieces]
    south, north = (edge(y for piece in pieces for _, y in piece) for edge in (min, max))
    west, east = min(x for x, _ in pieces[0]), max(x for x, _ in pieces[-1])
    if longitude.max() - longitude.min() >= 360 - STRAIGHT:
        west, east = -180.0, 180.0
    one = len(closed) == 1
    geometry = {"type": "Polygon" if one else "MultiPolygon", "coordinates": closed[0] if one else closed}
    return geometry, [round(n, 7) for n in (west, south, east, north)]


def _cut(ring: Ring, edge: float, side: int) -> Ring:
    """Keep what lies east (side 1) or west (-1) of a meridian (Sutherland and Hodgman 1974)."""
    kept: Ring = []
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], *ring[:1]], strict=True):
        if side * (x0 - edge) >= 0:
            kept.append((x0, y0))
        if (x0 - edge) * (x1 - edge) < 0:
            kept.append((edge, y0 + (y1 - y0) * (edge - x0) / (x1 - x0)))
    return kept


def _area(ring: Ring) -> float:
    """Compute the area of a ring, above 0 where it is counterclockwise (shoelace formula)."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], *ring[:1]], strict=True)) / 2


def _straightened(ring: Ring) -> Ring:
    """Leave out the points that lie on the line through their neighbours."""
    tolerance = min(STRAIGHT, 1e-3 * float(np.ptp(np.array(ring), axis=0).max()))

    def bends() -> Iterator[tuple[float, float]]:
        for i, (x, y) in enumerate(ring):
            (x0, y0), (x1, y1) = ring[i - 1], ring[(i + 1) % len(ring)]
            off = abs((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0))
            if off > tolerance * np.hypot(x1 - x0, y1 - y0):
                yield x, y

    return list(bends())


# --- the time


def time_of(tags: Mapping[str, str], scene: Scene) -> tuple[datetime | None, str]:
    """Find the time of a scene, in UTC, in its tags or its file's name, and say where it was found."""
    known = {re.sub(r"[^a-z0-9]", "", key.lower()): (key, value) for key, value in tags.items()}
    for name in TIMES:
        if name in known and (found := parse_time(known[name][1])):
            return found, f"the tag {known[name][0]}"
    named = re.search(r"(?<!\d)\d{8}[Tt]\d{6}(?!\d)", file_name(scene).name)
    if named and (found := parse_time(named[0].upper())):
        return found, "the file's name"
    for name, (key, value) in known.items():
        told = re.search("date|time", name) and not re.search("proc|creat|gener|writ|modif|updat|prod|" + WRITTEN, name)
        if told and (found := parse_time(value)):
            return found, f"the tag {key}"
    if WRITTEN in known and (found := parse_time(known[WRITTEN][1])):
        return found, f"the tag {known[WRITTEN][0]}"
    return None, "the time of this work"


def parse_time(text: str) -> datetime | None:
    """Read a time as UTC: ISO 8601 (any offset, compact, a date alone), TIFF's, SNAP's, Earth Engine's; or None."""
    text = re.sub(r"^(\d{8})(\d{6})$", r"\1T\2", text.strip().removesuffix(" UTC"))
    text = re.sub(r"^(\d{4})[:/](\d\d)[:/](\d\d)", r"\1-\2-\3", text)
    try:
        if re.fullmatch(r"\d{13}", text):  # milliseconds since 1970
            found = datetime.fromtimestamp(int(text) / 1000, UTC)
        elif re.match(r"\d\d-[A-Za-z]{3}-", text):  # 13-JAN-2020 05:45:10.123456
            found = datetime.strptime(text, "%d-%b-%Y %H:%M:%S" + ".%f" * ("." in text))
        else:
            found = datetime.fromisoformat(text)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return found if FIRST_YEAR <= found.year <= datetime.now(UTC).year else None


def _rfc3339(time: datetime) -> str:
    return time.isoformat(timespec="microseconds" if time.microsecond else "seconds").replace("+00:00", "Z")


# --- the item


def item_of(origin: Origin, scene: Scene, out: Path, assets: Mapping[str, Any], facts: SceneFacts) -> dict[str, Any]:
    """Make the STAC item of a result; `assets` by name have paths for `href`."""
    now = datetime.now(UTC)
    polarisations = [band for band in facts.bands if band in POLARISATIONS]
    told = {f"fewstep:{key}": getattr(facts, key) for key in TOLD}
    extensions = EXTENSIONS if polarisations else EXTENSIONS[:-1]
    media = {"type": "image/tiff; application=geotiff"} if file_name(scene).suffix.lower() in (".tif", ".tiff") else {}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [f"https://stac-extensions.github.io/{name}/schema.json" for name in extensions],
        "id": out.stem,
        "geometry": origin.geometry,
        "bbox": origin.bbox,
        "properties": {
            "title": f"{out.stem}: an optical picture drawn from SAR",
            "description": f"Synthetic: drawn from SAR. {WARNING}",
            "datetime": _rfc3339(origin.time or now),
            "created": _rfc3339(now.replace(microsecond=0)),
            "fewstep:datetime_from": origin.told_by,
            **origin.projection,
            **({"sar:polarizations": polarisations} if polarisations else {}),
            "processing:software": {"fewstep": facts.version},
            "processing:lineage": f"Drawn by {facts.model} ({facts.model_sha256[:12]}) in {facts.steps} steps, seed "
            f"{facts.seed}, from backscatter read as {facts.units}.",
            **told,
        },
        "links": [{"rel": "derived_from", "href": _link(scene, out), **media}],
        "assets": {
            name: {**asset, "href": Path(os.path.relpath(asset["href"], out.parent)).as_posix()}
            for name, asset in assets.items()
        },
    }


def _link(scene: Scene, out: Path) -> str:
    """Return a scene's address, or its path as seen from the item."""
    return str(scene) if is_address(scene) else Path(os.path.relpath(scene, out.parent)).as_posix()


def write_item(item: Mapping[str, Any], path: Path) -> None:
    """Write an item beside its place, and rename it when it is whole."""
    with beside(path) as whole:
        whole.write_text(json.dumps(item, indent=2) + "\n")
