"""Decode uploaded image files with care, and encode pictures fast.

An upload is checked in this sequence: its format against an allow-list, its size from the header against the limit, and
only then its pixels. Every broken file ends in BadInput or ApiError.

Accepted colour has 8 bits a band: grey, RGB, or a palette, which become the bands of the model: three, or one that is
grey. Transparent pixels show white, and
the orientation in EXIF is followed. CMYK is refused: without its profile it is no colour.

Accepted SAR has one band (three equal bands count as one):

    8 bit         0..255     becomes -1..1 linearly, in the model's own amplitude stretch (`sar` in /v1/models/{id})
    16 bit        0..65535   the same
    float32       0..1       the same, after the caller's own stretch; anything outside is refused, not clipped
"""

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import SAMPLESPERPIXEL, TiffImageFile

from app.errors import ApiError
from app.media.png import Pixels as Pixels
from app.media.png import write_png
from distillers.errors import BadInput

MIN_SIDE = 8  # pixels
KINDS = "one whole PNG or TIFF image"
COLOUR_KINDS = "one whole PNG, JPEG or WebP image"
FORMATS = {KINDS: ("PNG", "TIFF"), COLOUR_KINDS: ("PNG", "JPEG", "WEBP")}  # what Pillow may try
BANDS = "one band (8 bit, 16 bit or float32), or three equal bands"
COLOURS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # Pillow's modes
RANGES = {"L": 255.0, "I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "F": 1.0}  # mode -> white


def decode_sar(data: bytes, max_pixels: int) -> NDArray[np.float32]:
    """Decode a PNG or TIFF to one SAR band (H, W) in [-1, 1]."""
    with _loaded(data, KINDS, max_pixels) as picture:
        if picture.mode in ("1", "P"):  # pixel values are no numbers here but stand for colours
            picture = picture.convert("RGB")
        return _one_band(picture)


def decode_picture(data: bytes, max_pixels: int, channels: int = 3) -> NDArray[np.float32]:
    """Decode a PNG, JPEG or WebP to (C, H, W) in [-1, 1]: RGB where `channels` is 3, grey where it is 1."""
    with _loaded(data, COLOUR_KINDS, max_pixels) as picture:
        if picture.mode not in COLOURS:
            raise BadInput("image", f"pixels of mode {picture.mode}", "grey or RGB of 8 bits a band, with alpha or not")
        try:
            ImageOps.exif_transpose(picture, in_place=True)
        except Exception as error:  # a broken EXIF block: OSError, SyntaxError, struct.error...
            raise BadInput("image", f"EXIF that does not decode ({error})", COLOUR_KINDS) from error
        if picture.has_transparency_data:
            page = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(page, picture.convert("RGBA"))
        values = np.atleast_3d(np.asarray(picture.convert({1: "L", 3: "RGB"}[channels]))).transpose(2, 0, 1)
    colour = np.divide(values, 127.5, dtype=np.float32, order="C")
    colour -= 1
    return colour


def _loaded(data: bytes, kinds: str, max_pixels: int) -> Image.Image:
    """Decode a picture after its header was checked."""
    if not data:
        raise BadInput("image", "no bytes", kinds)
    picture = _open(data, kinds, max_pixels)
    try:
        picture.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error...
        raise BadInput("image", f"a file that breaks off or does not decode ({error})", kinds) from error
    return picture


def _open(data: bytes, kinds: str, max_pixels: int) -> Image.Image:
    """Read the header only, and check it."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS[kinds])
    except Image.DecompressionBombError:
        raise too_many_pixels("far more", max_pixels) from None
    except Exception as error:
        raise BadInput("image", f"{len(data)} bytes that are no such image", kinds) from error
    width, height = picture.size
    if width * height > max_pixels:
        raise too_many_pixels(f"{width}x{height}", max_pixels)
    if min(width, height) < MIN_SIDE:
        raise BadInput("image", f"{width}x{height} pixels", f"at least {MIN_SIDE} pixels on each side")
    if isinstance(picture, TiffImageFile):
        bands = picture.tag_v2.get(SAMPLESPERPIXEL, 1)
        if bands != len(picture.getbands()):  # Pillow would silently drop the others
            raise BadInput("image", f"{bands} bands", BANDS)
    if _has_second_frame(picture, kinds):
        raise BadInput("image", "several pages", kinds)
    return picture


def _has_second_frame(picture: Image.Image, kinds: str) -> bool:
    try:
        picture.seek(1)
    except EOFError:
        return False
    except Exception as error:  # a broken directory of pages
        raise BadInput("image", f"a broken file ({error})", kinds) from error
    return True


def too_many_pixels(given: str, max_pixels: int) -> ApiError:
    """Return the 413 for a picture over the limit, which is not decoded."""
    message = f"image: got {given} pixels; allowed: {max_pixels} pixels together"
    return ApiError(413, message, param="image", code="image_too_large")


def _one_band(picture: Image.Image) -> NDArray[np.float32]:
    if picture.mode not in ("RGB", *RANGES):
        raise BadInput("image", f"{len(picture.getbands())} band(s) of mode {picture.mode}", BANDS)
    values = np.asarray(picture)
    if picture.mode == "RGB":
        if (values != values[..., :1]).any():
            raise BadInput("image", "3 bands that differ", BANDS)
        values = values[..., 0]
    unit = values.astype(np.float32) / RANGES.get(picture.mode, 255.0)
    if not (np.isfinite(unit).all() and unit.min() >= 0 and unit.max() <= 1):  # float32 only
        raise BadInput("image", f"float32 values from {unit.min():g} to {unit.max():g}", "finite values from 0 to 1")
    return unit * 2 - 1


def pad(sar: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    """Pad (H, W) to multiples by reflection at the lower right, so that cropping to (H, W) undoes it."""
    height, width = sar.shape
    return np.pad(sar, ((0, -height % multiple), (0, -width % multiple)), mode="reflect")


def encode(pixels: Pixels, output_format: str, quality: int = 90, text: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture, (H, W, C) or grey (H, W) uint8: of C bands the first three as RGB, of one or two the first.

    Args:
        output_format: png (lossless), jpeg, webp, or raw: the bytes of the array itself with all bands, line by line.
        quality: of JPEG and WebP, 0..100.
        text: keywords and values that a PNG carries.
    """
    if output_format == "raw":
        return pixels.tobytes()
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    if output_format == "png":
        return write_png(pixels, text)
    target = io.BytesIO()
    options = {"jpeg": {}, "webp": {"method": 0}}[output_format]
    Image.fromarray(pixels).save(target, output_format, quality=quality, **options)
    return target.getvalue()
