"""Check that a weights folder draws the picture that it drew when it was published, stored as 8 x 8 means.

Other machines, backends and precisions draw it to within a level or two; other weights do not. A server checks a new
folder so before it replaces an old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.generator import Generator

FILE = "golden.json"  # the reference picture
CELLS = 8
LEVELS = 4.0  # of 255, in the mean: what another machine or precision may differ by, and other weights never do


def write_reference(generator: Generator, folder: Path) -> None:
    """Draw the reference picture and write it beside the weights."""
    steps = min(generator.info.step_times or [1])
    levels = [[[round(value, 1) for value in cell] for cell in row] for row in _cells(_draw(generator, steps)).tolist()]
    (folder / FILE).write_text(json.dumps({"seed": 0, "steps": steps, "levels": levels}) + "\n")


def check(generator: Generator, folder: Path) -> None:
    """Draw a picture by every student, and compare the first with the published one, if the folder has one.

    Raises:
        BadInput: a picture with values that are not finite, or another one than was published.
    """
    name = generator.info.name
    steps = min(generator.info.step_times or [1])
    shares = generator.info.shares or [generator.info.classes]
    for label in [share[0] if share else None for share in shares]:
        _draw(generator, steps, label)
    try:
        reference: dict[str, Any] = json.loads((folder / FILE).read_text())
        published = torch.tensor(reference["levels"])
        off = float((_cells(_draw(generator, reference["steps"])) - published).abs().mean())
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadInput(FILE, f"{type(error).__name__}", "what `fewstep distill` writes, or no such file") from None
    if off > LEVELS:
        raise BadInput(
            "weights", f"{name} draws another picture than it was published with", f"{FILE} of these weights"
        )


def _draw(generator: Generator, steps: int, label: int | None = None) -> Tensor:
    """Draw (C, H, W) in [-1, 1] of seed 0 and the first class, or of a ramp of backscatter."""
    return generator.sample([0], steps=steps, **generator.condition.probe(1, None if label is None else [label]))[0]


def _cells(picture: Tensor) -> Tensor:
    """Average a picture to (8, 8, C) means in 0..255."""
    return F.adaptive_avg_pool2d((picture + 1) * 127.5, CELLS).permute(1, 2, 0)
