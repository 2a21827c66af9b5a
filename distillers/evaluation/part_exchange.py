"""Exchange parts between training pictures that are drawn alike, so that a classifier sees every combination.

Where two values never occur together, such as braids and cat ears, a classifier learns that one rules the other out,
and would not find a pair that a model draws rightly. All pictures of one kind have their eyes at the same place; so a
part of one can be put into another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter

Mask = NDArray[np.bool_]

CLEAR = 12.0  # of 255: how far the mean of a value's pictures is off that of all where the value shows,
SHARE = (
    0.2  # and as a share of where it is farthest off: pictures without one of eight kinds of eyes are off by an eighth,
)
CERTAIN = 5.0  # and in standard errors of that mean
RIM = 3  # pixels around a part that go with it; then as many that should match
LEAST = 10  # pictures of a value; a mean of fewer shows more than the value
TRIED = 8  # pictures among which that is taken whose rim fits best
COVERED = 0.2  # of another attribute's part: beyond it nobody knows which value is seen
TOUCHED = 0.05  # the same of attributes that are no part, such as hair: long hair is told by its ends on the shoulders


class PartExchange:
    """Training pictures (N,H,W,3) and targets (N,A) as `Vocabulary.targets` gives them, with parts exchanged.

    Args:
        kind: the column whose value says what kind of picture it is; parts are exchanged within a kind.
        parts: columns whose values are drawn at one place each; several columns together where one drawing says both.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], targets: NDArray[np.int64], kind: int, parts: Sequence[Sequence[int]]
    ) -> None:
        self.pixels, self.targets, self.kind, self.parts = pixels, targets, kind, parts
        self.kinds = targets[:, kind]
        self.members = {k: np.flatnonzero(self.kinds == k) for k in np.unique(self.kinds)}
        self.moments = {k: self._moments(of) for k, of in self.members.items()}
        self.place, self.places, self.together = cache(self._place), cache(self._places), cache(self._together)

    def _moments(self, index: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Compute mean and deviation (H,W,3) of pictures, some at a time."""
        total, squares = np.zeros(self.pixels.shape[1:]), np.zeros(self.pixels.shape[1:])
        for i in range(0, len(index), 500):
            part = self.pixels[index[i : i + 500]].astype(np.float32)
            total += part.sum(0)
            squares += np.square(part).sum(0)
        mean = total / len(index)
        return mean.astype(np.float32), np.sqrt(np.maximum(squares / len(index) - mean**2, 0)).astype(np.float32)

    def _place(self, kind: int, column: int, value: int) -> Mask | None:
        """Find where a value shows, (H,W): where the mean of its pictures is off the mean of all; None if unknown."""
        members = self.members[kind]
        own = members[self.targets[members, column] == value]
        if len(own) < LEAST or value < 0:
            return None
        mean, deviation = self.moments[kind]
        off = np.abs(gaussian_filter(self._moments(own)[0] - mean, (1, 1, 0)))
        clear = off > np.maximum(max(CLEAR, SHARE * off.max()), CERTAIN * deviation / np.sqrt(len(own)))
        return binary_dilation(clear.any(2), iterations=RIM)

    def _places(
        self, kind: int, columns: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]
    ) -> tuple[Mask, NDArray[np.int64]] | None:
        """Find where two sets of values show, (H,W), and the rim around it, (2, positions)."""
        found = [self.place(kind, c, v) for values in (one, other) for c, v in zip(columns, values, strict=True)]
        masks = [mask for mask in found if mask is not None]
        if len(masks) < len(found) or not (where := np.logical_or.reduce(masks)).any():
            return None
        return where, np.stack(np.nonzero(binary_dilation(where, iterations=RIM) & ~where))

    def _together(self, kind: int, columns: tuple[int, ...]) -> tuple[NDArray[np.int64], list[NDArray[np.bool_]]]:
        """List a part's values (M, columns), and of every column which of its values (M, values) they occur with."""
        own = self.targets[self.members[kind]]
        values, which = np.unique(own[:, columns], axis=0, return_inverse=True)
        met = [np.zeros((len(values), 1 + int(self.targets[:, c].max(initial=0))), bool) for c in range(own.shape[1])]
        for c, table in enumerate(met):
            known = own[:, c] >= 0
            table[which.reshape(-1)[known], own[known, c]] = True
        return values, met

    def _never(self, kind: int, columns: tuple[int, ...], target: NDArray[np.int64]) -> NDArray[np.int64]:
        """List a part's values (M, columns) that never occur with one of the other values of a target (A,)."""
        values, met = self.together(kind, columns)
        others = [c for c in range(len(target)) if c not in columns and target[c] >= 0]
        never = ~np.logical_and.reduce([met[c][:, target[c]] for c in others])
        return values[never & (values >= 0).all(1)]

    def __call__(
        self, index: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Take pictures and targets of these positions; in half of them every second part is another picture's."""
        pixels, targets = self.pixels[index], self.targets[index]
        for i in np.flatnonzero(rng.random(len(index)) < 0.5):
            for k in rng.permutation(len(self.parts)):
                if rng.random() < 0.5:
                    self._exchange(pixels[i], targets[i], int(self.kinds[index[i]]), tuple(self.parts[k]), rng)
        return pixels, targets

    def _exchange(
        self,
        picture: NDArray[np.uint8],
        target: NDArray[np.int64],
        kind: int,
        columns: tuple[int, ...],
        rng: np.random.Generator,
    ) -> None:
        """Put a part of another picture of the kind into a picture (H,W,3), and its values into the target (A,).

        In every second case one is taken, where there is any, that never occurs together with what is there.
        """
        wanted = self.targets[rng.choice(self.members[kind])][list(columns)]
        if rng.random() < 0.5 and len(never := self._never(kind, columns, target)):
            wanted = rng.choice(never)
        old, new = (tuple(int(v) for v in one) for one in (target[list(columns)], wanted))
        if old == new or (place := self.places(kind, columns, old, new)) is None:
            return
        (where, (down, across)), members = place, self.members[kind]
        alike = members[(self.targets[members][:, columns] == new).all(1)]
        tried = rng.choice(alike, min(TRIED, len(alike)), replace=False)
        rims = self.pixels[tried[:, None], down, across].astype(np.int16)
        off = np.abs(rims - picture[down, across]).sum((1, 2))
        best = tried[int(off.argmin())]
        parts = {column for part in self.parts for column in part}
        for column in set(range(len(target))) - {self.kind, *columns}:
            own, most = self.place(kind, column, int(target[column])), COVERED if column in parts else TOUCHED
            if target[column] != self.targets[best, column] and (
                own is None or (own & where).sum() > most * max(own.sum(), 1)
            ):
                target[column] = -1
        picture[where] = self.pixels[best][where]
        target[list(columns)] = new
