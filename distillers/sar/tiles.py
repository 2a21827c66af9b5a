"""How a scene is cut into overlapping tiles that blend without seams, and the noise that they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, floor, inf, pi, prod

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.sar.options import SceneOptions

TILE = 256  # px a side, unless a scene is smaller


# --- the ground's noise ----------------------------------------------------------------------------------------------
def ground_corner(transform: Sequence[float] | None) -> tuple[int, int]:
    """Find where a scene's upper left pixel lies on the ground's grid: (row, column), whole pixels from the CRS's zero.

    Scenes of one grid, cut out of one mosaic or resampled to one pixel size and origin, count the same pixel alike; a
    grid that is a part of a pixel off is moved by less than one.

    Args:
        transform: (a, b, c, d, e, f): a pixel (column, row) lies at x = a column + b row + c, y = d column + e row + f.
            None, and one that has no such grid, count from the scene's own corner.
    """
    if transform is None:
        return 0, 0
    a, b, x, d, e, y = transform[:6]
    area = a * e - b * d
    place = ((a * y - d * x) / area, (e * x - b * y) / area) if area else (inf, inf)
    if not all(abs(n) < 2**52 for n in place):  # not a number either
        return 0, 0
    # Many grids lie half a pixel off the CRS's zero: where rounding errors meet the limit, neighbours would disagree.
    row, column = (floor(n + 0.499) for n in place)
    return row, column


class NoiseField:
    """Unit Gaussian noise over an endless plane, each value a function of (seed, step, place) alone.

    The plane is made of blocks, each from its own Philox stream (Salmon et al. 2011): key = (seed, step), counter =
    (row, column). A crop of it is what a tile starts from, so neighbours start from the same noise where they overlap.
    """

    BLOCK = 16  # positions a side: a default tile and its stride are whole blocks, none is made for a part of it

    def __init__(self, channels: int, kept: int = 256) -> None:
        self.channels, self._kept = channels, kept
        self._blocks: OrderedDict[tuple[int, ...], NDArray[np.float32]] = OrderedDict()

    def crop(self, seed: int, step: int, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """Cut (channels, height, width), float32, out of the plane; places are the network's positions, any integer."""
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
            seed, step, *corner = place
            counter = np.array([0, 0, *(n % 2**64 for n in corner)], np.uint64)  # places may lie below zero
            bits = np.random.Philox(key=np.array([seed, step], np.uint64), counter=counter)
            block = self._blocks[place] = _normal(bits, (self.channels, self.BLOCK, self.BLOCK))
            with suppress(KeyError):  # another thread was first
                while len(self._blocks) > self._kept:
                    self._blocks.popitem(last=False)
        return block


def _normal(bits: np.random.Philox, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw unit Gaussian numbers by the transform of Box and Muller (1958), in 60 % of the time of NumPy's own.

    Like torch's, from 24 random bits each: none is beyond 5.77. The last axis is even.
    """
    words = bits.random_raw(prod(shape) // 2).view(np.uint32).reshape(2, -1)
    uniform = (words >> 8).astype(np.float32) * np.float32(2**-24)  # in [0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[0]))
    angle = np.float32(2 * pi) * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(shape)


# --- the tiles -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """One side of a scene, cut into tiles a stride apart; the first and the last may reach beyond the scene.

    Args:
        length: pixels of the scene.
        lead: pixels from the first tile's start to the scene's first pixel.
        ground: where the first tile starts on the ground's grid.
    """

    length: int
    tile: int
    overlap: int
    lead: int = 0
    ground: int = 0

    @property
    def stride(self) -> int:
        """The pixels from one tile's start to the next one's."""
        return self.tile - self.overlap

    @property
    def count(self) -> int:
        """The number of tiles."""
        return 1 + max(0, ceil((self.lead + self.length - self.tile) / self.stride))

    def start(self, index: int) -> int:
        """Return the pixel of the scene at which a tile starts; below 0 where the first one reaches beyond."""
        return index * self.stride - self.lead

    def touching(self, shown: slice) -> range:
        """List the tiles that reach into a part of the scene."""
        first = max(0, (self.lead + shown.start - self.tile) // self.stride + 1)
        return range(first, min(self.count, ceil((self.lead + shown.stop) / self.stride)))

    def done(self, first: int, last: int, shown: slice) -> slice:
        """Return the pixels of a part of the scene that these tiles finish, if all before them are there; maybe none.

        Later tiles reach into the others: a pixel is finished when the last tile on it is.
        """
        end = self.start(last + 1) if last < self.count - 1 else self.length
        start = max(self.start(first), shown.start)
        return slice(start, max(start, min(end, shown.stop)))

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


def axis(length: int, options: SceneOptions, multiple: int, start: int = 0) -> Axis:
    """Cut one side of a scene into tiles whose size is a multiple of the model's `size_multiple`.

    Tiles start at multiples of their stride on the ground's grid, where the scene starts at `start`: a neighbour, or a
    scene that holds this one, has the same tiles. A side that fits into one tile is one tile.

    Raises:
        BadInput: a tile that is no such multiple, or an overlap that is not a quarter to a half of it.
    """
    tile = options.tile or max(TILE // multiple, 1) * multiple
    overlap = ceil(tile / 4 / multiple) * multiple if options.overlap is None else options.overlap
    if tile % multiple or tile < 2 * multiple:
        raise BadInput("tile", tile, f"a multiple of {multiple}, {2 * multiple} or more")
    if overlap % multiple or not tile / 4 <= overlap <= tile / 2:
        raise BadInput("overlap", overlap, f"a multiple of {multiple}, a quarter to a half of the tile ({tile})")
    lead = start % multiple
    whole = ceil((lead + length) / multiple) * multiple
    if whole <= tile:
        return Axis(length, whole, 0, lead, start - lead)
    lead = start % (tile - overlap)
    return Axis(length, tile, overlap, lead, start - lead)


# --- the work --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Some tiles side by side, which are read, blended and written together."""

    row: int
    columns: range
    valid: NDArray[np.bool_]  # (tile, pixels from the first one's start to the last one's end)


@dataclass(frozen=True)
class Tile:
    """A tile of one sample of a scene."""

    sample: int
    column: int
    run: Run
    sar: NDArray[np.float32] | None  # (channels, tile, tile) without holes; None: all of it is one
