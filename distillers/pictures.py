"""Pictures of pictures: a grid, and labelled rows to compare by eye. PNG through Pillow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distillers.errors import BadInput

GAP = 2  # pixels between two pictures


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """(B,3,H,W) or (B,1,H,W) in [-1,1] -> (B,H,W,3) uint8, rounded and clipped; one channel becomes grey."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise BadInput("images", tuple(images.shape), "(B,3,H,W) or (B,1,H,W) with B of 1 or more")
    scaled = (images.detach().float().cpu().expand(-1, 3, -1, -1) + 1) * 127.5
    return scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: Tensor, columns: int, zoom: int = 1, gap: int = GAP) -> Image.Image:
    """Pictures in reading order, `columns` a row, each enlarged `zoom` times without smoothing, `gap` pixels apart."""
    if columns < 1 or zoom < 1:
        raise BadInput("columns, zoom", (columns, zoom), "1 or more")
    pixels = to_pixels(images).repeat(zoom, 1).repeat(zoom, 2)
    count, height, width = pixels.shape[:3]
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def grid_png(images: Tensor, columns: int, path: str | Path, zoom: int = 1, gap: int = GAP) -> None:
    """Write `grid` as a PNG; folders on the way are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns, zoom, gap).save(path, "PNG")


def side_by_side(rows: Mapping[str, Tensor], path: str | Path, zoom: int = 1) -> None:
    """One labelled row for each entry, in order; every row needs the same picture size, not the same count."""
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
