"""How a picture of SAR becomes the channels that stand beside the noisy image at a network's input.

The pixels alone do not tell a network how bright a place is: group normalisation (Wu and He 2018) takes the mean of
each group of channels over the whole tile away, so that smooth sea and smooth soil look alike. So the local mean is
told once more as a phase, whose sine and cosine at several frequencies (Tancik et al. 2020, "Fourier Features Let
Networks Learn High Frequency Functions") vary within the tile and survive. Which of this a model is given stands in its
manifest (`Radiometry.levels`, `Radiometry.calibrated`); one that says nothing of it is given the pixels alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from distillers.models.codec import ImageCodec
from distillers.models.radiometry import Radiometry

# "label": int64 (B,); "sar": float (B, C, H, W) in the network's own layout; "guidance": float (B,), where it varies;
# "text", "pooled", "ids" as `PromptEncoder` gives, and the same of no prompt behind "null_", for guidance
Cond = dict[str, Tensor]


def encode(sar: Tensor, seen: Radiometry, codec: ImageCodec) -> Tensor:
    """Turn SAR (B, C, H, W) in [-1, 1] into a network's condition (B, `channels`, H / factor, W / factor).

    In this order: the bands' pixels, space to depth; for each size of window the sines, then the cosines of the local
    means, frequency by frequency, band by band; 1 for each band that is there, 0 for one that is 0 everywhere; the
    plane that says whether levels are absolute.
    """
    bands = sar[:, : seen.band_count]
    parts = [codec.encode(bands)]
    if seen.levels:
        cells = F.avg_pool2d(bands, codec.factor)
        for n in seen.levels.cells:  # a window counts only what lies inside the picture
            mean = F.avg_pool2d(cells, n, stride=1, padding=n // 2, count_include_pad=False)
            phases = [math.pi / 2 * 2**k * mean for k in range(seen.levels.frequencies)]  # the first is monotone
            parts += [torch.sin(phase) for phase in phases] + [torch.cos(phase) for phase in phases]
        there = (bands != 0).any(-1).any(-1).to(cells)  # without it a missing band were one of the middle level
        parts.append(there[..., None, None].expand_as(cells))
    if seen.calibrated:
        parts.append(F.avg_pool2d(sar[:, seen.band_count :], codec.factor))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def channels(seen: Radiometry, codec: ImageCodec) -> int:
    """Count the channels that `encode` gives."""
    count = codec.channels(seen.band_count) + seen.calibrated
    if seen.levels:
        count += seen.band_count * (2 * len(seen.levels.cells) * seen.levels.frequencies + 1)
    return count
