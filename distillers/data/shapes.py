"""Captioned shapes: an endless computed data set, whose captions and labels are true by construction.

A row of uniform numbers becomes an entry of `Scenes`, from which picture and caption are both made. Lengths are
fractions of the picture's side, x to the right and y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from distillers.data.pixels import SPLITS, Batch, check_indices, check_side, check_split, check_whole
from distillers.errors import BadInput
from distillers.models.captions import pack

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.87, 0.12, 0.12),
    "green": (0.10, 0.66, 0.16),
    "blue": (0.13, 0.25, 0.92),
    "yellow": (0.96, 0.84, 0.08),
    "magenta": (0.85, 0.14, 0.80),
    "cyan": (0.08, 0.78, 0.86),
}
SIZES = {"tiny": 0.10, "small": 0.14, "large": 0.21}  # radius; the second object is one size below the first
ALONE = (0.24, 0.42)  # radius of the object in a picture of one: below, a form of 32 px is three pixels wide
SHADES = {"dark": 0.10, "mid": 0.45, "light": 0.88}
RELATIONS = ("left of", "right of", "above", "below")
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
NOMINAL = 10_000

_LONGEST_THING = " ".join(("a", *(max(words, key=len) for words in (SIZES, COLOURS, SHAPES))))
LONGEST = len(f"{_LONGEST_THING} {max(RELATIONS, key=len)} {_LONGEST_THING} on a {max(SHADES, key=len)} background")

_MARGIN, _GAP = 0.03, 0.05  # to the border; between the two objects
_UNIFORMS = 14  # numbers that decide one picture
_SHADE = 7  # the one of them that decides the background's shade

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """The content of N pictures. Fields of the second object mean nothing where `second` is False.

    shape, colour, size: (N,2) positions in SHAPES, COLOURS, SIZES. radius: (N,2). centre: (N,2,2) as (object, x/y).
    relation: (N,) of the first to the second. shade: (N,) position in SHADES; grey: (N,) the background in [0,1].
    """

    shape: Ints
    colour: Ints
    size: Ints
    radius: Floats
    centre: Floats
    second: NDArray[np.bool_]
    relation: Ints
    shade: Ints
    grey: Floats

    def caption(self, i: int) -> str:
        """Describe picture `i` in words, e.g. "a large red circle above a small blue square on a dark background"."""
        words = self._thing(i, 0)
        if self.second[i]:
            words += f" {RELATIONS[self.relation[i]]} {self._thing(i, 1)}"
        return f"{words} on a {list(SHADES)[self.shade[i]]} background"

    def _thing(self, i: int, which: int) -> str:
        size, colour = list(SIZES)[self.size[i, which]], list(COLOURS)[self.colour[i, which]]
        return f"a {size} {colour} {SHAPES[self.shape[i, which]]}"


class CaptionedShapes:
    """Endless pictures of a coloured shape (labels: 4 shapes in 6 colours).

    `objects` is how many a picture shows at most. 2: in half of the pictures a smaller shape stands beside the one that
    the label names. 1: the named shape alone, with a radius of 0.24 to 0.42 of the side, so that its form can be seen.

    Endless: item i is a pure function of (seed, split, i) for every i >= 0; `len` is a nominal 10,000. `draw` takes its
    pictures from the same distribution, by `rng` alone. `shade` puts every picture on a "dark", "mid" or "light"
    background and leaves it as it is otherwise: another style. `limit` keeps the first so many items, all that `draw`
    then shows: a handful of examples. `captions` puts "caption" into the batches. `withheld` are labels, such as
    "red cross", that no picture of the train split shows: another form of the colour stands there. What a model makes
    of them in the test split is new to it.

    Raises:
        BadInput: size below 8, limit below 1, unknown split or shade, objects but 1 and 2, negative seed or index,
            unknown labels, or all forms of a colour, withheld.
    """

    name = "shapes"
    labels = LABELS
    channels = 3
    pictured = True

    def __init__(
        self,
        size: int = 32,
        seed: int = 0,
        split: str = "train",
        shade: str | None = None,
        limit: int | None = None,
        objects: int = 2,
        captions: bool = False,
        withheld: Sequence[str] = (),
    ) -> None:
        check_split(split)
        if objects not in (1, 2):
            raise BadInput("objects", objects, "1 or 2")
        if shade is not None and shade not in SHADES:
            raise BadInput("shade", shade, " | ".join(SHADES))
        self.side, self.seed, self.split = check_side(size), check_whole("seed", seed, 0), split
        self.size, self.captioned = (size, size), captions
        wrong = [label for label in withheld if label not in LABELS]
        full = [colour for colour in COLOURS if all(f"{colour} {shape}" in withheld for shape in SHAPES)]
        if wrong or full:
            raise BadInput(
                "data.withheld", wrong or list(withheld), f"some of {', '.join(LABELS)}; a form of each left"
            )
        self.withheld = np.array([label in withheld for label in LABELS]).reshape(len(COLOURS), len(SHAPES))
        self.objects, self.shade, self.limit = objects, shade, None if limit is None else check_whole("limit", limit, 1)

    def __len__(self) -> int:
        return NOMINAL if self.limit is None else self.limit

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` new pictures, or under a limit `n` of those there are; a pure function of `rng`."""
        if self.limit is not None:
            return self.items(rng.integers(self.limit, size=n).tolist())
        return self._batch(self._scenes(rng.random((n, _UNIFORMS))))

    def items(self, indices: Sequence[int]) -> Batch:
        """Make the pictures at these positions."""
        return self._batch(self.scenes(indices))

    def scenes(self, indices: Sequence[int]) -> Scenes:
        """Return the content of the pictures at these positions."""
        wanted = check_indices(indices, self.limit)
        rows = [np.random.default_rng([self.seed, SPLITS.index(self.split), i]).random(_UNIFORMS) for i in wanted]
        return self._scenes(np.array(rows).reshape(len(wanted), _UNIFORMS))

    def _scenes(self, u: NDArray[np.float64]) -> Scenes:
        if self.shade is not None:
            u[:, _SHADE] = (list(SHADES).index(self.shade) + 0.5) / len(SHADES)
        found = scenes(u, self.objects)
        if self.split == "train" and self.withheld.any():
            shape = found.shape.copy()
            while (taken := self.withheld[found.colour, shape]).any():
                shape[taken] = (shape[taken] + 1) % len(SHAPES)
            found = replace(found, shape=shape)
        return found

    def caption(self, index: int) -> str:
        """Describe the picture at a position in words."""
        return self.scenes([index]).caption(0)

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Describe the pictures at these positions in words."""
        what = self.scenes(indices)
        return [what.caption(i) for i in range(len(indices))]

    def _batch(self, what: Scenes) -> Batch:
        image = torch.from_numpy(paint(what, self.side).transpose(0, 3, 1, 2) * 2 - 1).contiguous()
        batch = {"image": image, "label": torch.from_numpy(what.colour[:, 0] * len(SHAPES) + what.shape[:, 0])}
        if self.captioned:
            batch["caption"] = pack([what.caption(i) for i in range(len(image))], LONGEST)
        return batch


def scenes(u: NDArray[np.float64], objects: int = 2) -> Scenes:
    """Turn uniform numbers (N,14) into pictures of so many objects at most, which fit and stay apart."""
    shape, colour = _choose(u[:, 0:2], len(SHAPES)), _choose(u[:, 2:4], len(COLOURS))
    first = 1 + _choose(u[:, 4], 2)
    size = np.stack([first, first - 1], axis=1)
    second = u[:, 5] < (0.5 if objects == 2 else 0)
    relation, shade = _choose(u[:, 6], len(RELATIONS)), _choose(u[:, _SHADE], len(SHADES))
    radius = np.array(list(SIZES.values()))[size]
    if objects == 1:
        radius = np.repeat(ALONE[0] + (ALONE[1] - ALONE[0]) * u[:, 4:5], 2, axis=1)
    alone = _between(_MARGIN + radius[:, :1], u[:, 8:10])
    centre = np.where(second[:, None, None], _beside(radius, relation, u[:, 8:12]), alone[:, None, :])
    grey = np.array(list(SHADES.values()))[shade] + 0.06 * (2 * u[:, 12] - 1)
    return Scenes(
        shape, colour, size, radius, centre.astype(np.float32), second, relation, shade, grey.astype(np.float32)
    )


def _choose(u: NDArray[np.float64], count: int) -> Ints:
    return (u * count).astype(np.int64)


def _between(low: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale uniform numbers to [low, 1 - low]."""
    return low + (1 - 2 * low) * u


def _beside(radius: NDArray[np.float64], relation: Ints, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place the centres (N,2,2) of two objects in `relation`: along one axis, then mirrored and swapped."""
    r1, r2 = radius.T
    free = 1 - 2 * _MARGIN - 2 * (r1 + r2) - _GAP  # what is left of the side when both stand on the axis
    start, extra = np.sort(u[:, :2], axis=1).T * free
    along1 = _MARGIN + start + r1
    along2 = along1 + r1 + _GAP + r2 + (extra - start)
    across1 = _between(_MARGIN + r1, u[:, 2])
    sideways = (2 * u[:, 3] - 1) * 0.6 * (along2 - along1)  # less than along the axis, so the relation is beyond doubt
    across2 = np.clip(across1 + sideways, _MARGIN + r2, 1 - _MARGIN - r2)
    mirrored, vertical = (relation % 2 == 1)[:, None], (relation >= 2)[:, None, None]
    along = np.stack([along1, along2], axis=1)
    along, across = np.where(mirrored, 1 - along, along), np.stack([across1, across2], axis=1)
    return np.where(vertical, np.stack([across, along], axis=2), np.stack([along, across], axis=2))


def paint(what: Scenes, size: int) -> Floats:
    """Paint pictures, float32 (N,size,size,3) in [0,1], antialiased by the signed distance in pixels."""
    n, palette = len(what.shape), np.array(list(COLOURS.values()), dtype=np.float32)
    image = np.broadcast_to(what.grey[:, None, None, None], (n, size, size, 3)).copy()
    radius = what.radius.astype(np.float32)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    for which in (0, 1):
        for kind, name in enumerate(SHAPES):
            chosen = np.flatnonzero((what.shape[:, which] == kind) & (what.second if which else True))
            r = radius[chosen, which, None, None]
            x = (grid[None, None, :] - what.centre[chosen, which, 0, None, None]) / r
            y = (grid[None, :, None] - what.centre[chosen, which, 1, None, None]) / r
            cover = np.clip(0.5 - distance(name, x, y) * (r * size), 0, 1)[..., None]
            image[chosen] += cover * (palette[what.colour[chosen, which], None, None] - image[chosen])
    return image


def distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Compute the signed distance to the outline of a shape within [-1,1]: negative inside, exact at the edges."""
    x = np.abs(x)
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(x, np.abs(y)) - np.float32(0.88)
    if shape == "triangle":  # equilateral, tip up: half-planes of the base and of the slanted side
        return np.maximum(y - np.float32(0.86), np.float32(0.866) * x - np.float32(0.5) * y - np.float32(0.43))
    y = np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - np.float32(0.36))
