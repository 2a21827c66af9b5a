"""Trains students on exact teachers with the real loop and holds them against the exact flow map.

    python tests/proofs/exact_report.py consistency --out docs/results/exact

writes consistency.png and consistency.json: three seeds on the ring and on an asymmetric mixture. Runs of another
machine are kept beside; ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE adds up as a processor without vectors does.
`python tests/proofs/exact_margins.py` then says how far every figure is from its limit.
"""

import argparse
import colorsys
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from gaussians import under
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import chi2
from torch import Tensor, nn

from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot, signal
from distillers.methods.consistency import Consistency
from distillers.methods.diffusion import Diffusion
from distillers.methods.disback import DisBack
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.scm import ContinuousConsistency
from distillers.models.schedule import Prediction, VariancePreserving
from distillers.runtime import device_name
from distillers.teacher import Teacher
from distillers.training.distiller import Distiller
from distillers.training.settings import TrainSettings
from distillers.training.toy import (
    ExactTeacher,
    GaussianMixture,
    Points,
    asymmetric,
    energy_distance,
    exact_teacher,
    random_mixture,
    ring,
)
from distillers.training.trainer import Run, begin

MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"ring": ring, "asymmetric": lambda: asymmetric(0)}
PLANE = tuple(MIXTURES)
VP = VariancePreserving.from_betas()
MIXTURES |= {f"{name}-vp": partial(under, VP, of()) for name, of in MIXTURES.items()}
# every other one under the schedule of stock teachers; 2 to 8 dimensions, 5 to 9 modes
RANDOM = {f"random-{i}": partial(random_mixture, i, VP if i % 2 else None) for i in range(8)}
MIXTURES |= RANDOM
SETTINGS = TrainSettings(
    iterations=4000, batch=256, learning_rate=2e-2, warmup=100, decay="cosine", clip=10.0, ema=0.99, tracker="none"
)


@dataclass(frozen=True)
class Proof:
    """A method as it is proved: what it trains, how, and what its students start as."""

    distiller: Distiller
    settings: TrainSettings = SETTINGS
    start: int = 0  # iterations of score matching behind what students start as; 0: random weights, not as on pictures
    frequencies: int = 6  # octaves of the network's time features
    prediction: Prediction = "v"  # of the network
    mixtures: tuple[str, ...] = PLANE  # on which it is proved

    def brief(self) -> "Proof":
        """Return the proof as the tests train it: after a quarter of the iterations right and wrong are far apart."""
        return replace(self, settings=brief(self.settings), start=self.start // 3)


def brief(settings: TrainSettings) -> TrainSettings:
    """Take a quarter of the iterations, and of their warm-up."""
    return replace(settings, iterations=settings.iterations // 4, warmup=settings.warmup // 4)


# the critic has to keep up with the student: three times its rate, and no momentum (two time scales)
MATCHING = replace(
    SETTINGS, iterations=1500, learning_rate=1e-3, learning_rates={"critic": 3e-3}, betas=(0.0, 0.99), clip=10.0
)
SCM = ContinuousConsistency(
    sigma_data=1.0, tangent="clipped", tangent_step=0.0, tangent_warmup=0.25, log_mean=0.0, log_std=2.0, weight_cap=1e9
)
PROOFS: dict[str, Proof] = {
    "consistency": Proof(Consistency(points=20, steps=(1, 2, 4))),
    # at the student's own rate here the learnt weight runs away with noisy losses, at a picture recipe's it follows;
    # the tangent needs a slow clock, a start that knows the scores, and times up to where only noise is left
    "scm": Proof(
        SCM,
        replace(SETTINGS, iterations=2500, learning_rate=5e-3, learning_rates={"weight": 1e-4}),
        start=2000,
        frequencies=1,
    ),
    # six octaves of time features: the exact tangent diverges there, a difference over 0.05 radians does not
    "scm_fast_clock": Proof(
        replace(SCM, tangent_step=0.05),
        replace(SETTINGS, iterations=2500, learning_rate=5e-3, learning_rates={"weight": 1e-4}),
        start=2000,
        mixtures=("ring",),
    ),
    "hyper_sd": Proof(
        HyperSD(points=32, solver="heun", adversarial_weights=(0.0, 0.0, 0.0, 0.0)), replace(SETTINGS, iterations=8000)
    ),
    "tuning": Proof(Consistency(source="data"), mixtures=("ring-vp",)),
    "boot": Proof(Boot(delta=0.08, solver="heun"), replace(SETTINGS, iterations=6000)),
    # a picture of what the game does; at weight 0 it is `consistency`, which the tests hold it to
    "adversarial_consistency": Proof(
        AdversarialConsistency(points=20, solver="heun", adversarial_weight=0.02, layers=("layers.3",)),
        replace(SETTINGS, iterations=2500),
    ),
    # these match the distribution and no map: judged by their samples
    "dmd2": Proof(Dmd2(), MATCHING, start=2000),
    "sid": Proof(Dmd2(loss="sid", alpha=1.0), MATCHING, start=2000),
    # the way back carries weight from mode to mode, and only a rate that does not decay brings it home in time
    "disback": Proof(DisBack(), replace(MATCHING, iterations=2000, decay="constant"), start=2000),
}
# what recipes run: the schedule of stock teachers, forty points, other heads, half precision, every term of dmd2
VPS = ("ring-vp",)
PROOFS |= {
    "consistency_vp": Proof(Consistency(points=40, first_points=5), mixtures=VPS),
    "consistency_x0": Proof(Consistency(points=40, first_points=5), mixtures=VPS, prediction="x0"),
    "consistency_bf16": Proof(
        Consistency(points=40, first_points=5), replace(SETTINGS, precision="bf16"), mixtures=VPS
    ),
    "boot_vp": Proof(Boot(delta=0.08, solver="heun"), SETTINGS, mixtures=VPS),
    "dmd2_vp": Proof(
        Dmd2(steps=(1, 2), gan_weight=0.03, layers=("layers.5",), pairs=512, pair_steps=40),
        MATCHING,
        start=2000,
        mixtures=VPS,
    ),
}
SAMPLES = ("dmd2", "sid", "disback", "dmd2_vp")  # judged by their samples, for nothing ties a noise to a point

# How far from its ideal (0, or what IDEAL says) a figure may be after a brief training, the tests' own. Sums differ
# between processors, so each is at least 1.3 times the worst of several seeds (docs/results/exact/margins.md). The
# distance alone would pass a student that sends a few noises to the wrong mode, the agreement alone one that is a
# little off everywhere. A share error below 0.03 leaves every mode of the ring more than three quarters of its samples.
IDEAL = {"mode_agreement": 1.0} | {f"std_ratio_at_{share}": 1.0 for share in (0.0, 0.25, 0.5, 0.75)}
LIMITS: dict[str, dict[str, float]] = {
    "consistency": {"rmse": 0.30, "mode_agreement": 0.06},
    "consistency_x0": {"rmse": 0.32, "mode_agreement": 0.06},
    "scm": {"rmse": 0.25, "mode_agreement": 0.05},
    "scm_fast_clock": {"rmse": 0.50},
    "hyper_sd": {
        "rmse": 0.20,
        "mode_agreement": 0.04,
        "rmse_8_steps": 0.32,
        "rmse_4_steps": 0.28,
        "rmse_2_steps": 0.28,
    },
    "boot": {"rmse": 0.30, "mode_agreement": 0.08} | {k: 0.08 for k in IDEAL if k.startswith("std")},
    "boot_vp": {"rmse": 0.36, "mode_agreement": 0.09},
    **{method: {"energy": 0.018, "share_error": 0.03} for method in ("dmd2", "sid", "disback")},
}
BROKEN_BY = 1.5  # times the limit: what a broken copy of the method must exceed


def strain(method: str, found: dict[str, float]) -> dict[str, float]:
    """Each figure's distance from its ideal over what is allowed: a method passes if all are below 1."""
    limits = LIMITS[method]
    return {k: abs(value - IDEAL.get(k, 0.0)) / limits[k] for k, value in found.items() if k in limits}


def hold(method: str, mixture: str) -> None:
    """Train a method's proof briefly on seed 0 and hold every figure to its limit, as the tests do."""
    found = prove(method, mixture, seed=0, proof=PROOFS[method].brief())[1]
    taken = strain(method, found)
    assert taken.keys() == LIMITS[method].keys() and all(share < 1 for share in taken.values()), found


@dataclass(frozen=True)
class Verdict:
    """One-step map against the exact flow map, over fixed noises."""

    rmse: float  # root of the mean squared distance between the two end points
    mode_agreement: float  # share of noises that both carry to the same mode
    median_error: float  # median of that distance: what a noise far from any border between modes is off by
    off_manifold: float  # share of the end points that lie at no mode


def train_on(teacher: Teacher, mixture: GaussianMixture, distiller: Distiller, settings: TrainSettings) -> Run:
    """`train`'s own iterations (draws, turns, optimizers, clipping, averages), without its files and pictures."""
    *_, run = stages_of(teacher, mixture, distiller, settings, [1.0])
    return run


def stages_of(
    teacher: Teacher, mixture: GaussianMixture, distiller: Distiller, settings: TrainSettings, ends: Sequence[float]
) -> Iterator[Run]:
    """The same, paused whenever such a share of it is done."""
    torch.manual_seed(settings.seed)
    run = begin(distiller, teacher, settings, Path(tempfile.gettempdir()), device="cpu")
    data, pauses = Points(mixture), [math.ceil(end * settings.iterations) for end in ends]
    for i in range(settings.iterations):
        run.iteration(i, data)
        if i + 1 in pauses:
            yield run


def teacher_for(proof: Proof, name: str, seed: int) -> ExactTeacher:
    """The exact teacher of a mixture, and what its students start as."""
    if proof.start:
        return _trained_teacher(name, seed, proof.start, proof.frequencies, proof.prediction)
    return exact_teacher(MIXTURES[name](), seed, proof.prediction, proof.frequencies)


@lru_cache
def _trained_teacher(name: str, seed: int, start: int, frequencies: int, prediction: Prediction) -> ExactTeacher:
    """Train the network that students of several methods start as, once."""
    mixture = MIXTURES[name]()
    teacher = exact_teacher(mixture, seed, prediction, frequencies)
    settings = replace(SETTINGS, iterations=start, warmup=start // 20, learning_rate=5e-3, seed=seed)
    return replace(teacher, denoiser=train_on(teacher, mixture, Diffusion(), settings).generator().denoiser)


def prove(method: str, name: str, seed: int, proof: Proof | None = None) -> tuple[Run, dict[str, float]]:
    """Train a method's proof; what it reached, by name. Segments are judged at the end of each stage."""
    proof, mixture = proof or PROOFS[method], MIXTURES[name]()
    teacher, settings = teacher_for(proof, name, seed), replace(proof.settings, seed=seed)
    if not isinstance(proof.distiller, HyperSD):
        run = train_on(teacher, mixture, proof.distiller, settings)
        if method in SAMPLES:
            return run, judge_samples(run.generator(), mixture)
        found = asdict(judge(run.generator(), name))
        return run, found | (signal_deviation(run, name) if method == "boot" else {})
    found, whole = {}, proof.distiller
    for i, run in enumerate(stages_of(teacher, mixture, whole, settings, [*whole.stage_starts()[1:], 1.0]), 1):
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
    noise = torch.randn(4000, mixture.means.shape[1], generator=torch.Generator().manual_seed(4000))
    return noise, mixture.flow_map(noise, mixture.schedule.t_max, mixture.schedule.t_min)


@torch.no_grad()
def judge(generator: nn.Module, name: str, steps: int = 1) -> Verdict:
    """The generator as it leaves the house, from each noise in so many calls."""
    mixture, (noise, exact) = MIXTURES[name](), exact_map(name)
    given = generator(noise, steps=steps)
    agree = mixture.mode_of(given) == mixture.mode_of(exact)
    distance = (given - exact).square().sum(1).sqrt()
    rmse, median = float(distance.square().mean().sqrt()), float(distance.median())
    return Verdict(rmse, float(agree.double().mean()), median, off_manifold(given, mixture))


def off_manifold(points: Tensor, mixture: GaussianMixture) -> float:
    """The share of points further from every mode than 4 of its std in the plane, which 0.03 % of exact ones are.

    In D dimensions the radius is the one that as many exact points exceed: the distance of a Gaussian point grows with
    the square root of D.
    """
    radius = math.sqrt(chi2.isf(math.exp(-8), mixture.means.shape[1]))
    nearest = (torch.cdist(points.double(), mixture.means) / mixture.stds).amin(1)
    return float((nearest > radius).double().mean())


@torch.no_grad()
def judge_samples(generator: nn.Module, mixture: GaussianMixture, steps: int = 1) -> dict[str, float]:
    """Energy distance of 8000 samples to as many exact ones (two exact sets: 0.0003); the modes' shares of 100,000."""
    samples, many = (
        generator(torch.randn(n, mixture.means.shape[1], generator=torch.Generator().manual_seed(n)), steps=steps)
        for n in (8000, 100_000)
    )
    exact = mixture.sample(8000, torch.Generator().manual_seed(8001))
    shares = torch.bincount(mixture.mode_of(many), minlength=len(mixture.weights)).double() / len(many)
    return {
        "energy": energy_distance(samples, exact),
        "least_share": float(shares.min()),
        "share_error": float((shares - mixture.weights).abs().max()),
        "off_manifold": off_manifold(many, mixture),
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


def machine() -> dict[str, Any]:
    """What a run was measured on: two machines whose entries differ may add up in another order."""
    return {
        "device": device_name("cpu"),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def kept(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a report written before under the same settings, on other machines or of other seeds."""
    if not path.is_file():
        return []
    old, same = json.loads(path.read_text()), json.loads(json.dumps(about))
    old_given, given = ({**report, **report.get("options", {}), **report.get("training", {})} for report in (old, same))
    known = old_given.keys() & given.keys() - {"runs", "options", "training"}  # a field that came later was no choice
    if any(old_given[k] != given[k] for k in known):
        return []

    def place(run: dict[str, Any]) -> tuple[Any, ...]:
        return (run.get("method"), run["mixture"], run["seed"], *(run[k] for k in machine()))

    new = {place(run) for run in about["runs"]}
    return [run for run in old["runs"] if place(run) not in new]


def report(method: str, out: Path, seeds: Sequence[int], names: Sequence[str] = (), draw: bool = True) -> None:
    """Train every seed on every mixture, or on those named; write METHOD.png (first seed) and METHOD.json."""
    out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    rows = []
    for name in names or PROOFS[method].mixtures:
        noise, exact = exact_map(name)
        panels = [("noise", noise, noise), (f"{name}: exact flow map", noise, exact)]
        for seed in seeds:
            began = time.process_time()
            run, found = prove(method, name, seed)
            seconds = round(time.process_time() - began, 1)
            when = {"date": datetime.now(UTC).date().isoformat(), "cpu_seconds": seconds}
            runs.append({"mixture": name, "seed": seed, **found, **machine(), **when})
            print(method, json.dumps(runs[-1]), flush=True)
            if seed == seeds[0]:
                with torch.no_grad():
                    figure, value = next(iter(found.items()))
                    title = f"{method}, one step: {figure} {value:.3f}"
                    panels.append((title, noise, run.generator()(noise, steps=1)))
        rows.append(panels)
    if draw:
        picture(rows, out / f"{method}.png")
    about = {
        "method": method,
        "options": asdict(PROOFS[method].distiller),
        "training": asdict(PROOFS[method].settings),
        "reference": "the mixture itself; energy distance of 8000 samples, shares of the modes of 100,000"
        if method in SAMPLES
        else "RK4, 600 steps, float64, 4000 fixed noises; rmse = root mean squared distance of the end points",
        "runs": runs,
    }
    about["runs"] = kept(out / f"{method}.json", about) + runs
    (out / f"{method}.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("method", choices=PROOFS)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--mixtures", choices=MIXTURES, nargs="+", default=[])
    arguments.add_argument("--no-picture", action="store_true", help="leave METHOD.png as it is")
    given = arguments.parse_args()
    report(given.method, given.out, given.seeds, given.mixtures, not given.no_picture)
