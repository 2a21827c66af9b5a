"""Clusters of captions: which of several students draws the picture of a prompt.

A prompt's embedding e is the mean of what its encoders say of its tokens. Its cluster is

    argmin_k ||e - c_k||^2 - v_k,

with centres c_k and prices v_k. Such prices make any k clusters equal in size: Aurenhammer, Hoffmann and Aronov,
"Minkowski-Type Theorems and Least-Squares Clustering", 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillers.errors import BadInput

ROUNDS = 2000  # of the search for prices


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Hold K clusters of captions, and which of them a folder's students draw.

    Attributes:
        centres: K points of a prompt encoder's width.
        prices: a number for each, in the unit of squared distances; 0 for all gives the nearest centre.
        examples: a caption of each.
        students: the clusters that are drawn, ascending: all, or a lone student's.
    """

    centres: list[list[float]]
    prices: list[float]
    examples: list[str]
    students: list[int]

    def check(self, where: str) -> None:
        """Raise BadInput unless all K clusters are described, and all of them or one are drawn."""
        count = len(self.centres)
        alike = len({len(centre) for centre in self.centres}) == 1
        alone = len(self.students) == 1 and 0 <= self.students[0] < count
        if not (alike and len(self.prices) == len(self.examples) == count):
            given = f"{count} centres, {len(self.prices)} prices, {len(self.examples)} examples"
            raise BadInput(where, given, "a centre, a price and an example for each cluster, centres of one length")
        if not (alone or self.students == list(range(count))):
            raise BadInput(f"{where}.students", self.students, f"0 to {count - 1}, or one of them")

    def of(self, cond: dict[str, Tensor]) -> Tensor:
        """Find the clusters of encoded prompts, int64 (B,)."""
        points = prompt_embeddings(cond)
        centres = torch.tensor(self.centres, dtype=points.dtype, device=points.device)
        prices = torch.tensor(self.prices, dtype=points.dtype, device=points.device)
        return (squared_distances(points, centres) - prices).argmin(1)


def prompt_embeddings(cond: dict[str, Tensor]) -> Tensor:
    """Average what encoders say of the tokens of prompts, "text" (B, L, d), where there is a "mask" inside it: (B, d).

    In float64, so that a prompt has the same cluster in every batch.
    """
    text = cond["text"].double()
    if "mask" not in cond:
        return text.mean(1)
    inside = cond["mask"].to(text)[..., None]
    return (text * inside).sum(1) / inside.sum(1).clamp_min(1)


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Compute ||point - centre||^2 of points (N, d) and centres (K, d): (N, K)."""
    return (points[:, None] - centres).square().sum(2)


def equal_prices(distances: Tensor) -> Tensor:
    """Find the prices (K,) at which clusters have equal shares, from squared distances (N, K) to their centres.

    They maximise sum_i min_k (d_ik - v_k) + N / K sum_k v_k, whose slope in v_k is how many points cluster k lacks.
    """
    count, clusters = distances.shape
    prices, best, least = torch.zeros(clusters).to(distances), torch.zeros(clusters).to(distances), count
    scale = float(distances.std()) if count * clusters > 1 else 0.0
    for step in range(ROUNDS):
        sizes = torch.bincount((distances - prices).argmin(1), minlength=clusters)
        if (off := int((sizes - count / clusters).abs().max())) < least:
            best, least = prices.clone(), off
        if off == 0:
            break
        prices = prices + scale / (1 + 0.05 * step) * (1 / clusters - sizes / count)
    return best


def clusters_of(captions: Sequence[str], points: Tensor, members: Sequence[Sequence[int]]) -> Clusters:
    """Describe clusters of captions by the positions of their members, with prices that keep them equal.

    points: the captions' embeddings (N, d).
    """
    centres = torch.stack([points[list(own)].mean(0) for own in members])
    distances = squared_distances(points, centres)
    nearest = [own[int(distances[list(own), k].argmin())] for k, own in enumerate(members)]
    return Clusters(
        centres=centres.tolist(),
        prices=equal_prices(distances).tolist(),
        examples=[captions[i] for i in nearest],
        students=list(range(len(members))),
    )
