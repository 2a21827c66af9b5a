"""Pictures from outside, whole and broken, and the codecs."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from app.errors import ApiError
from app.media.image_files import decode_picture, decode_sar, encode, pad
from distillers.errors import BadInput

LIMIT = 1 << 16


def file_of(values: NDArray, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(values).save(target, kind, **options)
    return target.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def two_band_tiff() -> bytes:
    """8x8, two bands of 8 bit, the second "unspecified": Pillow alone would drop it without a word."""
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, 8 | 8 << 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 2)]
    tags += [(278, 3, 8), (279, 4, 128), (284, 3, 1), (338, 3, 0)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 2 if tag == 258 else 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 136) + bytes(128) + struct.pack("<H", len(tags)) + entries + bytes(4)


GREY = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("values", "white"),
    [(GREY, 255), (GREY.astype(np.uint16) * 200, 65535), (np.stack([GREY] * 3, -1), 255)],
    ids=["8 bit", "16 bit", "three equal bands"],
)
def test_every_accepted_kind_becomes_one_band_in_its_range(kind: str, values: NDArray, white: int) -> None:
    band = values if values.ndim == 2 else values[..., 0]
    sar = decode_sar(file_of(values, kind), LIMIT)
    assert sar.dtype == np.float32
    np.testing.assert_allclose(sar, band / white * 2 - 1, atol=1e-6)


def test_float32_is_taken_from_0_to_1_and_refused_outside() -> None:
    unit = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    np.testing.assert_allclose(decode_sar(file_of(unit, "TIFF"), LIMIT), unit * 2 - 1, atol=1e-6)
    for wrong in (unit * 30 - 25, np.where(unit > 0.5, np.nan, unit).astype(np.float32)):
        with pytest.raises(BadInput, match="0 to 1"):
            decode_sar(file_of(wrong, "TIFF"), LIMIT)


BROKEN = {
    "empty": (b"", "no bytes"),
    "no image": (b"GIF89a and so on", "no such image"),
    "another format": (file_of(GREY, "JPEG"), "no such image"),
    "truncated PNG": (file_of(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[:-900], "breaks off"),
    "truncated TIFF": (file_of(np.tile(GREY, (4, 4)), "TIFF")[:1500], "breaks off|no such image"),
    "1 pixel": (file_of(GREY[:1, :1]), "1x1 pixels"),
    "one row": (file_of(GREY[:1]), "20x1 pixels"),
    "three bands": (file_of(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)), "3 bands that differ"),
    "four bands": (file_of(np.zeros((9, 9, 4), np.uint8)), "4 band"),
    "grey and alpha": (file_of(np.zeros((9, 9, 2), np.uint8)), "2 band"),
    "a hidden second band": (two_band_tiff(), "2 bands"),
    "int32": (file_of(GREY.astype(np.int32), "TIFF"), "mode I"),
    "two pages": (file_of(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), "several pages"),
    "animated": (file_of(GREY, "PNG", save_all=True, append_images=[Image.fromarray(GREY + 1)]), "several pages"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named_as_what_they_are(name: str) -> None:
    data, message = BROKEN[name]
    with pytest.raises(BadInput, match=message) as caught:
        decode_sar(data, LIMIT)
    assert caught.value.field == "image"


@pytest.mark.parametrize("side", [300, 60_000, 2_000_000_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(ApiError, match="image: got") as caught:
        decode_sar(png_header(side, side), LIMIT)
    assert caught.value.status == 413


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow wonders aloud
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([file_of(GREY), file_of(GREY, "TIFF")]), st.integers(0, 400))
def test_damage_anywhere_is_bad_input_or_a_picture(noise: bytes, file: bytes, at: int) -> None:
    try:
        sar = decode_sar(file[:at] + noise + file[at + len(noise) :], LIMIT)
    except (BadInput, ApiError):
        return
    assert np.isfinite(sar).all() and abs(sar).max() <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from([1, 2, 8, 32, 64]))
def test_padding_reaches_the_multiple_and_cropping_undoes_it(height: int, width: int, multiple: int) -> None:
    sar = np.random.default_rng(0).random((height, width), np.float32)
    grown = pad(sar, multiple)
    assert all(
        side % multiple == 0 and side - before < multiple for side, before in zip(grown.shape, sar.shape, strict=True)
    )
    np.testing.assert_array_equal(grown[:height, :width], sar)


COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
ALPHA = np.linspace(0, 255, 240).round().astype(np.uint8).reshape(12, 20)


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def over_white(colour: NDArray, alpha: NDArray) -> NDArray:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share))


def turned() -> bytes:
    """A camera held on its side: stored 20 wide, to be shown 12 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(COLOUR), exif=exif)


THREE = np.stack([GREY] * 3, -1)
ACCEPTED = {
    "RGB": (file_of(COLOUR), COLOUR),
    "lossless WebP": (file_of(COLOUR, "WEBP", lossless=True), COLOUR),
    "grey": (file_of(GREY), THREE),
    "grey JPEG": (file_of(np.full_like(GREY, 77), "JPEG"), np.full_like(THREE, 77)),
    "1 bit": (saved(Image.fromarray(GREY > 99)), (THREE > 99) * 255),
    "palette": (saved(Image.fromarray(THREE).convert("P", palette=Image.Palette.ADAPTIVE)), THREE),
    "RGBA": (file_of(np.dstack([COLOUR, ALPHA])), over_white(COLOUR, ALPHA)),
    "RGBA WebP": (
        file_of(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True, exact=True), over_white(COLOUR, ALPHA),
    ),
    "grey and alpha": (file_of(np.dstack([GREY, ALPHA])), over_white(THREE, ALPHA)),
    "a transparent grey": (saved(Image.fromarray(GREY), transparency=7), np.where(THREE == 7, 255, THREE)),
    "a transparent colour": (
        saved(Image.fromarray(COLOUR), transparency=tuple(COLOUR[3, 4].tolist())),
        np.where((COLOUR[3, 4] == COLOUR).all(-1, keepdims=True), 255, COLOUR),
    ),
    "on its side": (turned(), np.rot90(COLOUR, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_accepted_picture_becomes_colour_as_a_viewer_shows_it(name: str) -> None:
    data, expected = ACCEPTED[name]
    colour = decode_picture(data, LIMIT)
    assert colour.dtype == np.float32 and colour.flags.c_contiguous
    levels = 127.5 * (colour + 1)
    np.testing.assert_allclose(levels, np.moveaxis(expected, -1, 0), atol=1e-3)


def test_a_jpeg_is_near_and_white_and_black_are_exact() -> None:
    smooth = np.stack([np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))] * 3, -1)
    np.testing.assert_allclose(
        decode_picture(file_of(smooth, "JPEG", quality=95), LIMIT)[0], smooth[..., 0] / 127.5 - 1, atol=0.05
    )
    for value, unit in ((0, -1.0), (255, 1.0)):
        assert (decode_picture(file_of(np.full((8, 8, 3), value, np.uint8)), LIMIT) == unit).all()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
MOVING = {"save_all": True, "append_images": [Image.fromarray(255 - NOISE)]}
NO_COLOUR = {
    "empty": (b"", "no bytes"),
    "no image": (b"GIF89a and so on", "no such image"),
    "GIF": (file_of(GREY, "GIF"), "no such image"),
    "TIFF": (file_of(COLOUR, "TIFF"), "no such image"),
    "BMP": (file_of(COLOUR, "BMP"), "no such image"),
    "truncated PNG": (file_of(NOISE)[:-900], "breaks off"),
    "truncated JPEG": (file_of(NOISE, "JPEG")[:-900], "breaks off"),
    "truncated WebP": (file_of(NOISE, "WEBP")[:-900], "breaks off|no such image"),
    "1 pixel": (file_of(COLOUR[:1, :1]), "1x1 pixels"),
    "CMYK": (saved(Image.fromarray(NOISE).convert("CMYK"), "JPEG"), "mode CMYK"),
    "16 bit": (file_of(GREY.astype(np.uint16)), "mode I;16"),
    "animated WebP": (saved(Image.fromarray(NOISE), "WEBP", **MOVING), "several pages"),
    "animated PNG": (saved(Image.fromarray(NOISE), "PNG", **MOVING), "several pages"),
    "two photographs": (saved(Image.fromarray(NOISE), "MPO", **MOVING), "several pages"),
}


@pytest.mark.parametrize("name", NO_COLOUR)
def test_broken_colour_pictures_are_named_as_what_they_are(name: str) -> None:
    data, message = NO_COLOUR[name]
    with pytest.raises(BadInput, match=message) as caught:
        decode_picture(data, LIMIT)
    assert caught.value.field == "image"


def huge_webp(width: int, height: int) -> bytes:
    """An 8x8 picture on a canvas that promises a size."""
    frame = file_of(COLOUR[:8, :8], "WEBP", lossless=True)[12:]
    canvas = bytes([2, 0, 0, 0]) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    part = bytes(6) + b"\7\0\0" * 2 + bytes(4) + frame
    data = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    data += b"ANMF" + struct.pack("<I", len(part)) + part
    return b"RIFF" + struct.pack("<I", len(data)) + data


def huge_jpeg(width: int, height: int) -> bytes:
    """A true JPEG, its frame header rewritten."""
    data = file_of(COLOUR, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [png_header, huge_webp, huge_jpeg])
@pytest.mark.parametrize("side", [300, 12_000, 16_383])
def test_a_colour_bomb_is_refused_by_its_header(make: Callable[[int, int], bytes], side: int) -> None:
    with pytest.raises(ApiError, match="image: got") as caught:
        decode_picture(make(side, side), LIMIT)
    assert caught.value.status == 413


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from([turned(), *(file_of(COLOUR, kind) for kind in ("PNG", "JPEG", "WEBP"))]),
    st.integers(0, 900),
)
def test_damage_anywhere_in_colour_is_bad_input_or_a_picture(noise: bytes, file: bytes, at: int) -> None:
    try:
        colour = decode_picture(file[:at] + noise + file[at + len(noise) :], LIMIT)
    except (BadInput, ApiError):
        return
    assert colour.shape[0] == 3 and abs(colour).max() <= 1


@pytest.mark.parametrize(("output_format", "error"), [("png", 0), ("jpeg", 12), ("webp", 12)])
def test_encoded_pictures_open_again(output_format: str, error: int) -> None:
    y, x = np.mgrid[0:40, 0:56]
    pixels = np.stack([4 * x, 5 * y, 2 * (x + y)], -1).astype(np.uint8)
    picture = Image.open(io.BytesIO(encode(pixels, output_format, 95)))
    assert picture.format == output_format.upper()
    assert abs(np.asarray(picture.convert("RGB")).astype(int) - pixels).max() <= error


def test_raw_is_the_array_itself_line_by_line_also_of_a_crop() -> None:
    crop = COLOUR[2:9, 3:14]
    np.testing.assert_array_equal(np.frombuffer(encode(crop, "raw"), np.uint8).reshape(7, 11, 3), crop)


def test_png_carries_text() -> None:
    assert Image.open(io.BytesIO(encode(COLOUR, "png", text={"seed": "7"}))).info == {"seed": "7"}
