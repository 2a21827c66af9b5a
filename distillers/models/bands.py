"""Pictures of any number of bands, and what of them a person or a classifier of RGB sees.

One band, or the first of two, is seen as grey; of three or more the first three are seen as red, green and blue.
"""

from __future__ import annotations

from torch import Tensor


def visible(pictures: Tensor) -> Tensor:
    """Take the bands of pictures (B, C, H, W) that are seen: (B, 3, H, W) where C is 3 or more, else (B, 1, H, W)."""
    return pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1]


def as_rgb(pictures: Tensor) -> Tensor:
    """Show pictures (B, C, H, W) as (B, 3, H, W): what is visible of them, grey repeated to three bands."""
    return visible(pictures).expand(-1, 3, -1, -1)
