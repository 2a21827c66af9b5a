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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from distillers.distiller import Distiller
from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot, signal
from distillers.methods.consistency import Consistency
from distillers.methods.diffusion import Diffusion
from distillers.methods.disback import DisBack
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.scm import ContinuousConsistency
from distillers.teacher import Teacher
from distillers.toy import ExactTeacher, GaussianMixture, Points, asymmetric, energy_distance, exact_teacher, ring
from distillers.trainer import Run, TrainSettings

MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"ring": ring, "asymmetric": lambda: asymmetric(0)}
SETTINGS = TrainSettings(
    iterations=4000, batch=256, learning_rate=2e-2, warmup=100, decay="cosine", clip=10.0, ema=0.99, tracker="none"
)


@dataclass(frozen=True)
class Proof:
    """A method as it is proved: what it trains, how, and what its students start as."""

    distiller: Distiller
    settings: TrainSettings = SETTINGS
    trained_start: bool = False  # students start as a network taught by score matching, as they do on pictures
    frequencies: int = 6  # octaves of the network's time features


# the critic has to keep up with the student: three times its rate, and no momentum (two time scales)
MATCHING = replace(
    SETTINGS, iterations=1500, learning_rate=1e-3, learning_rates={"critic": 3e-3}, betas=(0.0, 0.99), clip=10.0
)
PROOFS: dict[str, Proof] = {
    "consistency": Proof(Consistency(points=20, steps=(1, 2, 4))),
    # the tangent needs a slow clock, a start that knows the scores, and times up to where only noise is left
    "scm": Proof(
        ContinuousConsistency(tangent="clipped", tangent_warmup=0.25, log_mean=0.0, log_std=2.0, weight_cap=1e9),
        replace(SETTINGS, iterations=2500, learning_rate=5e-3),
        trained_start=True,
        frequencies=1,
    ),
    "hyper_sd": Proof(HyperSD(points=32, solver="heun", adversarial_weights=(0.0, 0.0, 0.0, 0.0))),
    "boot": Proof(Boot(delta=0.08, solver="heun"), replace(SETTINGS, iterations=6000)),
    # a picture of what the game does; at weight 0 it is `consistency`, which the tests hold it to
    "adversarial_consistency": Proof(
        AdversarialConsistency(points=20, solver="heun", adversarial_weight=0.02, layers=("layers.3",)),
        replace(SETTINGS, iterations=2500),
    ),
    # these match the distribution and no map: judged by their samples
    "dmd2": Proof(Dmd2(), MATCHING, trained_start=True),
    "sid": Proof(Dmd2(loss="sid", alpha=1.0), MATCHING, trained_start=True),
    "disback": Proof(DisBack(), replace(MATCHING, iterations=2000), trained_start=True),
}
SAMPLES = ("dmd2", "sid", "disback")  # judged by their samples, for nothing ties a noise to a point


@dataclass(frozen=True)
class Verdict:
    """One-step map against the exact flow map, over fixed noises."""

    rmse: float  # root of the mean squared distance between the two end points
    mode_agreement: float  # share of noises that both carry to the same mode


def train_on(teacher: Teacher, mixture: GaussianMixture, distiller: Distiller, settings: TrainSettings) -> Run:
    """`train`'s own iterations (draws, turns, optimizers, clipping, averages), without its files and pictures."""
    *_, run = stages_of(teacher, mixture, distiller, settings, 1)
    return run


def stages_of(
    teacher: Teacher, mixture: GaussianMixture, distiller: Distiller, settings: TrainSettings, stages: int
) -> Iterator[Run]:
    """The same, paused at the end of each of so many equal stages."""
    torch.manual_seed(settings.seed)
    run = Run(distiller, teacher, settings, Accelerator(cpu=True), Path(tempfile.gettempdir()), {})
    data = Points(mixture)
    for i in range(settings.iterations):
        run.iteration(i, data)
        if (i + 1) * stages % settings.iterations == 0:
            yield run


def teacher_for(proof: Proof, name: str, seed: int) -> ExactTeacher:
    """The exact teacher of a mixture, and what its students start as."""
    mixture = MIXTURES[name]()
    teacher = exact_teacher(mixture, seed, frequencies=proof.frequencies)
    if not proof.trained_start:
        return teacher
    settings = replace(SETTINGS, iterations=2000, learning_rate=5e-3, seed=seed)
    start = train_on(teacher, mixture, Diffusion(), settings).generator().denoiser
    return replace(teacher, denoiser=start)


def prove(method: str, name: str, seed: int) -> tuple[Run, dict[str, float]]:
    """Train a method's proof; what it reached, by name. Segments are judged at the end of each stage."""
    proof, mixture = PROOFS[method], MIXTURES[name]()
    teacher, settings = teacher_for(proof, name, seed), replace(proof.settings, seed=seed)
    if not isinstance(proof.distiller, HyperSD):
        run = train_on(teacher, mixture, proof.distiller, settings)
        if method in SAMPLES:
            return run, judge_samples(run.generator(), mixture)
        found = asdict(judge(run.generator(), name))
        return run, found | (signal_deviation(run, name) if method == "boot" else {})
    found, whole = {}, proof.distiller
    for i, run in enumerate(stages_of(teacher, mixture, whole, settings, len(whole.segments)), 1):
        part = replace(whole, segments=whole.segments[:i], adversarial_weights=whole.adversarial_weights[:i])
        run.distiller = part
        verdict = judge(run.generator(), name, steps=whole.segments[i - 1])
        run.distiller = whole
        found |= {f"rmse_{whole.segments[i - 1]}_steps": verdict.rmse}
    return run, asdict(verdict) | found


@lru_cache
def exact_map(name: str) -> tuple[Tensor, Tensor]:
    """4000 fixed noises and where the exact probability flow carries them, float32 and float64 (4000, 2)."""
    mixture = MIXTURES[name]()
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(4000))
    return noise, mixture.flow_map(noise, mixture.schedule.t_max, mixture.schedule.t_min)


@torch.no_grad()
def judge(generator: nn.Module, name: str, steps: int = 1) -> Verdict:
    """The generator as it leaves the house, from each noise in so many calls."""
    mixture, (noise, exact) = MIXTURES[name](), exact_map(name)
    given = generator(noise, steps=steps)
    agree = mixture.mode_of(given) == mixture.mode_of(exact)
    return Verdict(float((given - exact).square().sum(1).mean().sqrt()), float(agree.double().mean()))


@torch.no_grad()
def judge_samples(generator: nn.Module, mixture: GaussianMixture, steps: int = 1) -> dict[str, float]:
    """8000 samples: energy distance to as many exact ones (two exact sets: 0.0003), and the modes' shares."""
    samples = generator(torch.randn(8000, 2, generator=torch.Generator().manual_seed(8000)), steps=steps)
    exact = mixture.sample(8000, torch.Generator().manual_seed(8001))
    shares = torch.bincount(mixture.mode_of(samples), minlength=len(mixture.weights)).double() / len(samples)
    return {
        "energy": energy_distance(samples, exact),
        "least_share": float(shares.min()),
        "share_error": float((shares - mixture.weights).abs().max()),
    }


@torch.no_grad()
def signal_deviation(run: Run, name: str) -> dict[str, float]:
    """BOOT's y(eps, t) along the trajectory: its standard deviation over the exact one's."""
    mixture, (noise, _), found = MIXTURES[name](), exact_map(name), {}
    schedule, student = mixture.schedule, run.averages["student"]
    for share in (0.0, 0.25, 0.5, 0.75):
        t = schedule.spaced(torch.tensor(share, dtype=torch.float64))
        exact = mixture.flow_map(noise, schedule.t_max, float(t))
        exact = (exact - schedule.sigma(t) * noise) / schedule.alpha(t)
        found[f"std_ratio_at_{share}"] = float(signal(student, noise, t).std(0).norm() / exact.std(0).norm())
    return found


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
    for name in MIXTURES:
        noise, exact = exact_map(name)
        panels = [("noise", noise, noise), (f"{name}: exact flow map", noise, exact)]
        for seed in seeds:
            began = time.process_time()
            run, found = prove(method, name, seed)
            seconds = round(time.process_time() - began, 1)
            runs.append({"mixture": name, "seed": seed, **found, "cpu_seconds": seconds})
            print(json.dumps(runs[-1]), flush=True)
            if seed == seeds[0]:
                with torch.no_grad():
                    figure, value = next(iter(found.items()))
                    title = f"{method}, one step: {figure} {value:.3f}"
                    panels.append((title, noise, run.generator()(noise, steps=1)))
        rows.append(panels)
    picture(rows, out / f"{method}.png")
    about = {
        "method": method,
        "options": asdict(PROOFS[method].distiller),
        "training": asdict(PROOFS[method].settings),
        "reference": "8000 samples of the mixture itself; energy distance, shares of the modes"
        if method in SAMPLES
        else "RK4, 600 steps, float64, 4000 fixed noises; rmse = root mean squared distance of the end points",
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
    }
    (out / f"{method}.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("method", choices=PROOFS)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    given = arguments.parse_args()
    report(given.method, given.out)
