"""A band around the mean of a translator's samples that held the truth as often as it says, on held-out pairs.

Split conformal prediction (Papadopoulos et al. 2002) by categories (Mondrian: Vovk et al. 2005, sec. 4.5), which are
levels of the samples' deviation: at each of them the half width is the smallest that holds the wanted share of errors.
Exchangeable pixels would be held as often as wanted. Pixels of another region or season are not, and a half width
says nothing of which pixels of one level are wrong.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput

SHARE = 0.9  # of truths that a band is to hold
LEVELS = 10  # of deviation, with equally many pixels
BINS = 4  # for one level of 255, in the counts that a band is fitted on
COUNTS = (128 * BINS, 256 * BINS)  # deviations below 128, errors below 256


@dataclass(frozen=True, kw_only=True)
class Band:
    """Half widths by deviation, in levels of 255, of the samples of one model and how they were drawn.

    Args:
        weights: `Info.digest` of the model.
        limits: the deviations where a level ends and the next begins, ascending.
        half_widths: of each level, one more than limits.
        measured: share of truths in bands that were fitted on the other parts of the pairs.
        worst: of them, in the part where they held the fewest.
        uncorrected: share of truths between the 5 % and 95 % quantile of the samples.
    """

    share: float
    weights: str
    data: str
    n: int
    steps: int
    samples: int
    limits: list[float]
    half_widths: list[float]
    measured: float
    worst: float
    uncorrected: float

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the band in a weights folder's `calibration.json`; None where there is none.

        Raises:
            BadInput: no JSON object, or what is under "band" is no band.
        """
        from pydantic import TypeAdapter, ValidationError

        path = folder / "calibration.json"
        try:
            entries = json.loads(path.read_text()).get("band") if path.is_file() else None
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise BadInput(str(path), str(error), "a JSON object") from None
        if entries is None:
            return None
        try:
            band = TypeAdapter(cls).validate_python(entries)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"{path}: band", first["input"], first["msg"]) from None
        if len(band.half_widths) != len(band.limits) + 1 or sorted(band.limits) != band.limits:
            raise BadInput(f"{path}: band", (band.limits, band.half_widths), "ascending limits, one more half width")
        return band

    def to_dict(self) -> dict[str, Any]:
        """Return what `read` reads."""
        return asdict(self)

    def around(
        self, mean: NDArray[np.floating], deviation: NDArray[np.floating]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the lower and upper end of the band, in levels of 0 to 255, of arrays of one shape."""
        half = np.asarray(self.half_widths, np.float32)[np.searchsorted(self.limits, deviation)]
        return np.maximum(mean - half, 0), np.minimum(mean + half, 255)


def count_errors(deviation: NDArray[np.floating], error: NDArray[np.floating]) -> NDArray[np.int64]:
    """Count values by deviation and absolute error, both in levels of 255, as COUNTS."""
    places = [
        np.minimum(np.ceil(values.ravel() * BINS), limit - 1).astype(np.int64)  # rounded up: bands are not too narrow
        for values, limit in zip((deviation, error), COUNTS, strict=True)
    ]
    return np.bincount(places[0] * COUNTS[1] + places[1], minlength=COUNTS[0] * COUNTS[1]).reshape(COUNTS)


def fit_half_widths(counts: NDArray[np.int64], share: float = SHARE) -> tuple[list[float], list[float]]:
    """Fit the limits of the levels and their half widths to counted errors.

    Of n errors at a level the half width is the ceil((n + 1) share)-th smallest.
    """
    by_deviation = counts.sum(1).cumsum()
    ends = np.searchsorted(by_deviation, by_deviation[-1] * np.arange(1, LEVELS) / LEVELS)
    ends = np.unique(ends[by_deviation[ends] < by_deviation[-1]])  # fewer levels where many deviations are equal
    half_widths = []
    for part in np.split(counts, ends + 1):
        errors = part.sum(0).cumsum()
        rank = min(ceil((errors[-1] + 1) * share), errors[-1])
        half_widths.append(float(np.searchsorted(errors, rank)) / BINS)
    return [float(end) / BINS for end in ends], half_widths


def share_held(counts: NDArray[np.int64], limits: list[float], half_widths: list[float]) -> float:
    """Measure the share of counted errors that a band holds."""
    ends = np.round(np.array(limits) * BINS).astype(int)
    parts = np.split(counts, ends + 1)
    inside = sum(int(part[:, : round(half * BINS) + 1].sum()) for part, half in zip(parts, half_widths, strict=True))
    return inside / int(counts.sum())
