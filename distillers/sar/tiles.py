"""How a scene is cut into overlapping tiles that blend without seams, and the noise that they share."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.sar.options import SceneOptions

TILE = 256  # px a side, unless a scene is smaller


# --- the ground's noise ----------------------------------------------------------------------------------------------
class NoiseField:
    """Unit Gaussian noise over an endless plane, each value a function of (seed, step, place) alone.

    The plane is made of blocks, each from its own Philox stream (Salmon et al. 2011): key = (seed, step), counter =
    (row, column). A crop of it is what a tile starts from, so neighbours start from the same noise where they overlap.
    """

    BLOCK = 64  # positions a side

    def __init__(self, channels: int, kept: int = 128) -> None:
        self.channels, self._kept = channels, kept
        self._blocks: OrderedDict[tuple[int, ...], NDArray[np.float32]] = OrderedDict()

    def crop(self, seed: int, step: int, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """Cut (channels, height, width), float32, out of the plane; places are the network's positions, 0 or more."""
        b = self.BLOCK
        out = np.empty((self.channels, height, width), dtype=np.float32)
        for row in range(top // b, ceil((top + height) / b)):
            for column in range(left // b, ceil((left + width) / b)):
                y0, y1 = max(top, row * b), min(top + height, (row + 1) * b)
                x0, x1 = max(left, column * b), min(left + width, (column + 1) * b)
                block = self._block(seed, step, row, column)
                out[:, y0 - top : y1 - top, x0 - left : x1 - left] = block[
                    :, y0 - row * b : y1 - row * b, x0 - column * b : x1 - column * b
                ]
        return out

    def _block(self, *place: int) -> NDArray[np.float32]:
        """Make a block, or take the one made for a neighbour; two threads may make the same one."""
        block = self._blocks.get(place)
        if block is None:
            seed, step, row, column = place
            bits = np.random.Philox(key=np.array([seed, step], np.uint64), counter=[0, 0, row, column])
            shape = (self.channels, self.BLOCK, self.BLOCK)
            block = self._blocks[place] = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
            with suppress(KeyError):  # another thread was first
                while len(self._blocks) > self._kept:
                    self._blocks.popitem(last=False)
        return block


# --- the tiles -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """One side of a scene or a part, cut into tiles at multiples of `stride`; the last may reach beyond the scene."""

    length: int
    tile: int
    overlap: int
    start: int = 0  # the scene's pixel where the first tile begins

    @property
    def stride(self) -> int:
        """The pixels from one tile's start to the next one's."""
        return self.tile - self.overlap

    @property
    def count(self) -> int:
        """The number of tiles."""
        return 1 + max(0, ceil((self.length - self.tile) / self.stride))

    @property
    def covered(self) -> int:
        """The pixels from the first tile's start to the last one's end."""
        return (self.count - 1) * self.stride + self.tile

    def part(self, first: int, length: int) -> Axis:
        """Keep the tiles that reach into `length` pixels from `first` on, which stay there what they are in the whole.

        No tile that is left out has a weight in these pixels. The scene's last tile is kept with the one before it, for
        what is reflected beyond the scene may come from there.
        """
        begin = max(0, (first - self.tile) // self.stride + 1)
        end = min(self.count, ceil((first + length) / self.stride))
        if end == self.count:
            begin = min(begin, max(0, end - 2))
        covered = self.length if end == self.count else (end - 1) * self.stride + self.tile
        return replace(self, length=covered - begin * self.stride, start=begin * self.stride)

    def weight(self, index: int) -> NDArray[np.float32]:
        """Compute the blending weights (tile,) of a tile; those of all tiles add up to 1.

        Where a neighbour overlaps: nothing in the outer quarter, where convolutions saw the zeros beyond the tile; then
        a raised cosine over half of the overlap.
        """
        weight = np.ones(self.tile)
        outer = self.overlap // 4
        length = self.overlap - 2 * outer
        ramp = np.zeros(self.overlap)
        ramp[outer : outer + length] = 0.5 - 0.5 * np.cos(np.pi * (np.arange(length) + 0.5) / max(length, 1))
        ramp[outer + length :] = 1
        if index > 0:
            weight[: self.overlap] = ramp
        if index < self.count - 1:
            weight[self.tile - self.overlap :] = ramp[::-1]
        return weight.astype(np.float32)


def axis(length: int, options: SceneOptions, multiple: int) -> Axis:
    """Cut one side of a scene into tiles whose size is a multiple of the model's `size_multiple`.

    Raises:
        BadInput: a tile that is no such multiple, or an overlap that is not a quarter to a half of it.
    """
    tile = options.tile or max(TILE // multiple, 1) * multiple
    overlap = ceil(tile / 4 / multiple) * multiple if options.overlap is None else options.overlap
    if tile % multiple or tile < 2 * multiple:
        raise BadInput("tile", tile, f"a multiple of {multiple}, {2 * multiple} or more")
    if overlap % multiple or not tile / 4 <= overlap <= tile / 2:
        raise BadInput("overlap", overlap, f"a multiple of {multiple}, a quarter to a half of the tile ({tile})")
    whole = ceil(length / multiple) * multiple
    return Axis(length, tile, overlap) if whole > tile else Axis(length, whole, 0)


# --- the work --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tile:
    """A tile of one sample of a scene."""

    sample: int
    row: int
    column: int
    sar: NDArray[np.float32] | None  # (channels, tile, tile) without holes; None: all of it is one
    valid: NDArray[np.bool_]  # of its whole row of tiles
