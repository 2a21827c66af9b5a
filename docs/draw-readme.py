"""Draw docs/readme.png, the picture at the top of README.md, time its two rows, and write the caption into README.md.

    .venv/bin/python docs/draw-readme.py

One thread, one picture a call; teacher and student take turns, `--turns` times each. A busy moment can only lengthen a
call, so the figure shown is the median of the quietest third of each model's calls. Run it while nothing else runs.
"""

import argparse
import os
import statistics
import sys
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distillers import Generator
from distillers.evaluation.pictures import to_pixels
from distillers.runtime import device_name

ROOT = Path(__file__).resolve().parents[1]
TEACHER, STUDENT, STEPS = "avatars-sd-teacher", "avatars-sd-lcm-lora", 50
PROMPTS = [  # every 193rd caption of the held-out split, in its order; seeds are 0, 1, 2, ... : nothing is chosen
    "a cartoon head with orange hair, a hair bun, normal eyes, a tiny cute mouth, sunglasses, on a mint background",
    "a cartoon head with teal hair, an afro bun, angry eyes, a gap-toothed smile, a clown nose, on a lilac background",
    "a cartoon head with orange hair, braids, angry eyes, an open sad mouth, cat ears, on a lilac background",
    "a cartoon head with dark brown hair, a wavy bob, starstruck eyes, a tiny cute mouth, a tiara, "
    "on a mint background",
    "a flat portrait with brown hair, long hair, open eyes, full lips, a blue checkered shirt, on a mint background",
    "a flat portrait with black hair, a side shave, closed eyes, a surprised mouth, a pyramid mustache, "
    "a green sweater, on a white background",
    "a flat portrait with a beanie, open eyes, a big smile, a red t-shirt, on a pink background",
]
COLUMNS, GAP, LINE, SMALL = len(PROMPTS), 6, 24, 14
MARK = "<!-- picture -->"


def milliseconds(generators: dict[Generator, int], turns: int) -> list[float]:
    """Time one picture of each generator at its number of steps, in turns; the median of the quietest third, in ms."""
    spent: dict[Generator, list[float]] = {generator: [] for generator in generators}
    for turn in range(turns + 2):
        for generator, steps in generators.items():
            start = time.perf_counter()
            generator.sample([turn], prompts=[PROMPTS[turn % COLUMNS]], steps=steps)
            if turn >= 2:  # the first two warm up
                spent[generator].append(1000 * (time.perf_counter() - start))
    return [statistics.median(sorted(times)[: max(1, turns // 3)]) for times in spent.values()]


def sheet(prompts: list[str], rows: list[tuple[Tensor, str]]) -> Image.Image:
    """Draw the prompts above the columns, broken into lines, and under each row its text."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    side = rows[0][0].shape[-1]
    texts = [textwrap.wrap(prompt, side // 6) for prompt in prompts]
    top = SMALL * max(map(len, texts)) + GAP
    image = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, top + len(rows) * (side + LINE + GAP)), "white")
    draw = ImageDraw.Draw(image)
    for i, lines in enumerate(texts):
        draw.multiline_text((i * (side + GAP), 0), "\n".join(lines), fill="black", font=small, spacing=2)
    for pictures, text in rows:
        for i, pixels in enumerate(to_pixels(pictures)):
            image.paste(Image.fromarray(pixels), (i * (side + GAP), top))
        draw.text((0, top + side + LINE / 2), text, fill="black", font=font, anchor="lm")
        top += side + LINE + GAP
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
        (
            teacher.sample(seeds, prompts=PROMPTS, steps=STEPS),
            f"teacher, {STEPS} guided steps: {slow:.0f} ms a picture",
        ),
        (student.sample(seeds, prompts=PROMPTS, steps=1), f"student, 1 step: {fast:.0f} ms a picture"),
    ]
    sheet(PROMPTS, rows).save(given.out, optimize=True)
    caption = (
        f"*The same noises and held-out prompts, seeds 0 to {COLUMNS - 1}, drawn by `{TEACHER}` and `{STUDENT}`. "
        f"{slow:.0f} and {fast:.1f} ms: one thread of {device_name('cpu')}, float32 PyTorch, "
        f"{datetime.now(UTC).date()}, median of the quietest third of {given.turns} calls each in turns "
        "(`docs/draw-readme.py` draws and times this).*"
    )
    before, _, after = given.readme.read_text().split(MARK)
    given.readme.write_text(f"{before}{MARK}\n{caption}\n{MARK}{after}")


if __name__ == "__main__":
    main()
