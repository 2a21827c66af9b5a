"""Distances used by two methods or more: pure functions, one value per sample."""

from __future__ import annotations

import math

from torch import Tensor


def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample. (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over all dimensions of a sample (Song and Dhariwal 2023, eq. 7). (B, ...) -> (B,).

    c defaults to 0.00054 sqrt(D), as there. LCM's element-wise pseudo-Huber is another loss.
    """
    difference = (a - b).flatten(1)
    if c is None:
        c = 0.00054 * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c * c).sqrt() - c
