"""Pictures with a text each, in any form that `caption_sources` finds, and files of prompts without pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from distillers.data.caption_sources import Captioned, find_captioned, named_by_split, read_text
from distillers.data.image_folder import PicturesInMemory, chosen_for_test
from distillers.data.pixels import (
    SPLITS,
    Batch,
    Pixels,
    Size,
    check_indices,
    check_size,
    check_whole,
    fitted,
    listed,
    read_bands,
    spread,
    to_tensor,
    upright_size,
)
from distillers.errors import BadInput
from distillers.models.captions import pack
from distillers.models.clusters import Clusters

CLAUSES = ", "  # what joins the clauses of a caption
KEPT_BYTES = 8e9  # of decoded pictures that stay in memory
WIDEST = 2.0  # ratio of the sides of a bucket


class CaptionedFolder(PicturesInMemory):
    """Pictures and their texts of `path[/split]`: see `caption_sources` for the forms that a folder may have.

    Batches hold "caption" beside "image": see `models.captions.pack`; L is that of the longest text. Where `path` has
    no folders train and test, nor archives named so, a split is a part of the pictures, divided as `ImageFolder`
    divides them. Decoded pictures stay in memory up to `KEPT_BYTES`; more are decoded whenever they are drawn.

    Args:
        flip: mirror half of the drawn pictures left-right. It is off, unlike for other pictures: texts say left and
            right, and a picture that is never flipped is encoded once.
        clause_dropout: the probability with which `draw` leaves each clause of a text out, a clause being what ", "
            separates; one clause stays at least. A model that has seen parts of texts answers short prompts.
        limit: keeps an evenly spaced part of so many pictures.
        buckets: keep the aspect ratio of each picture, as nearly as sides of whole multiples of `bucket_step` allow, at
            an area of at most size^2 and sides of at most twice each other. A batch has one of these shapes.

    Raises:
        BadInput: a missing folder, and whatever `find_captioned` and `ImageFolder` refuse.
    """

    captioned = True
    clusters: Clusters | None = None  # of the texts, where these pictures are a part

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        size: int | Sequence[int] = 64,
        flip: bool = False,
        dihedral: bool = False,
        limit: int | None = None,
        channels: int = 3,
        clause_dropout: float = 0.0,
        buckets: bool = False,
        bucket_step: int = 64,
    ) -> None:
        whole = Path(path).expanduser()
        here = split in SPLITS and not any((whole / s).is_dir() for s in SPLITS)
        super().__init__(path, None if here else split, size, flip, dihedral, channels)
        self.clause_dropout = check_dropout(clause_dropout)
        divided = here and not named_by_split(f for kind in ("*.tar", "*.parquet") for f in self.root.glob(kind))
        found = find_captioned(self.root, None if divided else split)
        if divided:
            every = [(self.root / one.name, 0) for one in found]
            test = chosen_for_test(self.root, every)
            found = [one for one, key in zip(found, every, strict=True) if (key in test) == (split == "test")]
        self.found = [found[i] for i in spread(len(found), limit)]
        self._classes = self._shapes = np.zeros(len(self.found), dtype=np.int64)
        self.longest = max(len(text.encode()) for text in self.texts)
        if buckets:
            self._sort_into(bucket_sizes(self.size, check_whole("bucket_step", bucket_step, 1)))

    @property
    def texts(self) -> list[str]:
        """The text of each picture."""
        return [one.text for one in self.found]

    def part(self, places: Sequence[int]) -> CaptionedFolder:
        """Return the same data with the pictures at these positions alone. Raises BadInput for none."""
        if not len(places):
            raise BadInput("data", self.name, "one picture or more in every part")
        own = copy.copy(self)
        for kept in ("pixels", "_kept"):
            own.__dict__.pop(kept, None)
        own.found, own._classes = [self.found[i] for i in places], self._classes[list(places)]
        sizes, own._shapes = np.unique(self._shapes[list(places)], return_inverse=True)
        own.sizes = [self.sizes[k] for k in sizes]
        return own

    # --- pictures -----------------------------------------------------------------------------------------------------
    def _sort_into(self, sizes: Sequence[Size]) -> None:
        """Give each picture the size whose aspect ratio is nearest to its own; sizes of no picture are left out."""
        if self.dihedral:
            raise BadInput("data.buckets", True, "false with dihedral, which turns pictures by quarters")
        ratios = np.log([height / width for height, width in sizes])
        own = np.log([np.divide(*upright_size(one.path, one.content())) for one in self.found])
        nearest = np.abs(own[:, None] - ratios).argmin(1)
        kept, self._shapes = np.unique(nearest, return_inverse=True)
        self.sizes = [sizes[i] for i in kept]

    def choose_shape(self, rng: np.random.Generator) -> int:
        return int(self._shapes[rng.integers(len(self))]) if len(self.sizes) > 1 else 0

    def places(self, shape: int) -> np.ndarray:
        return np.flatnonzero(self._shapes == shape)

    def rows(self, index: np.ndarray) -> tuple[int, np.ndarray]:
        shape = int(self._shapes[index[0]]) if len(index) else 0
        return shape, np.searchsorted(self.places(shape), index)

    @cached_property
    def pixels(self) -> Pixels:
        """All pictures at `size`, (N,H,W,C)."""
        return self._decode(self.found, self.size)

    @cached_property
    def _kept(self) -> list[Pixels] | None:
        """The decoded pictures of each shape, in the order of `places`; None where they are too many to keep."""
        areas = np.array([height * width for height, width in self.sizes])
        if float(areas[self._shapes].sum()) * self.channels > KEPT_BYTES:
            return None
        groups = ([self.found[i] for i in self.places(shape)] for shape in range(len(self.sizes)))
        return [self._decode(group, size) for group, size in zip(groups, self.sizes, strict=True)]

    def decoded(self, index: np.ndarray) -> Pixels:
        shape, rows = self.rows(index)
        if self._kept is None:
            return self._decode([self.found[i] for i in index], self.sizes[shape])
        return self._kept[shape][rows]

    def _decode(self, found: Sequence[Captioned], size: Size) -> Pixels:
        pixels = np.empty((len(found), *size, self.channels), dtype=np.uint8)
        for i, one in enumerate(found):
            pixels[i] = fitted(read_bands(one.path, self.channels, one.content()), size)
        return pixels

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the items at these positions as they are; in buckets, cropped to `size`, so that any stand together."""
        index = check_indices(indices, len(self))
        alike = self.sizes == [self.size]
        pixels = self.decoded(index) if alike else self._decode([self.found[i] for i in index], self.size)
        return {**self.batch(pixels), **self.conditions(index)}

    def batch(self, pixels: Pixels) -> Batch:
        return {"image": to_tensor(pixels)}

    # --- texts --------------------------------------------------------------------------------------------------------
    def conditions(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """Take the texts of the items at these positions, "caption" (n, L); with `rng` some lose clauses."""
        return {"caption": pack(_shorter([self.found[i].text for i in index], self.clause_dropout, rng), self.longest)}


class Prompts:
    """The lines of a text file in UTF-8 as prompts, for methods that learn without pictures.

    Batches hold "caption" alone.

    Args:
        size, channels: those of the pictures that a model draws of them.
        clause_dropout: as in `CaptionedFolder`.

    Raises:
        BadInput: a file that cannot be read or is not UTF-8; an empty line, by its number.
    """

    labels: tuple[str, ...] = ()
    captioned, pictured = True, False

    def __init__(
        self, path: str | Path, size: int | Sequence[int] = 64, channels: int = 3, clause_dropout: float = 0.0
    ) -> None:
        self.size, self.channels = check_size(size), check_whole("channels", channels, 1)
        self.clause_dropout, file = check_dropout(clause_dropout), Path(path).expanduser()
        if not file.is_file():
            raise BadInput("path", str(path), "a text file, one prompt a line")
        self.texts = [line.strip() for line in read_text(file).removesuffix("\n").split("\n")]
        if empty := [str(i) for i, text in enumerate(self.texts, 1) if not text]:
            raise BadInput("path", f"{file}: {listed(empty, 'empty line')}", "a prompt in each line")
        self.name, self.longest = file.stem, max(len(text.encode()) for text in self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` prompts at random with replacement; a pure function of `rng`."""
        return self._batch(rng.integers(len(self), size=n), rng)

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the prompts at these positions as they are."""
        return self._batch(check_indices(indices, len(self)), None)

    def _batch(self, index: np.ndarray, rng: np.random.Generator | None) -> Batch:
        return {"caption": pack(_shorter([self.texts[i] for i in index], self.clause_dropout, rng), self.longest)}


def bucket_sizes(size: Size, step: int) -> list[Size]:
    """List the heights and widths, multiples of `step`, with at most the area of `size` and sides up to 1 : WIDEST.

    For each height it is the greatest width that fits, and the other way round.

    Raises:
        BadInput: a step that leaves none.
    """
    area = size[0] * size[1]
    found = set[Size]()
    for side in range(step, int((area * WIDEST) ** 0.5) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= WIDEST * min(side, other):
            found |= {(side, other), (other, side)}
    if not found:
        raise BadInput("data.bucket_step", step, f"a step that divides pictures of {size[0]} x {size[1]} px")
    return sorted(found)


def check_dropout(share: float) -> float:
    """Return a clause dropout if it is one, else raise BadInput."""
    if not 0 <= share < 1:
        raise BadInput("clause_dropout", share, "a probability, 0 up to, not including, 1")
    return share


def _shorter(texts: list[str], dropout: float, rng: np.random.Generator | None) -> list[str]:
    """Let texts lose clauses where there is chance and a probability."""
    return texts if rng is None or not dropout else [shortened(text, dropout, rng) for text in texts]


def shortened(text: str, dropout: float, rng: np.random.Generator) -> str:
    """Leave each clause of a text out with this probability; where all would go, a random one stays."""
    clauses = text.split(CLAUSES)
    stays = rng.random(len(clauses)) >= dropout
    if not stays.any():
        stays[rng.integers(len(clauses))] = True
    return CLAUSES.join(clause for clause, kept in zip(clauses, stays, strict=True) if kept)
