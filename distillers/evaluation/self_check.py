"""Check that a weights folder draws the picture that it drew when it was published, stored as 8 x 8 means.

Other machines, backends and precisions draw it to within a level or two; other weights do not. A server checks a new
folder so before it replaces an old one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.weights.manifest import load_json

FILE = "golden.json"  # the reference picture
CELLS = 8
LEVELS = 4.0  # of 255, in the mean: what another machine or precision may differ by, and other weights never do
AREA = 4  # times that of the pictures that the network was made for, at most


def write_reference(generator: Generator, folder: Path) -> None:
    """Draw the reference picture and write it beside the weights."""
    steps = min(generator.info.step_times or [1])
    levels = [[[round(value, 1) for value in cell] for cell in row] for row in _cells(_draw(generator, steps)).tolist()]
    (folder / FILE).write_text(json.dumps({"seed": 0, "steps": steps, "levels": levels}) + "\n")


def check(generator: Generator, folder: Path) -> None:
    """Draw a picture by every student, and compare the first with the published one, if the folder has one.

    What a folder may ask for is bounded: the fewest steps, and pictures not much larger than its network was made for.

    Raises:
        BadInput: a picture with values that are not finite, or another one than was published; a size or a reference
            beyond these bounds.
    """
    name = generator.info.name
    steps = min(generator.info.step_times or [1])
    published = _read(folder / FILE, steps)
    _check_size(generator)
    shares = generator.info.shares or [generator.info.classes]
    for label in [share[0] if share else None for share in shares]:
        _draw(generator, steps, label)
    if published is None:
        return
    drawn = _cells(_draw(generator, steps))
    if drawn.shape != published.shape:
        raise BadInput(FILE, f"levels of {tuple(published.shape)}", str(tuple(drawn.shape)))
    off = float((drawn - published).abs().mean())
    if not off <= LEVELS:
        raise BadInput(
            "weights", f"{name} draws another picture than it was published with", f"{FILE} of these weights"
        )


def _read(file: Path, steps: int) -> Tensor | None:
    """Read the reference picture, (8, 8, C) in 0..255; None where there is none. BadInput for what is none."""
    try:
        reference = load_json(file)
        levels, asked = torch.tensor(reference["levels"], dtype=torch.float32), reference["steps"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadInput(FILE, f"{type(error).__name__}", "what `fewstep distill` writes, or no such file") from None
    if asked != steps:
        raise BadInput(f"{FILE}: steps", asked, str(steps))
    return levels


def _check_size(generator: Generator) -> None:
    """Refuse with BadInput pictures far larger than those that the network was made for: a pass might never end."""
    made = dict(getattr(generator.denoiser.network, "config", {})).get("sample_size")
    if made is None:
        return
    sides = [made, made] if isinstance(made, int) else list(made)
    area, (height, width) = AREA * sides[0] * sides[1] * generator.codec.factor**2, generator.info.size
    if height * width > area:
        raise BadInput("size", [height, width], f"{area} pixels at most, {AREA} times what the network was made for")


def _draw(generator: Generator, steps: int, label: int | None = None) -> Tensor:
    """Draw (C, H, W) in [-1, 1] of seed 0 and the first class, or of a ramp of backscatter."""
    return generator.sample([0], steps=steps, **generator.condition.probe(1, None if label is None else [label]))[0]


def _cells(picture: Tensor) -> Tensor:
    """Average a picture to (8, 8, C) means in 0..255."""
    return F.adaptive_avg_pool2d((picture + 1) * 127.5, CELLS).permute(1, 2, 0)
