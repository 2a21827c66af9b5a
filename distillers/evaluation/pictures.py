"""Arrange pictures in grids and labelled rows, draw charts, and write them as PNG by Pillow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distillers.errors import BadInput
from distillers.models.bands import as_rgb

GAP = 2  # pixels between two pictures


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Convert (B,C,H,W) in [-1,1] to (B,H,W,3) uint8, rounded and clipped: what `distillers.models.bands` shows of it.

    Raises:
        BadInput: another shape, or no pictures.
    """
    if images.ndim != 4 or not images.shape[1] or not len(images):
        raise BadInput("images", tuple(images.shape), "(B,C,H,W) with B and C of 1 or more")
    scaled = (as_rgb(images.detach().float().cpu()) + 1) * 127.5
    return scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: Tensor, columns: int, zoom: int = 1, gap: int = GAP) -> Image.Image:
    """Arrange pictures in reading order, each enlarged `zoom` times without smoothing, `gap` pixels apart.

    Pictures of less than three bands make a grey sheet.

    Raises:
        BadInput: no columns, a zoom below 1, or what `to_pixels` refuses.
    """
    if columns < 1 or zoom < 1:
        raise BadInput("columns, zoom", (columns, zoom), "1 or more")
    pixels = to_pixels(images).repeat(zoom, 1).repeat(zoom, 2)
    count, height, width = pixels.shape[:3]
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet if images.shape[1] >= 3 else sheet[..., 0])


def grid_png(images: Tensor, columns: int, path: str | Path, zoom: int = 1, gap: int = GAP) -> None:
    """Write a grid as a PNG, and make its folder where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns, zoom, gap).save(path, "PNG")


def side_by_side(rows: Mapping[str, Tensor], path: str | Path, zoom: int = 1) -> None:
    """Write a PNG with a labelled row for each entry; every row needs the same picture size, not the same count.

    Raises:
        BadInput: no rows, or rows of several picture sizes.
    """
    if len({images.shape[-2:] for images in rows.values()}) != 1:
        raise BadInput("rows", {k: tuple(v.shape) for k, v in rows.items()}, "one row or more, all of one picture size")
    strips = [(label, grid(images, len(images), zoom)) for label, images in rows.items()]
    font, line = ImageFont.load_default(size=13), 20
    height = sum(line + strip.height for _, strip in strips)
    width = max(max(strip.width, int(font.getlength(label)) + 2 * GAP) for label, strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for label, strip in strips:
        draw.text((GAP, top + 2), label, fill="black", font=font)
        sheet.paste(strip, (0, top + line))
        top += line + strip.height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


@dataclass(frozen=True)
class Curve:
    """Hold a line of a chart and its name in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def chart(panels: Mapping[str, Sequence[Curve]], path: str | Path, side: int = 360) -> None:
    """Write a PNG with panels side by side under their titles, both axes from 0 to 1."""
    font, margin, top = ImageFont.load_default(size=13), 40, 34
    sheet = Image.new("RGB", (len(panels) * (side + 2 * margin), side + 2 * margin + top), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, curves) in enumerate(panels.items()):
        left, bottom = i * (side + 2 * margin) + margin, top + margin + side
        draw.text((left, 14), title, fill="black", font=font)
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            at = round(tick * side)
            draw.line((left, bottom - at, left + side, bottom - at), fill="#eeeeee")
            draw.line((left + at, bottom, left + at, bottom - side), fill="#eeeeee")
            draw.text((left - 34, bottom - at - 8), f"{tick:.2f}", fill="black", font=font)
            draw.text((left + at - 12, bottom + 6), f"{tick:.2f}", fill="black", font=font)
        for k, curve in enumerate(curves):
            points = [(left + x * side, bottom - y * side) for x, y in zip(curve.x, curve.y, strict=True)]
            draw.line(points, fill=curve.colour, width=2)
            draw.line((left + 10, bottom - 60 + 18 * k, left + 30, bottom - 60 + 18 * k), fill=curve.colour, width=3)
            draw.text((left + 36, bottom - 68 + 18 * k), curve.name, fill="black", font=font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
