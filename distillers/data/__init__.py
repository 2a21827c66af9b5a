"""Data sets for training and evaluation: folders of pictures, with or without captions, SAR pairs, shapes, preferences.

All kinds implement `ImageData`, so training and evaluation know none of them by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from distillers.data.captioned import CaptionedFolder, Prompts
from distillers.data.image_folder import ImageFolder, PicturesInMemory
from distillers.data.pixels import Batch, check_indices
from distillers.data.preferences import PreferencePairs
from distillers.data.sar_optical import MixedPairs, SarOpticalPairs, read_sar
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput, checked

__all__ = ["KINDS", "Batch", "ImageData", "Part", "draw_alike", "open_data", "options_of", "read_sar"]


class ImageData(Protocol):
    """The interface of a data set.

    `labels` is () when unlabelled; `size` is the height and width of an image in pixels, `channels` the number of its
    bands; `captioned` says whether batches hold "caption", `pictured` whether they hold "image".
    """

    name: str
    size: tuple[int, int]
    labels: tuple[str, ...]
    channels: int
    captioned: bool
    pictured: bool

    def __len__(self) -> int:
        """Count the items."""

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` random augmented items for training; a pure function of `rng`, which makes resuming exact."""

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the items at these positions, not augmented, for evaluation."""


@runtime_checkable
class OfShapes(Protocol):
    """Data whose batches may differ in the shape of their pictures: one shape a batch."""

    def choose_shape(self, rng: np.random.Generator) -> int:
        """Choose the shape of a batch."""

    def draw(self, n: int, rng: np.random.Generator, shape: int | None = None) -> Batch:
        """Draw `n` items of a shape; without one it is chosen by `rng`."""


def draw_alike(data: ImageData, n: int, rng: np.random.Generator, common: np.random.Generator) -> Batch:
    """Draw `n` items by `rng`, with pictures of the shape that `common` chooses: processes that share it draw alike."""
    return data.draw(n, rng, data.choose_shape(common)) if isinstance(data, OfShapes) else data.draw(n, rng)


class Part:
    """The items of some classes of a labelled data set; labels keep their names and numbers.

    `draw` draws from the whole until enough items fit, so that every kind can be divided alike.

    Raises:
        BadInput: classes that the data do not have, none, or none with an item.
    """

    def __init__(self, data: ImageData, classes: Sequence[str]) -> None:
        wrong = [name for name in classes if name not in data.labels]
        if wrong or not classes:
            raise BadInput("data.classes", wrong or list(classes), f"classes of {data.name}: " + ", ".join(data.labels))
        self.name, self.size, self.labels, self.channels = data.name, data.size, data.labels, data.channels
        self.captioned, self.pictured = data.captioned, data.pictured
        self.data, self.classes = data, torch.tensor([data.labels.index(name) for name in classes])

    @cached_property
    def _places(self) -> list[int]:
        """The positions of the items in the whole."""
        found: list[int] = []
        for first in range(0, len(self.data), 512):
            places = range(first, min(first + 512, len(self.data)))
            fits = torch.isin(self.data.items(places)["label"], self.classes)
            found += [place for place, fit in zip(places, fits.tolist(), strict=True) if fit]
        if not found:
            raise BadInput("data.classes", [self.labels[k] for k in self.classes], f"classes with items in {self.name}")
        return found

    def __len__(self) -> int:
        return len(self._places)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` random augmented items of these classes; a pure function of `rng`."""
        assert self._places  # else it would never end
        parts: list[Batch] = []
        while sum(len(part["label"]) for part in parts) < n:
            drawn = self.data.draw(n, rng)
            fits = torch.isin(drawn["label"], self.classes)
            parts.append({key: value[fits] for key, value in drawn.items()})
        return {key: torch.cat([part[key] for part in parts])[:n] for key in parts[0]}

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the items at these positions, not augmented."""
        return self.data.items([self._places[i] for i in check_indices(indices, len(self))])


KINDS: dict[str, Callable[..., ImageData]] = {
    "images": ImageFolder,
    "captions": CaptionedFolder,
    "pairs": SarOpticalPairs,
    "mixed-pairs": MixedPairs,
    "shapes": CaptionedShapes,
    "preferences": PreferencePairs,
    "prompts": Prompts,
}


def options_of(kind: str) -> Mapping[str, inspect.Parameter]:
    """Return the options that a kind of data takes, by name. Raises BadInput for an unknown kind."""
    if kind not in KINDS:
        raise BadInput("data.kind", kind, " | ".join(KINDS))
    return inspect.signature(KINDS[kind]).parameters


def open_data(
    kind: str, classes: Sequence[str] | None = None, *, labels: Sequence[str] = (), **options: Any
) -> ImageData:
    """Open a data set of `kind` (a key of KINDS), whole or some of its classes.

    Args:
        labels: the classes of a model, in whose order pictures of the same classes are numbered.

    Raises:
        BadInput: an unknown kind; an option that is unknown, missing or of the wrong type; what the kind refuses.
    """
    if classes is not None and not isinstance(classes, list | tuple):
        raise BadInput("data.classes", classes, "a list of names")
    accepted = options_of(kind)
    for option in options:
        if option not in accepted:
            raise BadInput(
                f"data.{option}", options[option], f"options of {kind}: " + ", ".join([*accepted, "classes"])
            )
    for option, parameter in accepted.items():
        if parameter.default is parameter.empty and option not in options:
            raise BadInput(f"data.{option}", None, f"{kind} needs it")
    data = KINDS[kind](**checked(KINDS[kind], options, "data"))
    if isinstance(data, PicturesInMemory):
        data.number_as(labels)
    return data if classes is None else Part(data, classes)
