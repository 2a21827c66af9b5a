"""Calibrate a translator: compare the spread of its samples with its errors on held-out pairs.

N samples of one SAR tile give a standard deviation for every pixel. Four figures say whether it predicts the error:

* rank of the truth among the samples: every rank equally often if the truth might be one more sample (Talagrand); the
  share between the k-th lowest and the k-th highest sample should be (N + 1 - 2 k) / (N + 1);
* sparsification: leave out the pixels of the largest deviation first; the error of the rest should fall as it does when
  the pixels of the largest error are left out (Ilg et al. 2018, sec. 4.2). The area between both curves, over the
  error, is AUSE: 0 is perfect, and a deviation that knows nothing has the area of the constant 1;
* the share of truths between the 5 % and the 95 % quantile of the samples, and in a band that is fitted on held-out
  pairs to hold 90 % (`distillers.models.band`), measured on pairs that it was not fitted on;
* spread over skill: root mean variance over the error of the mean, times sqrt(1 + 1/N): 1 if right (Fortin et al.
  2014).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.evaluation.pictures import Curve, chart, side_by_side
from distillers.evaluation.report import setting
from distillers.generator import Generator
from distillers.models.band import COUNTS, SHARE, Band, count_errors, fit_half_widths, share_held
from distillers.sar.translate import COLLAPSED, QUANTILES

SHARES = [round(0.02 * i, 2) for i in range(50)]  # of pixels left out
LEVELS = 127.5  # of 255, in one unit of [-1, 1]
TILES = 200  # that a calibration draws at most, unless it is asked for more
PARTS = 5  # of the tiles in their order; a band that is fitted on four of them is measured on the fifth
SHOWN = 3  # worst, median and best tiles of each


@dataclass(kw_only=True)
class Calibration:
    """Hold the figures of a calibration. Errors and deviations are in levels of 255, over the colours of a pixel."""

    model: str
    data: str
    steps: int
    samples: int
    n: int
    seeds: list[int]
    setting: dict[str, Any]
    error: float  # root mean square of truth minus mean
    deviation: float  # root mean variance of the samples
    spread_over_skill: float
    rank_correlation: float  # Spearman's, of deviation and error, over pixels
    ranks: list[float]  # share of truths with 0, 1, ... N samples below
    by_deviation: list[float]  # error of what is left, over the error of all, at SHARES
    by_error: list[float]
    ause: float
    ause_of_chance: float
    band: dict[str, Any] | None = None  # `Band.to_dict`; None of too few tiles

    @property
    def collapsed(self) -> bool:
        """Whether all samples of a tile are the same picture, so that their deviation says nothing."""
        return self.deviation < COLLAPSED

    def coverage(self) -> list[tuple[float, float]]:
        """Return (nominal, measured) share of truths between the k-th lowest and k-th highest sample, for every k."""
        n = self.samples
        return [((n + 1 - 2 * k) / (n + 1), sum(self.ranks[k : n + 1 - k])) for k in range(1, n // 2 + 1)]

    def markdown(self) -> str:
        """Write the figures as a Markdown table with a verdict."""
        bands = self.coverage()
        bands = [bands[0], bands[len(bands) // 2]] if len(bands) > 1 else bands
        s = self.setting
        lines = [
            f"Calibration of {self.samples} samples at {self.steps} steps on {self.n} tiles of {self.data}:",
            "",
            "| | measured | if calibrated |",
            "| --- | --- | --- |",
            f"| root mean square error of the mean, levels of 255 | {self.error:.1f} | - |",
            f"| root mean variance of the samples, levels | {self.deviation:.1f} | - |",
            f"| spread over skill | {self.spread_over_skill:.2f} | 1 |",
            *(
                f"| truths inside the {100 * nominal:.0f} % band, % | {100 * measured:.1f} | {100 * nominal:.1f} |"
                for nominal, measured in bands
            ),
            *self._band_rows(),
            f"| rank correlation of deviation and error | {self.rank_correlation:.2f} | - |",
            f"| AUSE (0 perfect, {self.ause_of_chance:.2f} chance) | {self.ause:.2f} | 0 |",
            "",
        ]
        if self.collapsed:
            lines += ["Warning: the student has collapsed to a point. Its deviation says nothing about its error.", ""]
        elif self.spread_over_skill < 0.8:
            lines += ["The bands are too narrow: the truth lies outside more often than they say.", ""]
        if self.band:
            lines += [
                f"The fitted band is what `fewstep translate --steps {self.steps} --samples {self.samples}` writes as "
                "90 % band. It holds 90 % of truths on average over ground like these pairs, not at every place nor in "
                "another region or season. It is wide where the deviation is large and knows no more than that.",
                "",
            ]
        where = f"{s['device']}, {s['threads']} threads, torch {s['torch']}, {s['date']}"
        return "\n".join([*lines, f"Seeds {self.seeds[0]} to {self.seeds[1]}; {where}."]) + "\n"

    def _band_rows(self) -> list[str]:
        """Write the rows on the band that is fitted to hold 90 % of the truths."""
        if not self.band:
            return []
        band, halves = Band(**self.band), self.band["half_widths"]
        return [
            f"| truths between the 5 % and 95 % quantile of the samples, % | {100 * band.uncorrected:.1f} | 90.0 |",
            f"| truths inside the fitted band, on pairs it was not fitted on, % | {100 * band.measured:.1f} | 90.0 |",
            f"| the same, in the worst of {PARTS} parts of the pairs, % | {100 * band.worst:.1f} | - |",
            f"| its half width at least and largest deviation, levels | {halves[0]:.1f}, {halves[-1]:.1f} | - |",
        ]

    def save(self, path: Path) -> None:
        """Write JSON, and the curves as a .png beside it."""
        path.write_text(json.dumps({**asdict(self), "shares": SHARES, "markdown": self.markdown()}, indent=2) + "\n")
        nominal, measured = zip(*self.coverage(), strict=True)
        left = [
            Curve("by deviation", SHARES, self.by_deviation, "#c0392b"),
            Curve("by error: the best there is", SHARES, self.by_error, "#2c3e50"),
            Curve("chance", SHARES, [1.0] * len(SHARES), "#bbbbbb"),
        ]
        right = [
            Curve("measured", nominal, measured, "#c0392b"),
            Curve("calibrated", (0.0, 1.0), (0.0, 1.0), "#bbbbbb"),
        ]
        chart(
            {
                "error of the rest, when a share of pixels is left out": left,
                "truths inside a band, by the share that should be": right,
            },
            path.with_suffix(".png"),
        )


@torch.no_grad()
def check_calibration(generator: Generator, samples: int, n: int) -> None:
    """Refuse with BadInput a model of another task than sar-to-optical, fewer than 2 samples, no tiles."""
    if generator.info.task != "sar-to-optical":
        raise BadInput("model", generator.info.name, "a model of sar-to-optical")
    if samples < 2 or n < 1:
        raise BadInput("samples, n", (samples, n), "2 samples or more, 1 tile or more")


def calibrate(
    generator: Generator,
    data: ImageData,
    *,
    n: int = TILES,
    samples: int = 16,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[int, int, str], None] | None = None,
    picture: Path | None = None,
) -> Calibration:
    """Draw `samples` of each of n held-out tiles, evenly spread, and compare their spread with the truth.

    Sample k of tile i has seed `seed + i + k n`.

    Args:
        picture: a PNG to write, of the best, median and worst tiles: SAR, a sample, the mean, the truth, the deviation.

    Raises:
        BadInput: a model of another task, fewer than 2 samples, no tiles.
    """
    n = min(n, len(data))
    check_calibration(generator, samples, n)
    steps = generator.info.default_steps if steps is None else steps
    indices = [int(i) for i in np.linspace(0, len(data) - 1, n).round()]
    ranks = np.zeros(samples + 1)
    errors, deviations, tiles = [], [], []
    counts, between = np.zeros((PARTS, *COUNTS), np.int64), 0.0
    for start in range(0, n, batch):
        part = indices[start : start + batch]
        items = data.items(part)
        drawn = _samples(generator, items["sar"], samples, steps, [seed + start + i for i in range(len(part))], n)
        truth, mean = items["image"], drawn.mean(0)
        ranks += np.bincount((drawn < truth).sum(0).flatten().numpy(), minlength=samples + 1)
        by_colour = drawn.var(0, correction=1)
        variance = by_colour.mean(1)
        for i, (spread_, wrong_) in enumerate(zip(by_colour.sqrt(), (mean - truth).abs(), strict=True), start):
            counts[i * PARTS // n] += count_errors(spread_.numpy() * LEVELS, wrong_.numpy() * LEVELS)
        between += float(_between(drawn, truth).float().mean()) * len(part) / n
        wrong = (mean - truth).square().mean(1)
        errors.append(wrong.sqrt().flatten().half())
        deviations.append(variance.sqrt().flatten().half())
        tiles += list(zip(wrong.mean((1, 2)).tolist(), part, strict=True))
        if progress:
            progress(start + len(part), n, f"{samples} samples")
    error, deviation = (torch.cat(parts).float().numpy() * LEVELS for parts in (errors, deviations))
    by_deviation, by_error = _sparsification(error, deviation), _sparsification(error, error)
    rms, spread = float(np.sqrt(np.mean(error**2))), float(np.sqrt(np.mean(deviation**2)))
    some = np.random.default_rng(0).choice(len(error), min(len(error), 100_000), replace=False)
    step = SHARES[1] - SHARES[0]
    calibration = Calibration(
        model=generator.info.name,
        data=data.name,
        steps=steps,
        samples=samples,
        n=n,
        seeds=[seed, seed + n * samples - 1],
        setting=setting(next(generator.parameters()).device),
        error=rms,
        deviation=spread,
        spread_over_skill=spread / rms * float(np.sqrt(1 + 1 / samples)),
        rank_correlation=float(spearmanr(error[some], deviation[some]).statistic) if spread > 0 else 0.0,
        ranks=(ranks / ranks.sum()).tolist(),
        by_deviation=by_deviation,
        by_error=by_error,
        ause=float(np.sum(np.subtract(by_deviation, by_error)) * step),
        ause_of_chance=float(np.sum(np.subtract(1, by_error)) * step),
        band=_fit(counts, between, generator.info.digest, data.name, n, steps, samples) if n >= 2 * PARTS else None,
    )
    if picture is not None:
        _draw_tiles(generator, data, [index for _, index in sorted(tiles)], samples, steps, seed, picture)
    return calibration


def _between(drawn: Tensor, truth: Tensor) -> Tensor:
    """Tell where the truth (B,3,H,W) lies between the 5 % and the 95 % quantile of samples (N,B,3,H,W)."""
    ordered, (low, high) = drawn.sort(0).values, (np.array(QUANTILES) * (len(drawn) - 1)).tolist()
    ends = [
        torch.lerp(ordered[int(place)], ordered[min(int(place) + 1, len(drawn) - 1)], place - int(place))
        for place in (low, high)
    ]
    return (ends[0] <= truth) & (truth <= ends[1])


def _fit(
    counts: NDArray[np.int64], between: float, weights: str, data: str, n: int, steps: int, samples: int
) -> dict[str, Any]:
    """Fit a band to the errors of all parts; each part's share of truths is of one that is fitted on the others."""
    whole = counts.sum(0)
    held = np.array([share_held(part, *fit_half_widths(whole - part)) for part in counts])
    limits, half_widths = fit_half_widths(whole)
    band = Band(
        share=SHARE,
        weights=weights,
        data=data,
        n=n,
        steps=steps,
        samples=samples,
        limits=limits,
        half_widths=half_widths,
        measured=float(np.average(held, weights=counts.sum((1, 2)))),
        worst=float(held.min()),
        uncorrected=between,
    )
    return band.to_dict()


def _samples(generator: Generator, sar: Tensor, samples: int, steps: int, seeds: list[int], stride: int) -> Tensor:
    """Draw (samples,B,3,H,W); the seeds of two samples of a tile are a stride apart."""
    return torch.stack(
        [generator.sample([seed + k * stride for seed in seeds], sar=sar, steps=steps) for k in range(samples)]
    )


def _sparsification(error: NDArray[np.floating], order: NDArray[np.floating]) -> list[float]:
    """Compute the error of the pixels that are left without the largest by `order`, over that of all, at SHARES."""
    squares = np.square(error[np.argsort(order, kind="stable")], dtype=np.float64)
    kept = [len(squares) - int(share * len(squares)) for share in SHARES]
    sums = np.cumsum(squares)
    whole = sums[-1] / len(squares)
    return [float(np.sqrt(sums[k - 1] / k / whole)) for k in kept] if whole > 0 else [1.0] * len(kept)


def _draw_tiles(
    generator: Generator, data: ImageData, ranked: list[int], samples: int, steps: int, seed: int, path: Path
) -> None:
    """Draw tiles in columns: best, median, worst by the error of the mean; the deviation is white at 64 levels."""
    middle = len(ranked) // 2
    shown = [*ranked[:SHOWN], *ranked[middle : middle + SHOWN], *ranked[-SHOWN:]]
    items = data.items(shown)
    drawn = _samples(generator, items["sar"], samples, steps, [seed + i for i in range(len(shown))], len(shown))
    sar = generator.condition.pictures({"sar": items["sar"]})
    deviation: Tensor = drawn.std(0).mean(1, keepdim=True) * LEVELS / 64 * 2 - 1
    side_by_side(
        {
            f"SAR: {SHOWN} best, {SHOWN} median, {SHOWN} worst tiles": sar["SAR"],
            "one sample": drawn[0],
            f"mean of {samples}": drawn.mean(0),
            "optical, the truth": items["image"],
            f"deviation of {samples}, white = 64 levels of 255": deviation,
        },
        path,
        zoom=max(1, 128 // max(data.size)),
    )
