"""The PNG writer: exactly the pixels, whatever they are and however they lie in memory, on both deflates."""

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from app.media import png
from app.media.png import write_png
from distillers.errors import BadInput

BOTH = pytest.mark.parametrize("deflate", [isal_zlib, zlib], ids=["isal", "stdlib"])
GRIDS = sorted((Path(__file__).parents[1] / "weights").glob("*/grid.png"))


@pytest.fixture
def on(deflate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "deflate", deflate)


def chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every chunk, its check sum checked."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(file):
        size, kind = struct.unpack(">I4s", file[at : at + 8])
        data = file[at + 8 : at + 8 + size]
        assert file[at + 8 + size : at + 12 + size] == struct.pack(">I", zlib.crc32(kind + data))
        yield kind, data
        at += 12 + size


def read(file: bytes) -> NDArray:
    Image.open(io.BytesIO(file)).verify()
    return np.asarray(Image.open(io.BytesIO(file)))


def pillow(pixels: NDArray, **options: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG", **options)
    return target.getvalue()


@st.composite
def pictures(draw: st.DrawFn) -> NDArray:
    """1..70 pixels a side, grey, RGB or RGBA; noise, or few values; whole, cropped, mirrored, thinned or turned."""
    bands = draw(st.sampled_from([(), (3,), (4,)]))
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 70)), *bands)
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    values = draw(st.just(range(256)) | st.lists(st.integers(0, 255), min_size=1, max_size=4))
    whole = rng.choice(np.array(values, np.uint8), shape)
    pixels = whole[draw(arrays.basic_indices(shape[:2], min_dims=2, allow_newaxis=False, allow_ellipsis=False))]
    return pixels.swapaxes(0, 1) if draw(st.booleans()) else pixels


@BOTH
def test_pillow_reads_exactly_the_same_pixels(deflate: ModuleType, on: None) -> None:
    seen = set()

    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
    )
    @given(pictures(), st.sampled_from([1, 100, png.BLOCK]))
    def holds(pixels: NDArray, block: int) -> None:
        if not pixels.size:
            return
        seen.add(pixels.flags.c_contiguous)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(png, "BLOCK", block)  # one line at a time, a few, and all at once
            file = write_png(pixels)
        np.testing.assert_array_equal(read(file), pixels)
        kinds = [kind for kind, _ in chunks(file)]
        assert kinds == [b"IHDR", b"IDAT", b"IEND"]

    holds()
    assert seen == {True, False}


def test_all_neighbours_are_guessed_as_the_standard_says() -> None:
    """Every (left, upper, corner) of a coarse grid, ties among them, against the standard's own words."""
    values = (0, 1, 2, 3, 4, 100, 101, 102, 104, 127, 128, 250, 254, 255)
    for left, upper, corner in ((a, b, c) for a in values for b in values for c in values):
        guess = left + upper - corner
        nearest = min((left, upper, corner), key=lambda v: abs(guess - v))  # in this order, where they tie
        filtered = png._filtered(np.array([[[corner], [upper]], [[left], [7]]], np.uint8), 0, 2)
        assert filtered[1, 2] == (7 - nearest) % 256, (left, upper, corner)


@BOTH
@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("file", GRIDS, ids=lambda path: path.parent.name)
def test_real_pictures_are_hardly_larger_than_pillows(file: Path, side: int, deflate: ModuleType, on: None) -> None:
    pixels = np.asarray(Image.open(file))[22 : 22 + side, 2 : 2 + side]
    flat = file.parent.name.startswith(("shapes", "avatars"))  # of few colours: a few kilobytes in all
    most = 1.3 if flat else 1.2 if deflate is zlib else 1.1
    assert len(write_png(pixels)) <= most * len(pillow(pixels))


@BOTH
def test_a_smooth_picture_is_small(deflate: ModuleType, on: None) -> None:
    y, x = np.mgrid[0:256, 0:256]
    pixels = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    assert len(write_png(pixels)) < 0.02 * pixels.nbytes


@BOTH
def test_other_threads_run_while_it_deflates(deflate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is made to hand over the GIL here, so that the other one runs only where the writer lets it go."""
    pixels = np.random.default_rng(0).integers(0, 64, (512, 512, 3), np.uint8)
    turns, meanwhile, done, interval = 0, 0, threading.Event(), sys.getswitchinterval()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)

    class Watched:
        def __init__(self, level: int) -> None:
            self.stream = deflate.compressobj(level)
            self.flush = self.stream.flush

        def compress(self, lines: NDArray) -> bytes:
            nonlocal meanwhile
            before = turns
            part = self.stream.compress(lines)
            meanwhile += turns > before
            return part

    watched = SimpleNamespace(__name__=deflate.__name__, crc32=deflate.crc32, compressobj=Watched)
    monkeypatch.setattr(png, "deflate", watched)
    thread = threading.Thread(target=count)
    sys.setswitchinterval(100)
    try:
        thread.start()
        for _ in range(300):  # a busy machine lets the other thread wait
            write_png(pixels)
            if meanwhile > 5:
                break
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert meanwhile > 5


TEXTS = st.dictionaries(
    st.text(st.characters(codec="latin-1", categories=("L", "N", "P", "S")), min_size=1, max_size=79),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=200),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_text_comes_back_before_the_pixels_are_read(text: dict[str, str]) -> None:
    file = write_png(np.zeros((4, 4, 3), np.uint8), text)
    assert Image.open(io.BytesIO(file)).info == text
    kinds = [kind for kind, _ in chunks(file)]
    latin = [b"tEXt" if all(ord(letter) < 256 for letter in value) else b"iTXt" for value in text.values()]
    assert kinds == [b"IHDR", *latin, b"IDAT", b"IEND"]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("", "a"), (" a", "a"), ("a ", "a"), ("a  b", "a"), ("a\nb", "a"), ("a" * 80, "a"), ("Schlüssel\u2028", "a"),
     ("σ", "a"), ("a\0b", "a"), ("a", "b\0c"), ("a", "\ud800")],
)  # fmt: skip
def test_text_that_no_png_can_hold_is_refused(keyword: str, value: str) -> None:
    with pytest.raises(BadInput, match="text: got"):
        write_png(np.zeros((4, 4), np.uint8), {keyword: value})


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4), np.uint8),
     np.zeros((4, 0, 3), np.uint8), np.zeros(4, np.uint8), np.zeros((), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)],
    ids=lambda pixels: f"{pixels.shape} {pixels.dtype}",
)  # fmt: skip
def test_arrays_that_are_no_picture_are_refused(pixels: NDArray) -> None:
    with pytest.raises(BadInput, match=r"pixels: got .* uint8"):
        write_png(pixels)


@pytest.mark.process
def test_it_works_where_isal_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['isal'] = None\n"
        "import zlib, numpy as np; from app.media import png\n"
        "assert png.deflate is zlib\n"
        "sys.stdout.buffer.write(png.write_png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))"
    )
    file = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    np.testing.assert_array_equal(read(file), np.arange(48).reshape(4, 4, 3))
