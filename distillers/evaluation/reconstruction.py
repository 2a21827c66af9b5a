"""Measure how near an autoencoder's reconstructions come to held-out pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distillers.errors import BadInput
from distillers.evaluation.candidate import Candidate
from distillers.evaluation.evaluate import DISTANCES_FALL, HALF_FLOOR, Progress
from distillers.evaluation.latency import device_of, latencies
from distillers.evaluation.metrics import extract, psnr, ssim
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.reference import check_space, real_row, spread_evenly
from distillers.evaluation.report import Report, Row, setting

if TYPE_CHECKING:
    from distillers.autoencoder import Autoencoder
    from distillers.data import ImageData
    from distillers.evaluation.features import Features


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: Autoencoder,
    data: ImageData,
    features: Features,
    options: EvaluationOptions | None = None,
    *,
    train: ImageData | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare n held-out pictures with their reconstructions: PSNR, SSIM, and the distances between the two sets.

    The sets hold the same pictures, so a perfect autoencoder has the distance 0; the floor, real against real, is what
    other pictures of the same kind have. Latency is that of one picture, there and back.

    Args:
        options: n, batch and latency_repeats count here.

    Raises:
        BadInput: too few pictures for the feature space, a space that the training's loss compared in, or pictures
            whose side the autoencoder's patch does not divide.
    """
    options = options or EvaluationOptions()
    info, indices, batch = autoencoder.info, sorted(set(spread_evenly(options.n, len(data)))), options.batch
    check_space(info, features, len(indices))
    if any(side % info.patch for side in data.size):
        raise BadInput("data.size", data.size, f"a multiple of {info.patch}")
    device = device_of(autoencoder)
    features.to(device)
    row = Row(name="reconstruction", role="autoencoder", n=len(indices), n_reference=len(indices))
    one, reference_parts = Candidate(row, lambda items, _: autoencoder.reconstruct(items["image"])), []
    for start in range(0, len(indices), batch):
        items = data.items(indices[start : start + batch])
        real, reconstructed = items["image"], one.draw(items, [])
        reference_parts.append(extract(features, real, batch))
        one.features.append(extract(features, reconstructed, batch))
        for name, values in {"psnr": psnr(reconstructed, real), "ssim": ssim(reconstructed, real)}.items():
            one.paired.setdefault(name, []).append(values)
        if progress:
            progress(start + len(real), len(indices), row.name)
    reference = torch.cat(reference_parts)
    one.fill_row(reference, {})
    if options.latency_repeats:
        item = data.items(indices[:1])
        calls = [lambda: one.draw(item, [])]
        (row.latency_ms,) = latencies(calls, repeats=options.latency_repeats, device=device)
    return Report(
        model=info.name,
        teacher=None,
        task=info.task,
        data=data.name,
        n=len(indices),
        seeds=[],
        features=features.card.summary(),
        setting=setting(device),
        notes=[DISTANCES_FALL] if train is not None else [DISTANCES_FALL, HALF_FLOOR],
        rows=[real_row(reference, data, train, len(indices), features, batch), row],
    )
