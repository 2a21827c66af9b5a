"""Track how far a student is from its teacher and from the data while it is trained.

Two things go wrong. A student drifts: its samples leave the teacher's, mostly because its critic lags behind it. Or it
hacks its teacher: it comes ever nearer to it and goes away from the data, for it learns the teacher's mistakes.
"""

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
    """Write a line on both distances, and a warning each of student drift and of teacher hacking.

    Drift: KID to the teacher has risen from its least by more than twice its standard deviation, and that to the data
    has not fallen. Hacking: KID to the data has risen so from its least, while that to the teacher fell.
    """
    if not course:
        return []
    distances = ", ".join(f"{1000 * t['kid_teacher']:.0f} / {1000 * t['kid_real']:.0f}" for t in course)
    places = ", ".join(str(int(t["iteration"])) for t in course)
    notes = [
        f"Student drift: KID x1000 of {int(course[-1]['n'])} samples to the teacher / to real data at iterations "
        f"{places}: {distances}."
    ]
    last = course[-1]

    def risen(name: str) -> dict[str, float] | None:
        best = min(course, key=lambda t: t[name])
        return best if last[name] > best[name] + 2 * max(best["kid_std"], last["kid_std"]) else None

    if (best := risen("kid_teacher")) and last["kid_real"] >= best["kid_real"]:
        notes.append(
            f"Warning, student drift: since iteration {int(best['iteration'])} the student leaves its teacher. Its "
            "critic lags behind: take more critic_turns, a lower learning rate, or the weights of that iteration."
        )
    if (best := risen("kid_real")) and last["kid_teacher"] < best["kid_teacher"]:
        notes.append(
            f"Warning, teacher hacking: since iteration {int(best['iteration'])} the student comes nearer to its "
            "teacher and goes away from the data. It learns the teacher's mistakes: stop earlier, or add real data "
            "(an adversarial term)."
        )
    return notes
