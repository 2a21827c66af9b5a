"""Image files as uint8 arrays and float tensors: reading, cropping, turning, and checks of options and positions."""

import functools
import io
import os
import struct
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, features
from torch import Tensor

from distillers.errors import BadInput, Notice
from distillers.sar.raster import import_rasterio

Batch = dict[str, Tensor]
"""`image` float32 (B,C,H,W) in [-1,1]; `label` int64 (B,) when labelled; `sar` float32 (B,C,H,W) in [-1,1];
`loser` like `image`, in preference pairs, whose `image` is the winner; `caption` uint8 (B,L) as
`models.captions.pack` writes texts."""

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # height and width in pixels
SPLITS = ("train", "test")
COLOURS = {1: "L", 3: "RGB"}  # Pillow's mode of so many bands, which any picture can be converted to
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "QOI", "TGA")
_MODULES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # that Pillow may have been built without
SMALLEST = 8  # px; below this there is no picture to learn from, most often it is a tracking pixel or a broken export
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of the files that Pillow reads as pictures on this machine."""
    known = [kind for kind in FORMATS if kind not in _MODULES or features.check(_MODULES[kind])]
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def image_files(folder: Path) -> list[Path]:
    """List the image files directly in `folder`, by name, without hidden files."""
    return sorted(
        p for p in _inside(folder) if p.suffix.lower() in suffixes() and not p.name.startswith(".") and p.is_file()
    )


def subfolders(folder: Path) -> list[Path]:
    """List the folders directly in `folder`, by name, without hidden ones."""
    return sorted(p for p in _inside(folder) if p.is_dir() and not p.name.startswith("."))


def _inside(folder: Path) -> list[Path]:
    """List what lies directly in `folder`. Raises BadInput where that cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise BadInput("path", str(folder), f"a folder that can be read ({error.strerror})") from None


def tell_left_out(root: Path, used: Collection[Path], layout: str) -> None:
    """Count and name, in a Notice, the files below `root` that are not `used`; hidden ones are left out in silence.

    layout: in words, where and of what kind files must be to be used.
    """
    left = sorted(file for file in _all_files(root) if file not in used)
    if left:
        folders = sorted({file.relative_to(root).parts[0] for file in left if file.parent != root})
        inside = f", in {listed(folders, 'folder')}" if folders else ""
        shown = f"{len(left)} file{'s' * (len(left) > 1)}{inside}, the first {left[0].relative_to(root)}"
        warnings.warn(f"{root}: left out {shown}. Used are {layout}", Notice, stacklevel=3)


def listed(names: Sequence[str], noun: str, most: int = 6) -> str:
    """Count names and write out the first ones, such as "2 class folders (cat, dog)"."""
    shown = ", ".join(names[:most]) + ", ..." * (len(names) > most)
    return f"{len(names)} {noun}{'s' * (len(names) != 1)} ({shown})"


def _all_files(root: Path) -> Iterator[Path]:
    """Yield every file below a folder but hidden ones and those in hidden folders."""
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def in_order(names: Collection[str]) -> list[str]:
    """Sort names of classes: by value where all are whole numbers, such as "2" before "10", else by letters."""
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def existing_folder(path: str | Path) -> Path:
    """Return `path` as an absolute folder. Raises BadInput when there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BadInput("path", str(path), "an existing folder")
    return folder.resolve()


def read_image(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an 8-bit image, upright by its EXIF tag. Raises BadInput for one that is unreadable or too small.

    content: what the file holds, where it is not on the disk by itself; `path` names it then.
    """
    try:
        with warnings.catch_warnings(), Image.open(path if content is None else io.BytesIO(content)) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise BadInput(str(path), str(error), "a complete, readable image") from error
    if upright.mode.startswith(("I", "F")):  # Pillow would clip 16-bit and float values to white without a word
        raise BadInput(str(path), f"pixels of type {upright.mode}", "8-bit pixels")
    if min(upright.size) < SMALLEST:
        raise BadInput(str(path), f"{upright.width}x{upright.height} px", f"at least {SMALLEST} px on each side")
    return upright


def upright_size(path: Path, content: bytes | None = None) -> Size:
    """Read an image's height and width, upright by its EXIF tag, from its head alone. Raises as `read_image`."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            lying = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if lying else (image.height, image.width)
    except UNREADABLE as error:
        raise BadInput(str(path), str(error), "a complete, readable image") from error


def read_bands(path: Path, channels: int = 3, content: bytes | None = None) -> list[Image.Image]:
    """Decode the bands of an 8-bit picture.

    channels: 1 makes any picture grey, 3 makes any picture RGB; other numbers take pictures of as many bands, TIFF by
        rasterio, for Pillow knows few of them.
    content: as in `read_image`.

    Raises:
        BadInput: what `read_image` refuses; another number of bands; a TIFF where rasterio is not installed.
    """
    if channels in COLOURS:
        return list(read_image(path, content).convert(COLOURS[channels]).split())
    if path.suffix.lower() in (".tif", ".tiff"):
        return _raster_bands(path, channels, content)
    bands = list(read_image(path, content).split())
    if len(bands) != channels:
        raise BadInput(str(path), f"{len(bands)} bands", f"{channels} bands")
    return bands


def _raster_bands(path: Path, channels: int, content: bytes | None) -> list[Image.Image]:
    rasterio = import_rasterio(str(path))
    try:
        opened = path if content is None else io.BytesIO(content)
        with warnings.catch_warnings(), rasterio.open(opened, driver="GTiff") as raster:
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            kinds = set(raster.dtypes)
            if raster.count != channels or kinds != {"uint8"} or min(raster.shape) < SMALLEST:
                given = f"{raster.count} bands of {', '.join(sorted(kinds))}, {raster.width}x{raster.height} px"
                raise BadInput(str(path), given, f"{channels} bands of 8 bits, at least {SMALLEST} px on each side")
            return [Image.fromarray(band) for band in raster.read()]
    except rasterio.errors.RasterioError as error:
        raise BadInput(str(path), str(error), "a complete, readable TIFF") from error


def fitted(bands: Sequence[Image.Image], size: Size) -> Pixels:
    """Crop the largest centred part of the size's shape out of a picture and resize it to (H, W, C) with antialiasing.

    Each band is treated alone: none is the transparency of the others.
    """
    height, width = size
    wide, high = across, down = bands[0].size
    if wide * height <= high * width:
        high = max(1, wide * height // width)
    else:
        wide = max(1, high * width // height)
    left, top = (across - wide) // 2, (down - high) // 2
    cropped = [band.crop((left, top, left + wide, top + high)) for band in bands]
    if (high, wide) != size:  # Pillow's filter widens when it shrinks, which is the antialiasing
        cropped = [band.resize((width, height), Image.Resampling.BICUBIC) for band in cropped]
    return np.stack([np.asarray(band) for band in cropped], -1)


def to_tensor(pixels: Pixels) -> Tensor:
    """Convert uint8 (B,H,W,C) to float32 (B,C,H,W) in [-1,1]."""
    channels_first = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return channels_first.float().div_(127.5).sub_(1.0)


def dihedral(pixels: NDArray[Any], operation: NDArray[np.integer]) -> NDArray[Any]:
    """Turn image i of (B,H,W,C) by `operation[i]` % 4 quarters, after a left-right flip where `operation[i]` >= 4.

    Odd numbers of quarters are for squares.
    """
    turned = pixels.copy()
    for k in range(1, 8):
        chosen = operation == k
        if not chosen.any():
            continue
        flipped = pixels[chosen][:, :, ::-1] if k >= 4 else pixels[chosen]
        turned[chosen] = np.rot90(flipped, k % 4, axes=(1, 2))
    return turned


def spread(count: int, limit: int | None) -> list[int]:
    """Choose at most `limit` of `count` positions, evenly spaced so that every class keeps its share."""
    kept = count if limit is None else min(check_whole("limit", limit, 1), count)
    return [i * count // kept for i in range(kept)]


def check_side(size: int) -> int:
    """Return `size` if it is a usable side of a square in pixels, else raise BadInput."""
    return check_whole("size", size, SMALLEST)


def check_size(size: int | Sequence[int]) -> Size:
    """Return height and width in pixels, given as they are or as the side of a square. Raises BadInput for others."""
    if isinstance(size, int):
        return check_side(size), size
    if isinstance(size, str) or len(size) != 2:
        raise BadInput("size", size, "a side in pixels, or a height and a width")
    height, width = (check_side(side) for side in size)
    return height, width


def check_whole(field: str, value: int, lowest: int) -> int:
    """Return `value` if it is a whole number of `lowest` or more, else raise BadInput."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise BadInput(field, value, f"a whole number, {lowest} or more")
    return value


def check_split(split: str | None) -> None:
    """Raise BadInput unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise BadInput("split", split, " | ".join(SPLITS))


def check_indices(indices: Sequence[int], count: int | None) -> NDArray[np.int64]:
    """Return `indices` as an array. Raises BadInput for one below 0 or not below `count` (None: endless)."""
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    for index in wanted[(wanted < 0) | (wanted >= (np.inf if count is None else count))]:
        raise BadInput("index", int(index), "0 or more" if count is None else f"0 to {count - 1}")
    return wanted
