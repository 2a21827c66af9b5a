"""Zeros that fill what lies beyond a scene's ground, found where a file does not mark them as no data.

Reprojected and cut scenes often have a border of exact zeros in all bands. No ground has that over an area: zero power
or amplitude is silence, and 0 dB is as bright as a town. A border is connected to the scene's edge, directly or through
pixels without data, and solid; zeros of clipped noise, which lie scattered over dark water, are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distillers.sar.part import Part

LEAST = 64  # px of zeros that are a border
STRIP = 1 << 21  # px that are searched at a time
MAX_RUNS = 1 << 21  # runs of zeros that are kept in memory, 32 bytes each

Mask = NDArray[np.bool_]
Read = Callable[[int, int], tuple[Mask, Mask]]
"""(top, rows) -> where a pixel is 0 in all bands, and where it has no data, both (rows, width)."""


@dataclass(frozen=True)
class Border:
    """The border of a scene, as runs of pixels in its rows.

    Attributes:
        runs: (n, 3) row, first column, column after the last, sorted by row.
        pixels: how many the border has.
    """

    runs: NDArray[np.int64]
    pixels: int

    def within(self, part: Part) -> Mask:
        """Draw (height, width): where the border is in a part of the scene."""
        row, start, stop = self.runs[slice(*np.searchsorted(self.runs[:, 0], (part.top, part.top + part.height)))].T
        start, stop = (np.clip(column - part.left, 0, part.width) for column in (start, stop))
        row, start, stop = (column[stop > start] for column in (row - part.top, start, stop))
        steps = np.zeros((part.height, part.width + 1), np.int8)
        steps[row, start] = 1
        steps[row, stop] -= 1
        return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8) > 0


NO_BORDER = Border(np.empty((0, 3), np.int64), 0)


def find_border(read: Read, height: int, width: int) -> Border:
    """Find the border of zeros, reading the whole scene once, strip by strip.

    With more than MAX_RUNS runs of zeros, which no border has, there is none.

    Zeros belong to it in groups of pixels that touch by their sides: those that reach the scene's edge, have LEAST
    pixels (or as many as the shorter side, if that is less), and lie beside ground with no more sides than they have
    pixels. The last tells a solid fill, even one a single pixel wide along an edge, from scattered zeros.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    strips = _Strips(height, width)
    step = max(1, STRIP // width)
    for top in range(0, height, step):
        strips.add(top, *read(top, min(step, height - top)))
        if strips.kept > MAX_RUNS:
            return NO_BORDER
    links, runs, found = (np.concatenate(parts) for parts in (strips.links, strips.runs, strips.found))
    graph = coo_array((np.ones(len(links), bool), links.T), shape=(strips.groups, strips.groups))
    count, member = connected_components(graph, directed=False)
    area, sides, edge = (np.bincount(member[found[:, 0]], found[:, i], count) for i in (1, 2, 3))
    chosen = (edge > 0) & (area >= min(LEAST, height, width)) & (sides <= area)
    return Border(runs[chosen[member[runs[:, 3]]]][:, :3], int(area[chosen].sum()))


class _Strips:
    """Groups of zeros and of pixels without data, strip by strip, with what is needed to join them afterwards.

    Groups that end inside a strip and do not reach the scene's edge are dropped: they are no border.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.groups = self.kept = 0
        # group, pixels of zeros, their sides towards ground, sides on the scene's edge; of a group in several rows
        self.found: list[NDArray[np.int64]] = [np.empty((0, 4), np.int64)]
        self.links: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
        self.runs: list[NDArray[np.int64]] = []  # row, first column, column after the last, group
        self._above: tuple[NDArray[np.int64], Mask] = np.full(width, -1), np.zeros(width, bool)  # groups and zeros

    def add(self, top: int, zero: Mask, empty: Mask) -> None:
        """Add the strip whose first row is `top`."""
        from scipy.ndimage import label

        inside = zero | empty
        labels, count = label(inside)

        def counted(of: NDArray[np.int32], weights: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
            return np.bincount(of, weights, minlength=count + 1).astype(np.int64)

        row, start, stop = _runs(zero)
        area, sides = counted(labels[row, start], stop - start), np.zeros(count + 1, np.int64)
        for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
            for a, b in ((one, other), (other, one)):
                sides += counted(labels[a][zero[a] & ~inside[b]])
        edge = counted(labels[:, [0, -1]].ravel())
        for first_or_last in [labels[0]] * (top == 0) + [labels[-1]] * (top + len(zero) == self.height):
            edge += counted(first_or_last)
        above, zero_above = self._above
        if top > 0:
            sides += counted(labels[0][zero[0] & (above < 0)])
        reaches = edge > 0
        reaches[labels[[0, -1]]] = True
        reaches[0] = False
        number = np.where(reaches, self.groups + np.cumsum(reaches) - 1, -1)  # among the groups of all strips
        self.found.append(np.stack([number, area, sides, edge], 1)[reaches])
        groups, beside = np.unique(above[zero_above & ~inside[0]], return_counts=True)
        self.found.append(np.stack([groups, 0 * beside, beside, 0 * beside], 1))
        both = (above >= 0) & inside[0]
        self.links.append(np.unique(np.stack([above[both], number[labels[0][both]]], 1), axis=0))
        self.groups += int(reaches.sum())
        self._above = number[labels[-1]], zero[-1]
        group = number[labels[row, start]]
        self.runs.append(np.stack([row + top, start, stop, group], 1)[group >= 0])
        self.kept += len(self.runs[-1])


def _runs(mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find the rows, the first columns and the columns after the last of the runs of a mask, by row."""
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(steps == 1)
    _, stop = np.nonzero(steps == -1)
    return row, start, stop
