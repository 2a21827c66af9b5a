"""Measure the latency of calls that take turns."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from distillers.errors import BadInput


def latencies(
    calls: Sequence[Callable[[], object]], *, repeats: int = 20, warmup: int = 2, device: str | torch.device = "cpu"
) -> list[dict[str, float]]:
    """Measure p50, p90, p99 and mean of each call in ms, warm; the calls take turns, so a busy minute hits all alike.

    Raises:
        BadInput: no repeats, or a negative number of warm-up turns.
    """
    if repeats < 1 or warmup < 0:
        raise BadInput("repeats, warmup", (repeats, warmup), "repeats of 1 or more, warmup of 0 or more")
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for call, times in zip(calls, spent, strict=True):
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if turn >= warmup:
                times.append(1000 * (time.perf_counter() - start))
    return [
        {**{f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}, "mean": float(np.mean(times)), "n": repeats}
        for times in spent
    ]


def _synchronise(device: str | torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
