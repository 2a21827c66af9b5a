"""Track whether a training brings a student nearer to its teacher's pictures but further from the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distillers.evaluation.metrics import extract, kernel_distance

if TYPE_CHECKING:
    from distillers.evaluation.features import Features


def track_training(samples: Path, real: Tensor, teacher: Tensor, features: Features) -> list[dict[str, float]]:
    """Measure KID of the samples that a training left, to the teacher's pictures and to real ones, by iteration.

    KID has no bias, so sets of other sizes may be compared.

    Args:
        samples: a folder of NNNNNN.npy, uint8 (B,H,W,3); files of fewer than 32 pictures are skipped.
        real: real pictures (N,3,H,W) in [-1,1].
        teacher: the teacher's pictures (M,3,H,W) in [-1,1].

    Returns:
        For each file "iteration", "n", "kid_teacher", "kid_real", "kid_std".
    """
    to_real, to_teacher, course = extract(features, real), extract(features, teacher), list[dict[str, float]]()
    for file in sorted(samples.glob("*.npy")):
        pictures = torch.from_numpy(np.load(file)).permute(0, 3, 1, 2) / 127.5 - 1
        if len(pictures) < 32:  # a grid to look at; too few to measure
            continue
        ours = extract(features, pictures)
        kid_teacher, spread = kernel_distance(to_teacher, ours)
        kid_real, _ = kernel_distance(to_real, ours)
        figures = {"n": len(ours), "kid_teacher": kid_teacher, "kid_real": kid_real, "kid_std": spread}
        course.append({"iteration": int(file.stem), **figures})
    return course


def describe_course(course: Sequence[dict[str, float]]) -> list[str]:
    """Write a line on both distances; a second one warns if the student nears the teacher and leaves the data."""
    if not course:
        return []
    distances = ", ".join(f"{1000 * t['kid_teacher']:.0f} / {1000 * t['kid_real']:.0f}" for t in course)
    places = ", ".join(str(int(t["iteration"])) for t in course)
    notes = [
        f"Teacher hacking: KID x1000 of {int(course[-1]['n'])} samples to the teacher / to real data at iterations "
        f"{places}: {distances}."
    ]
    best, last = min(course, key=lambda t: t["kid_real"]), course[-1]
    margin = 2 * max(best["kid_std"], last["kid_std"])
    if last["kid_teacher"] < best["kid_teacher"] and last["kid_real"] > best["kid_real"] + margin:
        notes.append(
            f"Warning: since iteration {int(best['iteration'])} the student comes nearer to its teacher and goes away "
            "from the data. It learns the teacher's mistakes: stop earlier, or add real data (an adversarial term)."
        )
    return notes
