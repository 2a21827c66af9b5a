"""Let work in other threads take turns on a device, one slice at a time, with the pictures that wait for it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from app.engine.batcher import Batcher, Closed
from app.errors import shutting_down

T = TypeVar("T")
SHARED, BACKGROUND = 1.0, 8.0  # patience: of what a caller waits for, as pictures; of what can wait
FIRST_S = 0.02  # a slice, before any was measured
SMOOTHING = 0.2  # weight of each measured slice


class TooLong(Exception):
    """The work has had the device for as long as it may."""


class Lane:
    """Runs slices on a device's thread for work in other threads, and measures them.

    Args:
        patience: how many times a slice's own seconds others may take before it.
        check: called before each slice; raises what ends the work.
        limit_s: seconds on the device, all slices together, after which the next one is TooLong.
    """

    def __init__(
        self,
        batcher: Batcher[Any, Any, Any],
        device: str,
        patience: float = BACKGROUND,
        check: Callable[[], None] | None = None,
        limit_s: float = float("inf"),
    ) -> None:
        self.batcher, self.device, self.patience, self.check, self.limit_s = batcher, device, patience, check, limit_s
        self.slice_s = FIRST_S  # predicted
        self.busy_s = 0.0  # on the device
        self._waited_s = 0.0

    def turn(self, function: Callable[[], T]) -> T:
        """Run a function on the device's thread in its turn, and wait for its result.

        Raises:
            TooLong: before a slice, when the limit is reached.
            ApiError: 503, the server ends.
        """
        if self.check is not None:
            self.check()
        if self.busy_s >= self.limit_s:
            raise TooLong(f"{self.busy_s:.3g} s on the device; allowed: {self.limit_s:g}")
        started, spent = time.perf_counter(), 0.0

        def timed() -> T:
            nonlocal spent
            began = time.perf_counter()
            try:
                result = function()
                if self.device.startswith("cuda"):
                    import torch

                    torch.cuda.current_stream(self.device).synchronize()  # or slices would queue on the device
                return result
            finally:
                spent = time.perf_counter() - began
                self.busy_s += spent
                self.slice_s += SMOOTHING * (spent - self.slice_s)

        try:
            (future,) = self.batcher.put([(self, timed)], limited=False)
            result: T = future.result()
            return result
        except Closed:
            raise shutting_down() from None
        finally:
            self._waited_s += time.perf_counter() - started - spent

    def clock(self) -> float:
        """Return seconds, as time.perf_counter() does, by a clock that stands still while others have the device."""
        return time.perf_counter() - self._waited_s
