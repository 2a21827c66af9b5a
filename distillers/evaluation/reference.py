"""Take the real pictures that models are compared with, and compare them with other real pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distillers.errors import BadInput
from distillers.evaluation.metrics import distances, extract
from distillers.evaluation.report import Row

if TYPE_CHECKING:
    from distillers.data import ImageData
    from distillers.evaluation.features import Features
    from distillers.weights.manifest import Info


def spread_evenly(n: int, available: int) -> list[int]:
    """Return n positions spread evenly over a split; where n is larger, the split again and again."""
    if n <= available:
        return [int(i) for i in np.linspace(0, available - 1, n).round()]
    return [i % available for i in range(n)]


def check_space(info: Info, features: Features, pictures: int, few: bool = False) -> None:
    """Refuse with BadInput a space that a loss of the training compared in; unless `few`, too few pictures for it."""
    if features.card.name in info.trained_with:
        allowed = f"a space that {info.name} was not trained in: its loss made it good in {features.card.name}"
        raise BadInput("features", features.card.name, allowed)
    if pictures <= features.num_features and not few:
        allowed = f"more than the {features.num_features} features of {features.card.name}, of n and of the split"
        raise BadInput("n", pictures, allowed)


def real_pictures(data: ImageData, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the pictures of a reference of n, each once, and their labels and captions, where there are any."""
    items = data.items(sorted(set(spread_evenly(n, len(data)))))
    return items["image"], {k: items[k] for k in items if k in ("label", "caption")}


def real_features(data: ImageData, n: int, features: Features, batch: int) -> tuple[Tensor, Tensor]:
    """Compute the features (N,d) and the mean colour (C,) of a reference of n, each item once."""
    parts, colours, indices = [], [], sorted(set(spread_evenly(n, len(data))))
    for start in range(0, len(indices), batch):
        image = data.items(indices[start : start + batch])["image"]
        parts.append(extract(features, image, batch))
        colours.append(image.double().mean((2, 3)))
    return torch.cat(parts), torch.cat(colours).mean(0)


def real_row(
    reference: Tensor, data: ImageData, train: ImageData | None, n: int, features: Features, batch: int
) -> Row:
    """Compare the reference with n training pictures, or else its own halves: the floor for every model."""
    if train is not None:
        others, name = real_features(train, min(n, len(train)), features, batch)[0], "real, train split"
    else:
        reference, others, name = reference[0::2], reference[1::2], "real, half against half"
    row = Row(name=name, role="real", n=len(others), n_reference=len(reference))
    if min(row.n, row.n_reference) > features.num_features:
        row.update(distances(reference, others))
    return row


def regions_of(data: ImageData, n: int) -> dict[str, list[int]]:
    """Return region names with their positions among n pictures, where the data know regions."""
    regions: dict[str, list[int]] = {}
    region_of = getattr(data, "region_of", None)
    for position, index in enumerate(spread_evenly(n, len(data))):
        if region_of is not None and (region := region_of(index)):
            regions.setdefault(region, []).append(position)
    return regions
