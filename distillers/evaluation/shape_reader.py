"""Read colour and form off pictures of one shape (`CaptionedShapes(objects=1)`), or say why they cannot be read.

No network is needed: the formula that draws the data is fitted to the picture. Each form's template is fitted to the
picture's matte (the share of each pixel that is object) over centre and radius, and the residual of the best one
decides. Half, doubled, blurred, smeared and speckled objects have no readable form. The tests hold how far real
pictures and mildly soft ones stay from each limit.
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

READABLE = "colour and form are readable"
REASONS = (
    READABLE,
    "no coloured region",
    "several regions",
    "no colour of the palette",
    "the background is not grey",
    "noisy or uneven",
    "no form fits",
)

_PALETTE = np.array(list(COLOURS.values()), np.float32)
# of a radius of 1, form by form: area, how far the centroid lies below the centre, length of the outline
_AREA = (np.pi, 1.76**2, 1.72 * 0.993, 4 - 4 * 0.64**2)
_BELOW = (0.0, 0.0, 0.287, 0.0)
_OUTLINE = (2 * np.pi, 8 * 0.88, 6 * 0.993, 8.0)
_RADIUS = (0.75 * ALONE[0], 1.15 * ALONE[1])  # of the side; what is much smaller or larger is another picture


@dataclass(frozen=True)
class Figures:
    """Hold the measurements of B pictures, float (B,) or int (B,), which the limits of this file apply to."""

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
    """Hold the colour and the form of B pictures: int64 (B,), positions in COLOURS and SHAPES, -1 where unreadable.

    The colour may be readable where the form is not, and the other way round. reason: for each picture the first of
    REASONS that applies; READABLE where both are.
    """

    colour: Tensor
    form: Tensor
    reason: tuple[str, ...]

    def matches(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compare colour and form, bool (B,) each, with those of labels (B,), positions in data.shapes.LABELS.

        Raises:
            BadInput: labels of another number than the pictures.
        """
        if labels.shape != self.colour.shape:
            raise BadInput("labels", tuple(labels.shape), f"one for each of the {len(self.colour)} pictures")
        labels = labels.cpu()
        return self.colour == labels // len(SHAPES), self.form == labels % len(SHAPES)


def check_squares(pictures: Tensor) -> None:
    """Raise BadInput unless pictures are (B,3,H,H), one or more, of finite values."""
    shape = tuple(pictures.shape)
    if len(shape) != 4 or not shape[0] or shape[1] != 3 or shape[2] != shape[3]:
        raise BadInput("pictures", shape, "(B,3,H,H), one picture or more")
    if not bool(pictures.isfinite().all()):
        raise BadInput("pictures", "values that are not finite", "numbers in [-1,1]")


def read_shape(pictures: Tensor) -> Reading:
    """Read colour and form of the one object of each picture, (B,3,H,H) in [-1,1]; values beyond are clipped.

    Raises:
        BadInput: pictures of another shape, or with a value that is not finite.
    """
    check_squares(pictures)
    parts = [_read(measure(part)) for part in pictures.split(128)]  # as much as a processor's cache holds
    colour, form, why = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Reading(torch.from_numpy(colour), torch.from_numpy(form), tuple(REASONS[i] for i in why))


def asked_share(pictures: Tensor, labels: Tensor) -> float:
    """Compute the share of pictures (B,3,H,H) in [-1,1] that show both colour and form of their labels (B,)."""
    return shares(*read_shape(pictures).matches(labels))["asked"]


def shares(colour: Tensor, form: Tensor) -> dict[str, float]:
    """Compute the shares of matches, bool (B,) each: of both ("asked"), of the colour, of the form."""
    matches = {"asked": colour & form, "colour": colour, "form": form}
    return {name: float(one.double().mean()) for name, one in matches.items()}


def _read(figures: Figures) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Apply the limits; return (colour, form, position in REASONS) of each picture."""
    faint, several = figures.chroma < CHROMA, figures.regions > 1
    off, tinted, uneven = figures.colour_off > COLOUR, figures.tint > TINT, figures.uneven > UNEVEN
    unlike = (figures.overlap < OVERLAP) | (figures.edge > EDGE)
    why = np.select([faint, several, off, tinted, uneven, unlike], range(1, len(REASONS)), 0)
    colour = np.where(faint | several | off | tinted, -1, figures.colour)
    return colour, np.where(faint | several | tinted | uneven | unlike, -1, figures.form), why


def measure(pictures: Tensor) -> Figures:
    """Measure pictures (B,3,H,H) in [-1,1] for `read_shape`."""
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
    cover, template = (np.clip((x - 0.1) / 0.8, 0, 1) for x in (_matte(p, back, fore), np.clip(0.5 - away, 0, 1)))
    overlap = np.minimum(cover, template).sum((1, 2)) / np.maximum(np.maximum(cover, template).sum((1, 2)), 1e-6)
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
        edge=np.abs(cover - template).sum((1, 2)) / (np.array(_OUTLINE)[best] * place[:, 2]),
    )


def _regions(coloured: NDArray[np.bool_]) -> int:
    """Count the connected regions of (H,H) that are as large as an object."""
    return int((np.bincount(label(coloured)[0].ravel())[1:] >= SECOND * coloured.size).sum())


def _mean(p: Floats, where: NDArray[np.bool_]) -> Floats:
    """Return the mean colour (B,3) of pictures (B,3,H,H) over a mask (B,H,H); black where it is empty."""
    return np.einsum("bchw,bhw->bc", p, where.astype(np.float32)) / np.maximum(where.sum((1, 2)), 1)[:, None]


def _uneven(p: Floats, where: NDArray[np.bool_], mean: Floats) -> Floats:
    """Return the fourth-power mean (B,) over a mask of the distance to the mean, root mean square over channels."""
    off = np.square(np.square(p - mean[:, :, None, None]).mean(1))
    return ((off * where).sum((1, 2)) / np.maximum(where.sum((1, 2)), 1)) ** 0.25


def _matte(p: Floats, back: Floats, fore: Floats) -> Floats:
    """Return the matte (B,H,H) in [0,1]: where each pixel lies between the background's colour and the object's."""
    way = fore - back
    way = way / np.maximum(np.square(way).sum(1, keepdims=True), 1e-6)
    along = np.einsum("bchw,bc->bhw", p, way) - (back * way).sum(1)[:, None, None]
    return np.clip(along, 0, 1)


def _away(form: int, place: Floats, side: int) -> Floats:
    """Return the signed distance (B,H,H) in pixels to outlines whose place (B,3) is x, y, radius in pixels."""
    grid = np.arange(side, dtype=np.float32) + 0.5
    r = place[:, 2, None, None]
    x, y = (grid[None, None, :] - place[:, 0, None, None]) / r, (grid[None, :, None] - place[:, 1, None, None]) / r
    return distance(SHAPES[form], x, y) * r


def _cover(form: int, place: Floats, side: int, soft: float = 1.0) -> Floats:
    """Return the template's matte (B,H,H) with an edge `soft` pixels wide; the data's are 1 wide."""
    return np.clip(0.5 - _away(form, place, side) / soft, 0, 1)


def _fit(form: int, matte: Floats) -> Floats:
    """Fit x, y and radius (B,3) in pixels of a template to the matte by least squares.

    Gauss-Newton starts from the matte's area and centroid, with wide edges, which reach outlines further away.
    """
    side = matte.shape[-1]
    least, most = (np.float32(bound * side) for bound in _RADIUS)
    grid = np.arange(side, dtype=np.float32) + 0.5
    area = np.maximum(matte.sum((1, 2)), 1)
    radius = np.clip(np.sqrt(area / np.float32(_AREA[form])), least, most)
    x, y = (matte.sum(axis) @ grid / area for axis in (1, 2))
    place = np.stack([x, y - np.float32(_BELOW[form]) * radius, radius], 1).astype(np.float32)
    for soft in (3.0, 2.0, 1.0, 1.0):
        template = _cover(form, place, side, soft)
        slopes = []
        for i in range(3):
            moved = place.copy()
            moved[:, i] += 0.25
            slopes.append((_cover(form, moved, side, soft) - template) * 4)
        slope = np.stack(slopes, 1).reshape(len(matte), 3, -1)
        left = (matte - template).reshape(len(matte), -1, 1)
        normal = slope @ slope.transpose(0, 2, 1) + np.float32(0.1) * np.eye(3, dtype=np.float32)
        place = place + np.clip(np.linalg.solve(normal, slope @ left)[..., 0], -2, 2)
        place[:, 2] = np.clip(place[:, 2], least, most)
    return place
