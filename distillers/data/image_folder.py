"""Folders of images, with or without classes, kept in memory as one uint8 array.

15,000 images of 64 px are 184 MB; a random draw for training is then one array lookup.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from distillers.data.pixels import (
    SPLITS,
    Batch,
    Pixels,
    check_indices,
    check_size,
    check_split,
    check_whole,
    dihedral,
    existing_folder,
    fitted,
    image_files,
    in_order,
    listed,
    read_bands,
    spread,
    subfolders,
    tell_left_out,
    to_tensor,
)
from distillers.errors import BadInput, Notice
from distillers.models.class_names import class_numbers

ENOUGH = 150  # pictures to measure with: a Frechet distance needs more than the features' 128


class PicturesInMemory(ABC):
    """Labelled or unlabelled items of `path[/split]`, decoded once, drawn at random and turned.

    Args:
        size: the side of the squares that pictures are cropped and resized to, in pixels, or their height and width.
        flip: mirror half of the drawn pictures left-right.
        dihedral: turn and mirror drawn pictures in all eight ways instead, or in the four that keep the shape of
            those that are not square, which suits pictures without an up.
        channels: bands of a picture: 3 makes every file RGB without alpha, 1 makes it grey; with another number every
            file has as many bands of 8 bits: a PNG of four, or a TIFF (with rasterio).

    Attributes:
        labels: the names of the classes; () where there are none.
        root: the folder of the split.
        size: height and width in pixels.
        sizes: the shapes that batches have, one each: `size`, unless a kind sorts its pictures by their shapes.
    """

    labels: tuple[str, ...] = ()
    captioned, pictured = False, True
    _classes: np.ndarray  # (N,) positions in labels

    def __init__(
        self, path: str | Path, split: str | None, size: int | Sequence[int], flip: bool, dihedral: bool, channels: int
    ) -> None:
        self.path, self.size, self.flip, self.dihedral = existing_folder(path), check_size(size), flip, dihedral
        self.channels, self.sizes = check_whole("channels", channels, 1), [self.size]
        if split is not None:
            check_split(split)
        self.root = self.path if split is None else existing_folder(self.path / split)
        self.name = self.path.parent.name if split is None and self.path.name in SPLITS else self.path.name

    @cached_property
    @abstractmethod
    def pixels(self) -> Pixels:
        """All items, (N,H,W,C), decoded at the first use."""

    @abstractmethod
    def batch(self, pixels: Pixels) -> Batch:
        """Make the pictures of a batch of items (n,H,W,C)."""

    def number_as(self, labels: Sequence[str]) -> None:
        """Number the classes as a model does, by name, if they are its classes in whatever order; leave others."""
        number = class_numbers(labels)
        found = [number.get(name) for name in self.labels]
        if labels and None not in found and sorted(map(int, found)) == list(range(len(labels))):  # type: ignore[arg-type]
            self.labels, self._classes = tuple(labels), np.array(found, dtype=np.int64)[self._classes]

    def __len__(self) -> int:
        return len(self._classes)

    @property
    def operations(self) -> tuple[int, ...]:
        """The ways in which drawn pictures are turned, as `pixels.dihedral` numbers them."""
        if self.dihedral:
            return tuple(range(8)) if self.size[0] == self.size[1] else (0, 2, 4, 6)
        return (0, 4) if self.flip else (0,)

    def choose_shape(self, rng: np.random.Generator) -> int:
        """Choose the shape of a batch, a position in `sizes`: that of a random item."""
        return 0

    def places(self, shape: int) -> np.ndarray:
        """Return the positions of the items of a shape, ascending."""
        return np.arange(len(self))

    def rows(self, index: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the shape of items that have one in common, and where each stands in `places` of it."""
        return 0, index

    def choose(self, n: int, rng: np.random.Generator, shape: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Choose positions and operations, (n,) each, of the `n` items that `draw` gives for these arguments."""
        places = self.places(self.choose_shape(rng) if shape is None else shape)
        index, ways = places[rng.integers(len(places), size=n)], self.operations
        way = rng.integers(len(ways), size=n) if len(ways) > 1 else np.zeros(n, dtype=np.int64)
        return index, np.array(ways)[way]

    def draw(self, n: int, rng: np.random.Generator, shape: int | None = None) -> Batch:
        """Draw `n` items at random with replacement, augmented; a pure function of its arguments.

        shape: that of the pictures, a position in `sizes`; None lets `rng` choose.
        """
        index, operation = self.choose(n, rng, shape)
        return {**self.turned(index, operation), **self.conditions(index, rng)}

    def turned(self, index: np.ndarray, operation: np.ndarray) -> Batch:
        """Take the pictures at these positions, all of one shape, each turned by its operation."""
        return self.batch(dihedral(self.decoded(index), operation))

    def decoded(self, index: np.ndarray) -> Pixels:
        """Take the pictures at these positions, all of one shape, as they are."""
        return self.pixels[index]

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the items at these positions as they are."""
        index = check_indices(indices, len(self))
        return {**self.batch(self.pixels[index]), **self.conditions(index)}

    def conditions(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """Take the conditions of the items at these positions: "label", where there are classes.

        rng: what conditions are augmented by, where they are; None takes them as they are.
        """
        return {"label": torch.from_numpy(self._classes[index])} if self.labels else {}


class ImageFolder(PicturesInMemory):
    """Images of `path[/split]/CLASS/*.jpg`, labelled by their sorted class folders, or of `path[/split]/*.jpg`.

    Class folders are sorted by letters, or by value where all their names are numbers. `limit` keeps an evenly spaced
    part. Images of another size are cropped around their centre to the shape of `size` and resized with antialiasing;
    of moving ones the first is taken. Images beside class folders or deeper in them are left out, and so is what Pillow
    cannot read; a Notice counts them.

    Where neither path/train nor path/test is there, a split is a part of the images, the same for the same names: of
    every class a fifth is the test split, or what makes ENOUGH of them.

    Raises:
        BadInput: a missing folder, no images, too few to divide, and any file that is unreadable, not 8-bit, smaller
            than 8 px or of other bands, by name.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        size: int | Sequence[int] = 64,
        flip: bool = True,
        dihedral: bool = False,
        limit: int | None = None,
        channels: int = 3,
    ) -> None:
        folders = any((Path(path).expanduser() / s).is_dir() for s in SPLITS)
        divided = split in SPLITS and not folders
        super().__init__(path, None if divided else split, size, flip, dihedral, channels)
        # Labels come from both splits, so that a class absent from one of them never shifts the numbers of the others.
        siblings = (
            [self.root] if split is None or divided else [self.path / s for s in SPLITS if (self.path / s).is_dir()]
        )
        self.labels = tuple(in_order({c.name for s in siblings for c in subfolders(s) if image_files(c)}))
        found = self._find(self.root)
        if divided:
            test = chosen_for_test(self.root, found)
            found = [one for one in found if (one in test) == (split == "test")]
        found = [found[i] for i in spread(len(found), limit)]
        self.files, self._classes = [file for file, _ in found], np.array([k for _, k in found], dtype=np.int64)

    def _find(self, root: Path) -> list[tuple[Path, int]]:
        """List the files and their classes."""
        if self.labels:
            found = [(f, k) for k, c in enumerate(self.labels) if (root / c).is_dir() for f in image_files(root / c)]
        else:
            found = [(f, 0) for f in image_files(root)]
        if not found:
            splits = ", ".join(c.name for c in subfolders(root) if c.name in SPLITS)
            hint = f" (it has {splits}: give split)" if splits else ""
            raise BadInput("path", str(root), f"a folder with images, or with class folders of images{hint}")
        where = f"directly in {listed(self.labels, 'class folder')}" if self.labels else "directly in the folder"
        tell_left_out(root, {file for file, _ in found}, f"pictures {where}")
        counts = Counter(k for _, k in found)
        empty = [c.name for c in subfolders(root) if c.name not in self.labels]
        empty += [name for k, name in enumerate(self.labels) if not counts[k]]
        if self.labels and empty:
            warnings.warn(f"{root}: no pictures of {listed(empty, 'class folder')}", Notice, stacklevel=3)
        return found

    @cached_property
    def pixels(self) -> Pixels:
        """All images, (N,H,W,C), decoded at the first use."""
        pixels = np.empty((len(self.files), *self.size, self.channels), dtype=np.uint8)
        for i, file in enumerate(self.files):
            pixels[i] = fitted(read_bands(file, self.channels), self.size)
        return pixels

    def batch(self, pixels: Pixels) -> Batch:
        return {"image": to_tensor(pixels)}


def chosen_for_test(root: Path, found: Sequence[tuple[Path, int]]) -> set[tuple[Path, int]]:
    """Choose those of every class whose names have the least SHA-256; a class keeps one at least to learn from."""
    if len(found) < 2 * ENOUGH:
        allowed = f"folders train and test in it, or {2 * ENOUGH} pictures or more, to hold some of them out"
        raise BadInput("path", f"{root}: {len(found)} pictures", allowed)
    share, chosen = max(1 / 5, ENOUGH / len(found)), set[tuple[Path, int]]()
    for label in {k for _, k in found}:
        own = [one for one in found if one[1] == label]
        own.sort(key=lambda one: hashlib.sha256(one[0].relative_to(root).as_posix().encode()).digest())
        chosen.update(own[: min(math.ceil(share * len(own)), len(own) - 1)])
    return chosen
