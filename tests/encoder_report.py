"""What a picture costs on its way out: milliseconds and bytes of every encoder on pictures of this repository.

    python tests/encoder_report.py docs/results/encoders.md

writes that page and its .json. The pictures are the grids of published folders; the encoders take turns and the median
counts. "2 threads" is what two threads encode in the time in which one encodes 1, from the least times of many short
turns: 2 where the GIL is free, 1 where it is held. A check sum of the same length stands beside it, which holds no GIL:
what it misses of 2 is the machine's other work.
"""

import io
import json
import os
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isal
import numpy as np
import PIL
from isal import isal_zlib
from PIL import Image

from app.media import png
from app.media.image_files import Pixels, encode
from distillers.evaluation.report import markdown_table, setting

SIDES = (64, 128, 256, 512, 1024)
TURNS = {64: (51, 10), 128: (31, 4), 256: (21, 1), 512: (9, 1), 1024: (5, 1)}  # turns, and calls in each, as of a batch
FOLDERS = ("weights/sar-optical-db-consistency", "weights/sar-optical-adversarial", "weights/eurosat-consistency")
Encoder = Callable[[Pixels], bytes]


def pillow(level: int) -> Encoder:
    def save(pixels: Pixels) -> bytes:
        target = io.BytesIO()
        Image.fromarray(pixels).save(target, "PNG", compress_level=level)
        return target.getvalue()

    return save


def stdlib(pixels: Pixels) -> bytes:
    """Ours, as it is where isal is not installed."""
    png.deflate = zlib
    try:
        return png.write_png(pixels)
    finally:
        png.deflate = isal_zlib


ENCODERS: dict[str, Encoder] = {
    "Pillow's PNG, level 6, its default": pillow(6),
    "Pillow's PNG, level 1": pillow(1),
    "our PNG, isal": png.write_png,
    "our PNG, stdlib zlib": stdlib,
    "JPEG, quality 90": lambda pixels: encode(pixels, "jpeg"),
    "WebP, quality 90": lambda pixels: encode(pixels, "webp"),
    "raw": lambda pixels: encode(pixels, "raw"),
}
FIRST, OURS = "Pillow's PNG, level 6, its default", "our PNG, isal"
CONTROL = "a check sum, no GIL"


def pictures(side: int) -> list[Pixels]:
    """One for each folder: its grid without the lines of text, mirrored to the side that is asked for.

    Upside down, so that the small ones are pieces of optical pictures, not of the SAR; mirrored, not repeated, since
    deflate would find the repetition.
    """
    found = []
    for folder in FOLDERS:
        grid = np.asarray(Image.open(Path(folder) / "grid.png").convert("RGB"))
        rows = grid[(grid != 255).any(2).mean(1) > 0.9]  # a label's line is white nearly everywhere
        sheet = rows[::-1, (rows != 255).any((0, 2))]
        more = [(0, max(0, side - length)) for length in sheet.shape[:2]]
        found.append(np.ascontiguousarray(np.pad(sheet, (*more, (0, 0)), mode="symmetric")[:side, :side]))
    return found


def seconds(encoder: Callable[[Pixels], object], pixels: Pixels, times: int = 1, threads: int = 1) -> float:
    """Wall time until every thread has encoded the picture so many times."""

    def work() -> None:
        for _ in range(times):
            encoder(pixels)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    started = time.perf_counter()
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    return time.perf_counter() - started


def measure(side: int) -> list[dict[str, Any]]:
    shown = pictures(side)
    for encoder in ENCODERS.values():  # the first call of each pays for more than itself
        encoder(shown[0])
    times: dict[str, list[list[float]]] = {name: [[] for _ in shown] for name in ENCODERS}
    turns, calls = TURNS[side]
    for _ in range(turns):
        for i, pixels in enumerate(shown):
            for name, encoder in ENCODERS.items():
                times[name][i].append(seconds(encoder, pixels, calls) / calls)
    ms = {name: 1e3 * statistics.mean(map(statistics.median, of)) for name, of in times.items()}
    size = {name: statistics.mean(len(encoder(p)) for p in shown) for name, encoder in ENCODERS.items()}
    return [
        {"side": side, "encoder": name, "ms": ms[name], "bytes": size[name], "times_faster": ms[FIRST] / ms[name],
         "times_size": size[name] / size[FIRST]}
        for name in ENCODERS
    ]  # fmt: skip


def scaling(side: int = 256, turns: int = 60) -> dict[str, float]:
    """Encoder -> what two threads encode in the time in which one encodes 1."""
    pixels = pictures(side)[0]
    long = bytes(1 << 21)
    contestants: dict[str, Callable[[Pixels], object]] = {**ENCODERS, CONTROL: lambda _: zlib.crc32(long)}
    del contestants["raw"]  # a copy: over before a second thread has started
    calls = {name: max(1, round(0.01 / seconds(call, pixels))) for name, call in contestants.items()}
    least: dict[tuple[str, int], float] = {}
    for _ in range(turns):
        for name, call in contestants.items():
            for threads in (1, 2):
                took = seconds(call, pixels, calls[name], threads)
                least[name, threads] = min(took, least.get((name, threads), took))
    return {name: 2 * least[name, 1] / least[name, 2] for name in contestants}


def main() -> None:
    """Measure, write both files."""
    page = Path(sys.argv[1])
    rows = [row for side in SIDES for row in measure(side)]
    threads, where = scaling(), setting("cpu") | {"pillow": PIL.__version__, "isal": isal.__version__}
    where |= {"zlib": zlib.ZLIB_RUNTIME_VERSION, "numpy": np.__version__}
    page.parent.mkdir(parents=True, exist_ok=True)
    content = {"setting": where, "pictures": FOLDERS, "rows": rows, "two_threads_256": threads}
    page.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    columns: list[Any] = [
        ("encoder", lambda name: name, ""),
        *((f"{side} px: ms", lambda name, side=side: f"{at(rows, side, name)['ms']:.3g}", "") for side in SIDES),
        ("2 threads", lambda name: threads.get(name), ".2f"),
    ]  # fmt: skip
    sizes: list[Any] = [
        ("encoder", lambda name: name, ""),
        *((f"{side} px: KiB", lambda name, side=side: at(rows, side, name)["bytes"] / 1024, ".1f") for side in SIDES),
    ]
    gains: list[Any] = [
        ("our PNG, isal, against Pillow's default", lambda side: f"{side} px", ""),
        ("times faster", lambda side: at(rows, side, OURS)["times_faster"], ".1f"),
        ("bytes", lambda side: f"{100 * (at(rows, side, OURS)['times_size'] - 1):+.1f} %", ""),
    ]
    names = list(ENCODERS)
    lines = [
        "# Encoders", "", markdown_table(gains, SIDES), "", markdown_table(columns, names), "",
        markdown_table(sizes, names), "",
        f"RGB pictures made of the grids of {', '.join(FOLDERS)}; medians of {TURNS[64][0]} (64 px) to "
        f"{TURNS[1024][0]} (1024 px) turns of one thread. 2 threads: what two encode at 256 px in the time in which "
        f"one encodes 1; a check sum that holds no GIL reached {threads[CONTROL]:.2f} in the same minutes. "
        f"{where['device']}, Python {sys.version.split()[0]}, Pillow {where['pillow']}, isal {where['isal']}, zlib "
        f"{where['zlib']}, numpy {where['numpy']}, {where['date']}.", "",
        f"`python tests/encoder_report.py {page}` makes this page again.", "",
    ]  # fmt: skip
    page.write_text("\n".join(lines))


def at(rows: list[dict[str, Any]], side: int, name: str) -> dict[str, Any]:
    """The row of one encoder at one side."""
    return next(row for row in rows if (row["side"], row["encoder"]) == (side, name))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
