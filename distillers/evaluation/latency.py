"""Measure the latency of calls and of generators, which take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from distillers.errors import BadInput

if TYPE_CHECKING:
    from distillers.data import Batch
    from distillers.generator import Generator


def latencies(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Measure p50, p90, p99 and mean of each call in ms, warm; the calls take turns, so a busy minute hits all alike.

    Args:
        clock: gives the time in seconds.

    Raises:
        BadInput: no repeats, or a negative number of warm-up turns.
    """
    if repeats < 1 or warmup < 0:
        raise BadInput("repeats, warmup", (repeats, warmup), "repeats of 1 or more, warmup of 0 or more")
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for call, times in zip(calls, spent, strict=True):
            _synchronise(device)
            start = clock()
            call()
            _synchronise(device)
            if turn >= warmup:
                times.append(1000 * (clock() - start))
    return [
        {**{f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}, "mean": float(np.mean(times)), "n": repeats}
        for times in spent
    ]


def latency(
    generator: Generator, *, steps: int, batch: int = 1, repeats: int = 20, warmup: int = 2, sar: Tensor | None = None
) -> dict[str, float]:
    """Measure a `sample` call of `batch` pictures in ms, from seeds to pixels; a translator needs `sar` (B,C,H,W)."""
    given = generator.condition.in_turn(range(batch), sar)
    call = lambda: generator.sample(range(batch), steps=steps, **given)  # noqa: E731
    return latencies([call], repeats=repeats, warmup=warmup, device=device_of(generator))[0]


def latencies_of(
    models: Sequence[tuple[Generator, int]], item: Batch, *, repeats: int = 20, warmup: int = 2
) -> list[dict[str, float]]:
    """Measure one picture by each (generator, steps) in ms, on the condition of one real item; they take turns."""

    def call(generator: Generator, steps: int) -> Callable[[], Tensor]:
        return lambda: generator.sample([0], steps=steps, **generator.condition.of_items(item))

    calls = [call(generator, steps) for generator, steps in models]
    return latencies(calls, repeats=repeats, warmup=warmup, device=device_of(models[0][0]))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights."""
    return next(model.parameters()).device


def _synchronise(device: str | torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
