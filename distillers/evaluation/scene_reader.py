"""Read captioned shapes off pictures: form, colour, size and place of each of one or two objects, and the background.

No network is needed. Coloured regions are cut out, each on its own background, and read by `shape_reader`, whose
limits decide what has no readable colour or form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, label
from torch import Tensor

from distillers.data.shapes import ALONE, COLOURS, RELATIONS, SHADES, SHAPES, SIZES
from distillers.errors import BadInput
from distillers.evaluation.shape_reader import SECOND, TINT, check_squares, read_shape

COLOURED = 0.28  # of greatest minus least channel in [0,1]: half of the palest colour's
GREY = 0.1  # off a shade's middle; they vary by 0.06, and lie 0.35 apart
WINDOW = 3.0  # radii a side: a cut-out has its object's radius at a third, where single objects have theirs
_AREAS = (np.pi, 1.76**2, 1.72 * 0.993, 4 - 4 * 0.64**2)  # of a radius of 1, form by form
_RADII = np.array(list(SIZES.values()))
_BOUNDS = np.sqrt(_RADII[:-1] * _RADII[1:])  # between sizes
_APART = (_RADII[-1] + ALONE[0]) / 2  # a radius above it is that of an object that stands alone


@dataclass(frozen=True)
class Thing:
    """An object of a picture or of a caption. None: not readable, or not named."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    centre: tuple[float, float] = (0.0, 0.0)  # x, y in shares of the side


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption names."""

    things: tuple[Thing, ...] = ()
    relation: str | None = None  # of the first thing to the second
    background: str | None = None


_ONE = rf"(?:an? )?(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:{_ONE}(?: ({'|'.join(RELATIONS)}) {_ONE})?)?(?:(?:^| )on an? ({'|'.join(SHADES)}) background)?"
)


def parse_scene(caption: str) -> Scene:
    """Read a caption such as "a large red circle above a small blue square on a dark background", or parts of it.

    Raises:
        BadInput: other words.
    """
    text = caption.strip().rstrip(".").lower()
    match = _CAPTION.fullmatch(text)
    if not match or not text:
        allowed = "a [size] [colour] shape [left of, right of, above, below another] [on a dark, mid, light background]"
        raise BadInput("prompt", caption, allowed)
    size, colour, shape, relation, size2, colour2, shape2, background = match.groups()
    things = [Thing(shape, colour, size)] * bool(shape) + [Thing(shape2, colour2, size2)] * bool(shape2)
    return Scene(tuple(things), relation, background)


def read_scenes(pictures: Tensor) -> list[Scene]:
    """Read pictures (B,3,H,H) in [-1,1]; values beyond are clipped.

    Raises:
        BadInput: pictures of another shape, or with a value that is not finite.
    """
    check_squares(pictures)
    p = (pictures.detach().float().cpu().numpy().clip(-1, 1) + 1) / 2
    cuts = [_cut(picture) for picture in p]
    by_side: dict[int, list[NDArray[np.floating]]] = {}
    for cut in cuts:
        for one in cut.parts:
            by_side.setdefault(one.shape[-1], []).append(one)
    read = {}
    for side, parts in by_side.items():
        reading = read_shape(torch.from_numpy(np.stack(parts)) * 2 - 1)
        read[side] = iter(zip(reading.colour.tolist(), reading.form.tolist(), strict=True))
    scenes = []
    for cut in cuts:
        things = [
            _thing(*next(read[one.shape[-1]]), area, centre)
            for one, area, centre in zip(cut.parts, cut.areas, cut.centres, strict=True)
        ]
        scenes.append(Scene(tuple(things), background=cut.background))
    return scenes


@dataclass(frozen=True)
class _Cut:
    """The regions of a picture: each alone (3,h,h), its area and centre in shares of the side, and the background."""

    parts: list[NDArray[np.floating]]
    areas: list[float]
    centres: list[tuple[float, float]]
    background: str | None


def _cut(picture: NDArray[np.floating]) -> _Cut:
    """Cut the coloured regions out of a picture (3,H,H) in [0,1]."""
    side = picture.shape[-1]
    spread = picture.max(0) - picture.min(0)
    regions, count = label(spread > COLOURED)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    kept = [k for k in range(1, count + 1) if sizes[k] >= SECOND * side * side]
    clear = (spread < TINT) & (distance_transform_edt(~np.isin(regions, kept)) > 2)
    if not clear.any():
        return _Cut([], [], [], None)
    ground = np.median(picture[:, clear], axis=1).astype(np.float32)
    grey, tint = float(ground.mean()), float(ground.max() - ground.min())
    near = [name for name, shade in SHADES.items() if abs(grey - shade) <= GREY and tint <= TINT]
    boxes = find_objects(regions)
    away = {k: distance_transform_edt(regions != k) for k in kept}
    parts, areas, centres = [], [], []
    for k in kept:
        others = [away[m] for m in kept if m != k]
        own = away[k] <= np.min(others, axis=0) if others else np.ones_like(regions, bool)
        alone = np.where(own[None], picture, ground[:, None, None])
        down, across = boxes[k - 1]
        middle = ((down.start + down.stop) / 2, (across.start + across.stop) / 2)
        reach = max(down.stop - down.start, across.stop - across.start) / 2
        parts.append(_window(alone, middle, max(8, round(WINDOW * reach)), ground))
        areas.append(
            float((spread / np.quantile(spread[regions == k], 0.9)).clip(0, 1)[own & (away[k] < 2)].sum()) / side**2
        )
        centres.append((middle[1] / side, middle[0] / side))
    return _Cut(parts, areas, centres, near[0] if near else None)


def _window(
    picture: NDArray[np.floating], middle: tuple[float, float], side: int, ground: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Take the square (3,side,side) around a middle (down, across) in pixels; beyond the picture it is background."""
    window = np.broadcast_to(ground[:, None, None], (3, side, side)).astype(np.float32).copy()
    top, left = (round(at - side / 2) for at in middle)
    first_y, first_x = max(top, 0), max(left, 0)
    last_y, last_x = min(top + side, picture.shape[1]), min(left + side, picture.shape[2])
    window[:, first_y - top : last_y - top, first_x - left : last_x - left] = picture[:, first_y:last_y, first_x:last_x]
    return window


def _thing(colour: int, form: int, area: float, centre: tuple[float, float]) -> Thing:
    """Name what was read of a region; its size follows from its area, where its form is known."""
    size = None
    if form >= 0:
        radius, names = np.sqrt(area / _AREAS[form]), list(SIZES)
        place = int(np.searchsorted(_BOUNDS, radius)) if radius < _APART else 1 + int(radius > sum(ALONE) / 2)
        size = names[place]
    return Thing(SHAPES[form] if form >= 0 else None, list(COLOURS)[colour] if colour >= 0 else None, size, centre)


ASKED = ("objects", "shape", "colour", "size", "relation", "background")


def compare(asked: Scene, shown: Scene) -> dict[str, bool]:
    """Say of each of ASKED that a caption names whether a picture shows it.

    "objects" is how many there are. Where two are named, those of the picture are taken in the order that fits more.
    """
    if not asked.things:
        return {"background": shown.background == asked.background}
    orders: Sequence[tuple[Thing, ...]] = [shown.things]
    if len(shown.things) == 2:
        orders = [shown.things, shown.things[::-1]]
    found = max((_matches(asked, things) for things in orders), key=lambda one: sum(one.values()))
    if asked.background is not None:
        found["background"] = shown.background == asked.background
    return found


def _matches(asked: Scene, things: Sequence[Thing]) -> dict[str, bool]:
    """Compare the objects of a caption with those of a picture, in their order."""
    found = {"objects": len(things) == len(asked.things)}
    for name in ("shape", "colour", "size"):
        wanted = [(i, getattr(one, name)) for i, one in enumerate(asked.things) if getattr(one, name) is not None]
        if wanted:
            found[name] = all(i < len(things) and getattr(things[i], name) == value for i, value in wanted)
    if asked.relation is not None:
        found["relation"] = len(things) == 2 and _relation(things[0], things[1]) == asked.relation
    return found


def _relation(one: Thing, other: Thing) -> str:
    """Name the relation of two objects along the axis on which they lie further apart."""
    dx, dy = one.centre[0] - other.centre[0], one.centre[1] - other.centre[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
