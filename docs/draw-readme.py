"""Draw docs/readme.png, the picture at the top of README.md, time its two rows, and write the caption into README.md.

    .venv/bin/python docs/draw-readme.py

One thread, one picture a call; teacher and student take turns, `--turns` times each. A busy moment can only lengthen a
call, so the figure shown is the median of the quietest third of each model's calls. Run it while nothing else runs.
"""

import argparse
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distillers import Generator
from distillers.evaluation.pictures import to_pixels
from distillers.runtime import device_name

ROOT = Path(__file__).resolve().parents[1]
TEACHER, STUDENT, STEPS = "shapes-teacher", "shapes-dmd2", 50
COLUMNS, ZOOM, GAP, LINE = 8, 3, 4, 24
LABELS = [
    5 * i % 24 for i in range(COLUMNS)
]  # every colour and form in turn; seeds are 0, 1, 2, ... : nothing is chosen
MARK = "<!-- picture -->"


def milliseconds(generators: dict[Generator, int], turns: int) -> list[float]:
    """Time one picture of each generator at its number of steps, in turns; the median of the quietest third, in ms."""
    spent: dict[Generator, list[float]] = {generator: [] for generator in generators}
    for turn in range(turns + 2):
        for generator, steps in generators.items():
            start = time.perf_counter()
            generator.sample([turn], labels=[LABELS[turn % COLUMNS]], steps=steps)
            if turn >= 2:  # the first two warm up
                spent[generator].append(1000 * (time.perf_counter() - start))
    return [statistics.median(sorted(times)[: max(1, turns // 3)]) for times in spent.values()]


def sheet(names: list[str], rows: list[tuple[Tensor, str]]) -> Image.Image:
    """Draw the class names above the columns, and under each row its text."""
    font = ImageFont.load_default(size=15)
    side = ZOOM * rows[0][0].shape[-1]
    height = LINE + len(rows) * (side + LINE + GAP)
    image = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, height), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        draw.text((i * (side + GAP) + side / 2, LINE / 2), name, fill="black", font=font, anchor="mm")
    for k, (pictures, text) in enumerate(rows):
        top = LINE + k * (side + LINE + GAP)
        for i, pixels in enumerate(to_pixels(pictures)):
            large = np.repeat(np.repeat(pixels, ZOOM, 0), ZOOM, 1)
            image.paste(Image.fromarray(large), (i * (side + GAP), top))
        draw.text((0, top + side + LINE / 2), text, fill="black", font=font, anchor="lm")
    return image


def main() -> None:
    """Draw, time, and write the picture and its caption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=45)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "readme.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = (Generator.from_pretrained(ROOT / "weights" / name) for name in (TEACHER, STUDENT))
    slow, fast = milliseconds({teacher: STEPS, student: 1}, given.turns)
    if (load := os.getloadavg()[0]) > 1.5:
        print(f"the machine is busy (load average {load:.1f}): run this again when nothing else runs", file=sys.stderr)
    seeds = range(COLUMNS)
    rows = [
        (teacher.sample(seeds, labels=LABELS, steps=STEPS), f"teacher, {STEPS} steps: {slow:.0f} ms a picture"),
        (student.sample(seeds, labels=LABELS, steps=1), f"student, 1 step: {fast:.0f} ms a picture"),
    ]
    sheet([teacher.info.labels[label] for label in LABELS], rows).save(given.out, optimize=True)
    caption = (
        f"*The same noises and classes, seeds 0 to {COLUMNS - 1}, drawn by `{TEACHER}` and `{STUDENT}`. "
        f"{slow:.0f} and {fast:.1f} ms: one thread of {device_name('cpu')}, float32 PyTorch, "
        f"{datetime.now(UTC).date()}, median of the quietest third of {given.turns} calls each in turns "
        "(`docs/draw-readme.py` draws and times this).*"
    )
    before, _, after = given.readme.read_text().split(MARK)
    given.readme.write_text(f"{before}{MARK}\n{caption}\n{MARK}{after}")


if __name__ == "__main__":
    main()
