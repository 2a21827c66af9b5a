"""What students and teachers learn from: image folders, SAR/optical pairs, procedural shapes.

Every kind answers the same two questions, so training and evaluation know none of them by name.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from distillers.data.images import ImageFolder
from distillers.data.pairs import SarOpticalPairs, read_sar
from distillers.data.pixels import Batch
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput

__all__ = ["KINDS", "Batch", "ImageData", "open_data", "read_sar"]


class ImageData(Protocol):
    """A data set. `labels` is () when unlabelled; `size` is the side of a drawn image in pixels."""

    name: str
    size: int
    labels: tuple[str, ...]

    def __len__(self) -> int: ...

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """For training: `n` random augmented items; a pure function of `rng`, which makes resuming exact."""

    def items(self, indices: Sequence[int]) -> Batch:
        """For evaluation: these items, not augmented."""


KINDS: dict[str, Callable[..., ImageData]] = {
    "images": ImageFolder,
    "pairs": SarOpticalPairs,
    "shapes": CaptionedShapes,
}


def open_data(kind: str, **options: Any) -> ImageData:
    """Open a data set of `kind` (a key of KINDS); BadInput for an unknown kind, an unknown option or a missing one."""
    if kind not in KINDS:
        raise BadInput("data.kind", kind, " | ".join(KINDS))
    accepted = inspect.signature(KINDS[kind]).parameters
    for option in options:
        if option not in accepted:
            raise BadInput(f"data.{option}", options[option], f"options of {kind}: " + ", ".join(accepted))
    for option, parameter in accepted.items():
        if parameter.default is parameter.empty and option not in options:
            raise BadInput(f"data.{option}", None, f"{kind} needs it")
    return KINDS[kind](**options)
