"""PSO on a toy whose target is known: a few-step generator of the ring, tuned to some of its modes or to a reward.

    python tests/proofs/preference_report.py --out docs/results/exact

writes pso.json, pso.md and pso.png: naive fine-tuning and PSO side by side on three target sets, then PSO by reward.
"""

import argparse
import copy
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from exact_report import SETTINGS, picture, train_on
from torch import Tensor

from distillers.generator import Generator
from distillers.methods.consistency import Consistency
from distillers.methods.pso import Pso
from distillers.models.conditions import Cond
from distillers.models.lora import LoraSettings
from distillers.training.distiller import Distiller, on_one_base
from distillers.training.toy import ExactTeacher, GaussianMixture, energy_distance, exact_teacher, ring

TARGETS = {"opposite modes": (0, 4), "three adjacent modes": (0, 1, 2), "one mode": (0,)}
BASE = replace(SETTINGS, iterations=1500)
TUNING = replace(SETTINGS, iterations=300, learning_rate=1e-3, warmup=20, decay="constant", ema=0.98)
PAIRED: dict[str, Distiller] = {
    "finetune": Pso(mode="finetune"),
    "pso, beta 2": Pso(beta=2.0),
    "pso, beta 5": Pso(),
    "personalise": Pso(mode="personalise"),
}
RIGHT = "preference_report:rightness"
REWARDED: dict[str, Distiller] = {
    "online, beta 5, eps 0.1": Pso(mode="online", reward=RIGHT, clip=0.1),
    "online, beta 5, eps 0.5": Pso(mode="online", reward=RIGHT),
    "online, beta 50, eps 0.1": Pso(mode="online", reward=RIGHT, beta=50.0, clip=0.1),
    "one step, std 0.1 (experimental)": Pso(mode="online", reward=RIGHT, steps=1, policy_std=0.1),
}
# broken copies of the loss, by the line that is changed
NOISE = "x_t = student.schedule.add_noise(x0, eps, t)"
REFERENCE, MOVING = (f"error({who}, winner), error({who}, loser)" for who in ("reference", "student"))
LORA = LoraSettings(rank=16)
WRONG = {
    "wrong sign": ("((won_ref - lost_ref) - (won - lost))", "((won - lost) - (won_ref - lost_ref))"),
    "other noise": (NOISE, NOISE.replace("eps", "torch.randn_like(x0)")),
    "moving reference": (REFERENCE, MOVING),
}
POINTS = 4000
# What the tests ask at four steps, at least 1.3 times what the worst seed gives (docs/results/exact/margins.md).
ENERGY_LEFT, SPREAD = 0.5, (0.7, 1.4)  # pairs: energy over the base's; least and greatest spread
GAIN, NEAR, LEAST_SPREAD = 0.2, 0.75, 0.6  # a reward: its rise; samples near the data, and their spread


def strain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How much of what is allowed each figure takes, for `held_against` and `rewarded`: below 1 is passed."""
    if "reward" in after:
        gain = after["reward"] - before["reward"]
        return {
            "reward": GAIN / gain if gain > 0 else float("inf"),
            "near_data": (1 - after["near_data"]) / (1 - NEAR),
            "spread": (1 - after["spread"]) / (1 - LEAST_SPREAD),
        }
    energy, off = after["energy_4"] / before["energy_4"], after["spread_4"] - 1
    return {"energy_4": energy / ENERGY_LEFT, "spread_4": off / ((SPREAD[1] if off > 0 else SPREAD[0]) - 1)}


def rightness(points: Tensor, cond: Cond | None) -> Tensor:
    """The reward of a point: its x coordinate."""
    return points[:, 0]


def modes(which: Sequence[int]) -> GaussianMixture:
    """Some modes of the ring."""
    whole, chosen = ring(), list(which)
    return GaussianMixture(whole.means[chosen], whole.stds[chosen], whole.weights[chosen], whole.schedule)


@lru_cache
def base(seed: int) -> ExactTeacher:
    """What is tuned: a consistency student of the ring for one, two and four steps."""
    teacher = exact_teacher(ring(), seed)
    made = train_on(teacher, ring(), Consistency(points=20, steps=(1, 2, 4)), replace(BASE, seed=seed)).generator()
    return replace(teacher, denoiser=made.denoiser, info=made.info)  # type: ignore[arg-type]


def untuned(seed: int) -> Generator:
    """The base as it is served."""
    teacher = base(seed)
    return Generator(teacher.denoiser, teacher.codec, teacher.info)


def tuned(method: Distiller, seed: int, target: GaussianMixture | None = None, **training: Any) -> Generator:
    """The base after tuning by the real loop; the target's points are the winners."""
    settings = replace(TUNING, seed=seed, **training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # settings that are known to fail are measured here, too
        return train_on(on_one_base(copy.deepcopy(base(seed)), LORA), target or ring(), method, settings).generator()


@torch.no_grad()
def samples(generator: Generator, steps: int) -> Tensor:
    """Points from fixed noises, (POINTS, 2)."""
    torch.manual_seed(4000)
    return generator(torch.randn(POINTS, 2), steps=steps)


def held_against(target: GaussianMixture, generator: Generator, steps: Sequence[int] = (4, 1)) -> dict[str, float]:
    """Energy distance to the target, and the samples' spread over the target's, for each step count."""
    exact, found = target.sample(POINTS, torch.Generator().manual_seed(4001)), {}
    for k in steps:
        made = samples(generator, k)
        found[f"energy_{k}"] = energy_distance(made, exact)
        found[f"spread_{k}"] = float(made.std(0).norm() / exact.std(0).norm())
    return found


def rewarded(generator: Generator, steps: int) -> dict[str, float]:
    """Mean reward; the share of points within 4 std of a mode's centre (0.9997 of the data); spread over the ring's."""
    made, mixture = samples(generator, steps), ring()
    near = torch.cdist(made.double(), mixture.means).amin(1) < 4 * mixture.stds[0]
    spread = made.std(0).norm() / mixture.sample(POINTS, torch.Generator().manual_seed(4001)).std(0).norm()
    return {"reward": float(made[:, 0].mean()), "near_data": float(near.double().mean()), "spread": float(spread)}


def report(out: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Train every seed; write pso.json, pso.md, and pso.png of the first."""
    began, runs, rows = time.process_time(), [], []
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(4000))
    for name, which in TARGETS.items():
        target, panels = modes(which), []
        for seed in seeds:
            made = {"base": untuned(seed)} | {label: tuned(method, seed, target) for label, method in PAIRED.items()}
            for label, generator in made.items():
                runs.append({"target": name, "method": label, "seed": seed, **held_against(target, generator)})
                print(json.dumps(runs[-1]), flush=True)
            if seed == seeds[0]:
                for k in (4, 1):
                    steps = f"{k} step{'s' * (k > 1)}"
                    shown = ("base", "finetune", "pso, beta 2")
                    panels.append([(f"{name}: {label}, {steps}", noise, samples(made[label], k)) for label in shown])
        rows += panels
    for label, method in REWARDED.items():
        assert isinstance(method, Pso)
        for seed in seeds:
            before, after = (rewarded(g, method.steps) for g in (untuned(seed), tuned(method, seed)))
            runs.append({"target": "x", "method": label, "seed": seed, "reward_base": before["reward"], **after})
            print(json.dumps(runs[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    picture(rows, out / "pso.png")
    about = {
        "method": "pso",
        "base": f"consistency student of the ring, {BASE.iterations} iterations",
        "training": {k: getattr(TUNING, k) for k in ("iterations", "batch", "learning_rate", "optimizer", "ema")},
        "lora_rank": LORA.rank,
        "points": POINTS,
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "cpu_seconds": round(time.process_time() - began),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
    }
    (out / "pso.json").write_text(json.dumps(about, indent=2) + "\n")
    (out / "pso.md").write_text(table(runs, about))


def table(runs: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The runs in words: least to greatest over the seeds."""

    def between(kind: str, method: str, figure: str) -> str:
        values = [run[figure] for run in runs if (run["target"], run["method"]) == (kind, method)]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} to {high}"

    count = len({run["seed"] for run in runs})
    lines = [
        "# PSO on the ring",
        "",
        f"A consistency student of eight modes, tuned at four steps for {about['training']['iterations']} iterations "
        f"with a LoRA of rank {about['lora_rank']}; least to greatest of {count} seeds. Energy: distance to the target "
        "set, 0 is best. Spread: the samples' standard deviation over the target's, 1 is best. Written by "
        "`python tests/proofs/preference_report.py`.",
        "",
    ]
    for name in TARGETS:
        lines += [
            f"## Target: {name}",
            "",
            "| | energy, 4 steps | spread, 4 steps | energy, 1 step | spread, 1 step |",
            "|---|---|---|---|---|",
        ]
        for method in ("base", *PAIRED):
            figures = [between(name, method, figure) for figure in ("energy_4", "spread_4", "energy_1", "spread_1")]
            lines.append(f"| {method} | " + " | ".join(figures) + " |")
        lines.append("")
    lines += [
        "## Reward: the x coordinate",
        "",
        "Near the data: within four standard deviations of a mode's centre.",
        "",
        "| | reward before | after | near the data | spread over the ring's |",
        "|---|---|---|---|---|",
    ]
    for method in REWARDED:
        figures = [between("x", method, figure) for figure in ("reward_base", "reward", "near_data", "spread")]
        lines.append(f"| {method} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    report(arguments.parse_args().out)
