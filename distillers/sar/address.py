"""Where scenes lie: files, folders, patterns of names, archives, and addresses that GDAL reads over the network.

An address is a `str` that a person typed; a `Path` is always a local file. So what a request brings, which the service
writes to a path of its own, cannot name another file or host.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from distillers.errors import BadInput

Scene = str | Path

RASTERS = (".tif", ".tiff", ".vrt", ".img", ".jp2", ".nc", ".h5")  # what is taken out of a folder or an archive
PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".gif", ".avif")
UNCERTAINTY = ".uncertainty.tif"
SCHEMES = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/", "http": "/vsicurl/http://", "https": "/vsicurl/https://"}
NETWORK = {
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # a host is asked for the scene alone, not for what may lie beside it
    "GDAL_HTTP_CONNECTTIMEOUT": "20",  # s; without limits one host that is silent holds up all scenes after it
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_MAX_RETRY": "3",
}
SAFE = (
    "a terrain-corrected raster of it: process the product with SNAP, pyroSAR or sarsen first, or order an RTC product"
)
_ADDRESS = re.compile(r"(?:s3|gs|az|https?)://|/vsi\w+/|[A-Za-z]\w+:", re.ASCII)


def as_scene(given: Scene) -> Scene:
    """Return an address as it is, and all else as a path."""
    return given if is_address(given) else Path(given)


def is_address(given: Scene) -> bool:
    """Tell whether this is a URL, a path of GDAL's virtual file systems, or a part of a file such as NETCDF:f.nc:VV."""
    return isinstance(given, str) and bool(_ADDRESS.match(given)) and not Path(given).exists()


def is_elsewhere(written: str) -> bool:
    """Tell whether a name to write is of another host or of one of GDAL's virtual file systems."""
    return bool(re.match(r"(?:s3|gs|az|https?):/|/vsi\w+/", written))


def network_options() -> dict[str, str]:
    """Return GDAL's options for addresses, without those that the environment sets."""
    return {name: value for name, value in NETWORK.items() if name not in os.environ}


def file_name(scene: Scene) -> Path:
    """Return the name of a scene's file, without its folder, its host or a query."""
    if not is_address(scene):
        return Path(Path(scene).name)
    last = re.split(r"[?#]", str(scene))[0].rstrip("/").rsplit("/", 1)[-1]
    return Path(last.rsplit(":", 1)[-1].strip('"') if "://" not in str(scene) else last)


def gdal_name(scene: Scene) -> str:
    """Return the name that GDAL opens a scene by.

    Raises:
        BadInput: no such file; a Sentinel-1 product as it is delivered (SAFE); an archive of no raster or of several.
    """
    if is_address(scene):
        scheme, _, rest = str(scene).partition("://")
        return SCHEMES[scheme] + rest if rest and scheme in SCHEMES else str(scene)
    path = Path(scene)
    if path.suffix.lower() == ".safe" or path.name == "manifest.safe":
        raise BadInput("scene", f"{path.name}: a Sentinel-1 product as it is delivered", SAFE)
    if not path.is_file():
        raise BadInput("scene", str(path), "an existing file")
    return _inside(path) if path.suffix.lower() == ".zip" else str(path)


def _inside(archive: Path) -> str:
    """Return GDAL's name of the one raster in a ZIP file."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput("scene", archive.name, f"a whole ZIP file ({error})") from None
    if any(".SAFE/" in name for name in names):
        raise BadInput("scene", f"{archive.name}: a Sentinel-1 product as it is delivered", SAFE)
    rasters = [name for name in names if name.lower().endswith(RASTERS)]
    if len(rasters) != 1:
        inside = " | ".join(f"/vsizip/{archive}/{name}" for name in rasters[:4]) or "an archive with a raster in it"
        raise BadInput("scene", f"{archive.name}, with {len(rasters)} rasters in it", inside)
    return f"/vsizip/{archive.absolute()}/{rasters[0]}"


def is_one_scene(word: str) -> bool:
    """Tell whether a word of a command names one scene: a file, an address, a product's folder."""
    path = Path(word)
    return is_address(word) or path.is_file() or path.suffix.lower() == ".safe"


def find_scenes(given: Sequence[str]) -> list[Scene]:
    """List the scenes that words stand for: files, the rasters of folders, patterns such as "in/*.tif", addresses.

    Statistics of earlier results (.uncertainty.tif) and hidden files in a folder are no scenes.

    Raises:
        BadInput: a file that is not there, a folder or a pattern without a scene.
    """
    found: list[Scene] = []
    for word in given:
        path = Path(word)
        if is_one_scene(word):
            found.append(as_scene(word))
        elif path.is_dir():
            found += (inside := _rasters(path))
            if not inside:
                allowed = f"a folder with rasters in it ({', '.join(RASTERS)}); a pattern such as 'in/*.dat' for others"
                raise BadInput("sar", word, allowed)
        elif glob.has_magic(word):
            matches = [Path(name) for name in sorted(glob.glob(word, recursive=True))]
            files = [file for file in matches if file.is_file() or file.suffix.lower() == ".safe"]
            found += (files := [file for file in files if not file.name.endswith(UNCERTAINTY)])
            if not files:
                raise BadInput("sar", word, "a pattern that existing files match")
        else:
            raise BadInput("sar", word, "an existing file or folder, a pattern, an address that GDAL reads")
    return list(dict.fromkeys(found))


def _rasters(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise BadInput("sar", str(folder), f"a folder that can be read ({error.strerror})") from None
    return [file for file in files if file.suffix.lower() in RASTERS and not file.name.endswith(UNCERTAINTY)]
