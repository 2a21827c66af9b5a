"""Reads the colour and the form off a picture of one shape (`CaptionedShapes(objects=1)`), or says why it cannot.

No network: the picture is held against the very formula that draws the data. Its matte (how much of each pixel is
object) is fitted by the template of each form, over centre and radius; what the best one leaves over decides. A
picture shows a form only if it truly looks like it: half, doubled, blurred, smeared and speckled objects show none.
tests/test_evaluation_shapes.py holds how far real pictures and mildly soft ones stay from each limit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import label
from torch import Tensor

from distillers.data.shapes import ALONE, COLOURS, SHAPES, distance
from distillers.errors import BadInput

Floats = NDArray[np.floating]

# Limits, on pictures in [0,1].
CHROMA = 0.3  # of greatest minus least channel, of the most coloured twentieth; the palette has 0.56 and more
SECOND = 0.01  # of the picture: a second coloured region as large is another object
COLOUR = 0.12  # root mean square over channels, to the palette; its nearest two are 0.31 apart
TINT = 0.12  # greatest minus least channel of the background
UNEVEN = 0.06  # fourth-power mean of what is off the mean of object or of background: specks count as noise does
OVERLAP = 0.93  # intersection over union of matte and template; a circle and a square have 0.84 at best
BORDER = 0.53  # of the side, from the picture's middle: how far an object may reach, which a border would cut off
EDGE = 0.24  # pixels: what is off the template, spread along its outline; a blur by s pixels has 0.8 s

TOLD = "colour and form are told"
REASONS = (
    TOLD, "no coloured region", "several regions", "no colour of the palette", "the background is not grey",
    "noisy or uneven", "no form fits",
)  # fmt: skip

_PALETTE = np.array(list(COLOURS.values()), np.float32)
# of a radius of 1, form by form: area, how far the centroid lies below the centre, length of the outline
_AREA = (np.pi, 1.76**2, 1.72 * 0.993, 4 - 4 * 0.64**2)
_BELOW = (0.0, 0.0, 0.287, 0.0)
_OUTLINE = (2 * np.pi, 8 * 0.88, 6 * 0.993, 8.0)
_RADIUS = (0.75 * ALONE[0], 1.15 * ALONE[1])  # of the side; what is much smaller or larger is another picture


@dataclass(frozen=True)
class Figures:
    """What is measured of B pictures, float (B,) unless said; see the limits of this file. colour, form: int (B,)."""

    chroma: Floats
    regions: NDArray[np.int64]
    colour: NDArray[np.int64]  # the nearest of the palette
    colour_off: Floats
    tint: Floats
    uneven: Floats
    form: NDArray[np.int64]  # the best template
    overlap: Floats
    edge: Floats


@dataclass(frozen=True)
class Reading:
    """What B pictures show. colour, form: int64 (B,), positions in COLOURS and SHAPES, -1 where it cannot be told.

    A colour may be told of an object whose form cannot, and the other way round. reason: for each picture one of
    REASONS, the first that applies; TOLD where both are.
    """

    colour: Tensor
    form: Tensor
    reason: tuple[str, ...]

    def shows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bool (B,) twice: the colour, and the form, are those of the labels (B,), positions in data.shapes.LABELS.

        Raises:
            BadInput: labels of another number than the pictures.
        """
        if labels.shape != self.colour.shape:
            raise BadInput("labels", tuple(labels.shape), f"one for each of the {len(self.colour)} pictures")
        labels = labels.cpu()
        return self.colour == labels // len(SHAPES), self.form == labels % len(SHAPES)


def read_shape(pictures: Tensor) -> Reading:
    """Reads colour and form of the one object of each picture, (B,3,H,H) in [-1,1]; values beyond are cut.

    Raises:
        BadInput: pictures of another shape, or with a value that is not finite.
    """
    shape = tuple(pictures.shape)
    if len(shape) != 4 or not shape[0] or shape[1] != 3 or shape[2] != shape[3]:
        raise BadInput("pictures", shape, "(B,3,H,H), one picture or more")
    if not bool(pictures.isfinite().all()):
        raise BadInput("pictures", "values that are not finite", "numbers in [-1,1]")
    parts = [_read(measure(part)) for part in pictures.split(128)]  # as much as a processor's cache holds
    colour, form, why = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Reading(torch.from_numpy(colour), torch.from_numpy(form), tuple(REASONS[i] for i in why))


def asked_share(pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures (B,3,H,H) in [-1,1] that show both the colour and the form that their labels (B,) ask."""
    return shares(*read_shape(pictures).shows(labels))["asked"]


def shares(colour: Tensor, form: Tensor) -> dict[str, float]:
    """What `Reading.shows` told, bool (B,) twice, as shares: of both ("asked"), of the colour, of the form."""
    shown = {"asked": colour & form, "colour": colour, "form": form}
    return {name: float(them.double().mean()) for name, them in shown.items()}


def _read(seen: Figures) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(colour, form, position in REASONS) of each picture."""
    faint, several = seen.chroma < CHROMA, seen.regions > 1
    off, tinted, uneven = seen.colour_off > COLOUR, seen.tint > TINT, seen.uneven > UNEVEN
    unlike = (seen.overlap < OVERLAP) | (seen.edge > EDGE)
    why = np.select([faint, several, off, tinted, uneven, unlike], range(1, len(REASONS)), 0)
    colour = np.where(faint | several | off | tinted, -1, seen.colour)
    return colour, np.where(faint | several | tinted | uneven | unlike, -1, seen.form), why


def measure(pictures: Tensor) -> Figures:
    """The figures of (B,3,H,H) in [-1,1] that `read_shape` holds against its limits."""
    p, side = (pictures.detach().float().cpu().numpy().clip(-1, 1) + 1) / 2, pictures.shape[-1]
    spread = p.max(1) - p.min(1)  # on grey, it grows in step with the cover
    chroma = np.quantile(spread, 0.95, axis=(1, 2)).astype(np.float32)
    part = spread / np.maximum(chroma, 1e-6)[:, None, None]
    regions = np.array([_regions(picture) for picture in part > 0.5], np.int64)
    back, fore = _mean(p, part < 0.3), _mean(p, part > 0.8)
    matte = _matte(p, back, fore)
    fits = [_fit(form, matte) for form in range(len(SHAPES))]
    best = np.argmin([np.square(matte - _cover(form, fit, side)).sum((1, 2)) for form, fit in enumerate(fits)], axis=0)
    place = np.stack(fits)[best, np.arange(len(p))]
    away = np.empty_like(matte)
    for form in range(len(SHAPES)):
        away[best == form] = _away(form, place[best == form], side)
    inside, outside = away < -1, away > 1
    back, fore = _mean(p, outside), _mean(p, inside)
    # what noise leaves of the matte on either side is no part of it: both are stretched from [0.1, 0.9]
    seen, drawn = (np.clip((x - 0.1) / 0.8, 0, 1) for x in (_matte(p, back, fore), np.clip(0.5 - away, 0, 1)))
    overlap = np.minimum(seen, drawn).sum((1, 2)) / np.maximum(np.maximum(seen, drawn).sum((1, 2)), 1e-6)
    far = np.sqrt(np.square(fore[:, None] - _PALETTE).mean(2))
    reach = (np.abs(place[:, :2] - side / 2).max(1) + place[:, 2]) / side
    return Figures(
        chroma=chroma,
        regions=regions,
        colour=far.argmin(1),
        colour_off=far.min(1),
        tint=back.max(1) - back.min(1),
        uneven=np.maximum(_uneven(p, inside, fore), _uneven(p, outside, back)),
        form=best,
        overlap=np.where(reach > BORDER, 0, overlap),
        edge=np.abs(seen - drawn).sum((1, 2)) / (np.array(_OUTLINE)[best] * place[:, 2]),
    )


def _regions(coloured: NDArray[np.bool_]) -> int:
    """How many connected regions of (H,H) are objects by their size."""
    return int((np.bincount(label(coloured)[0].ravel())[1:] >= SECOND * coloured.size).sum())


def _mean(p: Floats, where: NDArray[np.bool_]) -> Floats:
    """(B,3): the mean of (B,3,H,H) over the pixels (B,H,H); black where there are none."""
    return np.einsum("bchw,bhw->bc", p, where.astype(np.float32)) / np.maximum(where.sum((1, 2)), 1)[:, None]


def _uneven(p: Floats, where: NDArray[np.bool_], mean: Floats) -> Floats:
    """(B,): fourth-power mean over the pixels of how far each is off the mean, root mean square over channels."""
    off = np.square(np.square(p - mean[:, :, None, None]).mean(1))
    return ((off * where).sum((1, 2)) / np.maximum(where.sum((1, 2)), 1)) ** 0.25


def _matte(p: Floats, back: Floats, fore: Floats) -> Floats:
    """(B,H,H) in [0,1]: where each pixel lies on the way from the background's colour to the object's."""
    way = fore - back
    way = way / np.maximum(np.square(way).sum(1, keepdims=True), 1e-6)
    along = np.einsum("bchw,bc->bhw", p, way) - (back * way).sum(1)[:, None, None]
    return np.clip(along, 0, 1)


def _away(form: int, place: Floats, side: int) -> Floats:
    """Signed distance (B,H,H) in pixels to the outline of forms whose place (B,3) is x, y, radius in pixels."""
    grid = np.arange(side, dtype=np.float32) + 0.5
    r = place[:, 2, None, None]
    x, y = (grid[None, None, :] - place[:, 0, None, None]) / r, (grid[None, :, None] - place[:, 1, None, None]) / r
    return distance(SHAPES[form], x, y) * r


def _cover(form: int, place: Floats, side: int, soft: float = 1.0) -> Floats:
    """The template's matte (B,H,H); its edge is so many pixels wide, 1 as it is drawn."""
    return np.clip(0.5 - _away(form, place, side) / soft, 0, 1)


def _fit(form: int, matte: Floats) -> Floats:
    """x, y and radius (B,3) in pixels of the template that leaves least of the matte, by least squares.

    Gauss-Newton from the matte's area and centroid, at first with wide edges, which feel the outline from further away.
    """
    side = matte.shape[-1]
    least, most = (np.float32(bound * side) for bound in _RADIUS)
    grid = np.arange(side, dtype=np.float32) + 0.5
    area = np.maximum(matte.sum((1, 2)), 1)
    radius = np.clip(np.sqrt(area / np.float32(_AREA[form])), least, most)
    x, y = (matte.sum(axis) @ grid / area for axis in (1, 2))
    place = np.stack([x, y - np.float32(_BELOW[form]) * radius, radius], 1).astype(np.float32)
    for soft in (3.0, 2.0, 1.0, 1.0):
        drawn = _cover(form, place, side, soft)
        slopes = []
        for i in range(3):
            moved = place.copy()
            moved[:, i] += 0.25
            slopes.append((_cover(form, moved, side, soft) - drawn) * 4)
        slope = np.stack(slopes, 1).reshape(len(matte), 3, -1)
        left = (matte - drawn).reshape(len(matte), -1, 1)
        normal = slope @ slope.transpose(0, 2, 1) + np.float32(0.1) * np.eye(3, dtype=np.float32)
        place = place + np.clip(np.linalg.solve(normal, slope @ left)[..., 0], -2, 2)
        place[:, 2] = np.clip(place[:, 2], least, most)
    return place
