"""Measure a student's latency on this device, and its agreement with the teacher, on a few pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillers.errors import BadInput
from distillers.evaluation.candidate import evaluations
from distillers.evaluation.evaluate import check_teacher
from distillers.evaluation.latency import device_of, latencies
from distillers.evaluation.metrics import extract, frechet_distance, kernel_distance, mean, psnr, rmse, ssim
from distillers.evaluation.report import setting
from distillers.models.conditions import Given, subset

if TYPE_CHECKING:
    from distillers.evaluation.features import Features
    from distillers.generator import Generator


@torch.no_grad()
def quick_benchmark(
    student: Generator,
    teacher: Generator | None = None,
    *,
    n: int = 16,
    seed: int = 0,
    steps: int | None = None,
    features: Features | None = None,
    teacher_steps: int = 50,
    latency_repeats: int = 10,
    batch: int = 16,
    sar: Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure latency, and how far the student's pictures are from the teacher's on the same noises; JSON-able.

    Labels go in turn over the classes. Without a teacher only latency is measured, without features no Frechet distance
    and no KID. This is agreement, not realism.

    Args:
        sar: for a translator, tiles (B,C,H,W) in [-1,1], which are taken in turn.
        clock: gives the time in seconds; a server's stands still while others have the device.

    Raises:
        BadInput: a number out of range, a translator without tiles, a teacher of another task.
    """
    if n < 1 or seed < 0 or batch < 1:
        raise BadInput("n, seed, batch", (n, seed, batch), "n and batch of 1 or more, seed of 0 or more")
    check_teacher(student, teacher)
    steps = student.info.default_steps if steps is None else steps
    models = [(student, steps)] + ([(teacher, teacher_steps)] if teacher is not None else [])
    first, device = student.condition.in_turn(range(1), sar), device_of(student)
    calls = [lambda model=model, s=s: model.sample([seed], steps=s, **first) for model, s in models]
    speeds = latencies(calls, repeats=latency_repeats, warmup=1, device=device, clock=clock)
    result: dict[str, Any] = {
        "model": student.info.name,
        "steps": steps,
        "nfe": evaluations(student, steps),
        "n": n,
        "seeds": [seed, seed + n - 1],
        **setting(device),
        "latency_ms": {"batch": 1, **speeds[0]},
        "teacher": None,
    }
    if teacher is None:
        return {**result, "note": "The teacher is not here: latency alone was measured."}
    result["teacher"] = {
        "model": teacher.info.name,
        "steps": teacher_steps,
        "nfe": evaluations(teacher, teacher_steps),
        "latency_ms": {"batch": 1, **speeds[1]},
    }
    result["speed_up"] = speeds[1]["p50"] / speeds[0]["p50"]
    given = student.condition.in_turn(range(n), sar)
    ours, theirs = (_sample(model, s, given, n, seed, batch) for model, s in models)
    result["against_teacher"] = _agreement(ours, theirs, features, batch)
    result["note"] = (
        f"{n} pictures are few: read these as a check that the model works, not as its quality. They say how close the "
        "student comes to its teacher on the same noises, not how real either looks; the model's report.json says that."
    )
    if features is not None and n <= features.num_features:
        result["note"] += (
            f" With {n} pictures for {features.num_features} features the Frechet distance is biased high."
        )
    return result


def _sample(generator: Generator, steps: int, given: Given, n: int, seed: int, batch: int) -> Tensor:
    """Draw n pictures in batches, picture i from `seed + i`, on the CPU."""
    parts = []
    for start in range(0, n, batch):
        end = min(start + batch, n)
        part = generator.sample(range(seed + start, seed + end), steps=steps, **subset(given, start, end))
        parts.append(part.float().cpu())
    return torch.cat(parts)


def _agreement(ours: Tensor, theirs: Tensor, features: Features | None, batch: int) -> dict[str, Any]:
    """Compare two sets of pictures of the same seeds and conditions."""
    figures: dict[str, Any] = {
        "rmse": mean(rmse(ours, theirs)),
        "psnr": mean(psnr(ours, theirs)),
        "ssim": mean(ssim(ours, theirs)),
    }
    if features is not None:
        a, b = extract(features, theirs, batch), extract(features, ours, batch)
        figures["frechet"] = frechet_distance(a, b, few=True) if len(a) > 1 else None
        figures["kid_mean"], figures["kid_std"] = kernel_distance(a, b) if len(a) > 3 else (None, None)
        card = features.card
        figures["features"] = {"name": card.name, "accuracy": card.accuracy, "n_test": card.n_test}
    return figures
