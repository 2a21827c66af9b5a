"""A STAC item beside a translated scene, so that catalogues find it and know that it is synthetic."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distillers.errors import BadInput
from distillers.sar.address import Scene, file_name, is_address
from distillers.sar.raster import import_rasterio

EXTENSIONS = ("projection/v1.1.0", "sar/v1.0.0")


def write_stac(out: Path, scene: Scene, polarisations: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write `out` with .json: a STAC 1.0 item with projection, SAR and `about` fields, derived from the scene.

    Raises:
        BadInput: a raster without a CRS: an item needs a place.
    """
    from rasterio.warp import transform_bounds, transform_geom

    with import_rasterio().open(out) as raster:
        if raster.crs is None:
            raise BadInput(
                "stac", f"{file_name(scene)}, which has no CRS", "a georeferenced scene: an item needs a place"
            )
        t, w, h = raster.transform, raster.width, raster.height
        ring = [[float(v) for v in t @ corner] for corner in ((0, 0), (w, 0), (w, h), (0, h), (0, 0))]
        geometry = transform_geom(raster.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
        xs, ys = zip(*ring, strict=True)
        box = transform_bounds(raster.crs, "EPSG:4326", min(xs), min(ys), max(xs), max(ys))
        place = {"proj:epsg": raster.crs.to_epsg(), "proj:shape": [h, w], "proj:transform": list(t)}
        taken = raster.tags().get("datetime")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [f"https://stac-extensions.github.io/{name}/schema.json" for name in EXTENSIONS],
        "id": out.stem,
        "geometry": geometry,
        "bbox": list(box),
        "properties": {
            "datetime": f"{taken[:19]}Z" if taken else now,
            "created": now,
            **place,
            "sar:instrument_mode": "IW",
            "sar:frequency_band": "C",
            "sar:polarizations": list(polarisations),
            "sar:product_type": "synthetic-optical",
            **about,
        },
        "links": [{"rel": "derived_from", "href": _link(scene, out), "type": "image/tiff; application=geotiff"}],
        "assets": {
            "visual": {
                "href": out.name,
                "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                "roles": ["visual"],
            }
        },
    }
    beside = out.with_name(f".{out.name}.{os.getpid()}.json")
    try:
        beside.write_text(json.dumps(item, indent=2) + "\n")
        os.replace(beside, out.with_suffix(".json"))
    finally:
        beside.unlink(missing_ok=True)


def _link(scene: Scene, out: Path) -> str:
    """Return a scene's address, or its path as seen from the item."""
    return str(scene) if is_address(scene) else Path(os.path.relpath(scene, out.parent)).as_posix()
