"""Writing files beside their place: what has a name is whole, and work that ended early leaves nothing behind."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distillers.sar.address import UNCERTAINTY

SIDECARS = (".aux.xml", ".ovr", ".msk")  # which GDAL and QGIS write beside a raster, and read instead of what is in it


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield a path in a hidden folder beside a target; what is written there gets the target's name if all goes well.

    The hidden name is short, whatever the target's. A symbolic link stays one: the file that it leads to is replaced.
    """
    real = target.resolve()
    folder = real.with_name(f".fewstep-{secrets.token_hex(8)}")
    path = folder / f"whole{real.suffix}"
    try:  # named before it is made: a signal between making a temporary folder and entering it would leave it
        folder.mkdir(0o700)
        yield path
        os.replace(path, real)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_older(out: Path, kept: tuple[Path, ...]) -> None:
    """Remove what an older result left beside a new one and would be taken for the new one's.

    That is statistics and a STAC item of this library's, unless they are `kept`, and sidecars of all these rasters.
    """
    uncertainty, item = out.with_suffix(UNCERTAINTY), out.with_suffix(".json")
    if uncertainty not in kept and _is_ours(uncertainty):
        uncertainty.unlink()
    if item not in kept and _is_our_item(item):
        item.unlink()
    for raster in (out, uncertainty):
        if raster in kept or not os.path.exists(raster):
            for end in SIDECARS:
                with suppress(OSError):  # none there, or a name too long to be there
                    raster.with_name(raster.name + end).unlink()


def _is_ours(path: Path) -> bool:
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(path) as raster:
            return "FEWSTEP_SYNTHETIC" in raster.tags()
    except RasterioError:
        return False


def _is_our_item(path: Path) -> bool:
    try:
        return "fewstep:model" in json.loads(path.read_text())["properties"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
