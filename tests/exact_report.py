"""Trains students on exact teachers with the real loop and holds them against the exact flow map.

    python tests/exact_report.py consistency --out docs/results/exact

writes consistency.png and consistency.json: three seeds on the ring and on an asymmetric mixture.
"""

import argparse
import colorsys
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from distillers.distiller import Distiller
from distillers.methods.consistency import Consistency
from distillers.teacher import Teacher
from distillers.toy import GaussianMixture, Points, asymmetric, exact_teacher, ring
from distillers.trainer import TrainSettings, _Run

MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"ring": ring, "asymmetric": lambda: asymmetric(0)}
METHODS: dict[str, Distiller] = {"consistency": Consistency(points=20, steps=(1, 2, 4))}
SETTINGS = TrainSettings(
    iterations=4000, batch=256, learning_rate=2e-2, warmup=100, decay="cosine", clip=10.0, ema=0.99, tracker="none"
)


@dataclass(frozen=True)
class Verdict:
    """One-step map against the exact flow map, over fixed noises."""

    rmse: float  # root of the mean squared distance between the two end points
    mode_agreement: float  # share of noises that both carry to the same mode


def train_on(teacher: Teacher, mixture: GaussianMixture, distiller: Distiller, settings: TrainSettings) -> _Run:
    """`train`'s own iterations (draws, turns, optimizers, clipping, averages), without its files and pictures."""
    torch.manual_seed(settings.seed)
    run = _Run(distiller, teacher, settings, Accelerator(cpu=True), Path(tempfile.gettempdir()), {})
    data = Points(mixture)
    for i in range(settings.iterations):
        run.iteration(i, data)
    return run


@lru_cache
def exact_map(name: str) -> tuple[Tensor, Tensor]:
    """4000 fixed noises and where the exact probability flow carries them, float32 and float64 (4000, 2)."""
    mixture = MIXTURES[name]()
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(4000))
    return noise, mixture.flow_map(noise, mixture.schedule.t_max, mixture.schedule.t_min)


@torch.no_grad()
def judge(generator: nn.Module, name: str) -> Verdict:
    """The generator as it leaves the house, called once for each noise."""
    mixture, (noise, exact) = MIXTURES[name](), exact_map(name)
    given = generator(noise, steps=1)
    agree = mixture.mode_of(given) == mixture.mode_of(exact)
    return Verdict(float((given - exact).square().sum(1).mean().sqrt()), float(agree.double().mean()))


def picture(rows: Sequence[Sequence[tuple[str, Tensor, Tensor]]], path: Path) -> None:
    """Rows of panels (title, noise (N, 2), points (N, 2)); a point has the hue of its noise's direction."""
    side, title_height, gap, radius, scale = 480, 26, 10, 1.6, 110
    size = len(rows[0]) * (side + gap) - gap, len(rows) * (side + title_height + gap) - gap
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for i, panels in enumerate(rows):
        for j, (title, noise, points) in enumerate(panels):
            left, top = j * (side + gap), i * (side + title_height + gap) + title_height
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=(250, 250, 250), outline=(210, 210, 210))
            draw.text((left + 4, top - title_height + 3), title, fill="black", font=font)
            for (nx, ny), (x, y) in zip(noise.tolist(), points.tolist(), strict=True):
                value = 0.95 - 0.5 * min(1.0, math.hypot(nx, ny) / 3)
                hue = colorsys.hsv_to_rgb(math.atan2(ny, nx) / math.tau % 1, 0.85, value)
                dx, dy = scale * x, -scale * y
                if max(abs(dx), abs(dy)) < side / 2 - radius:
                    cx, cy = left + side / 2 + dx, top + side / 2 + dy
                    draw.ellipse(
                        (cx - radius, cy - radius, cx + radius, cy + radius), fill=tuple(round(255 * c) for c in hue)
                    )
    sheet.save(path, "PNG", optimize=True)


def report(method: str, out: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Train every seed on every mixture; write METHOD.png (first seed) and METHOD.json."""
    out.mkdir(parents=True, exist_ok=True)
    runs, rows = [], []
    for name, make in MIXTURES.items():
        noise, exact = exact_map(name)
        panels = [("noise", noise, noise), (f"{name}: exact flow map", noise, exact)]
        for seed in seeds:
            began = time.process_time()
            run = train_on(exact_teacher(make(), seed), make(), METHODS[method], replace(SETTINGS, seed=seed))
            verdict = judge(run.generator(), name)
            runs.append(
                {"mixture": name, "seed": seed, **asdict(verdict), "cpu_seconds": round(time.process_time() - began, 1)}
            )
            print(json.dumps(runs[-1]), flush=True)
            if seed == seeds[0]:
                with torch.no_grad():
                    panels.append(
                        (f"{method}, one step: RMSE {verdict.rmse:.3f}", noise, run.generator()(noise, steps=1))
                    )
        rows.append(panels)
    picture(rows, out / f"{method}.png")
    about = {
        "method": method,
        "options": asdict(METHODS[method]),
        "training": asdict(SETTINGS),
        "reference": "RK4, 600 steps, float64, 4000 fixed noises; rmse = root mean squared distance of the end points",
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
    }
    (out / f"{method}.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("method", choices=METHODS)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    given = arguments.parse_args()
    report(given.method, given.out)
