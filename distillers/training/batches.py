"""Batches of pictures are drawn ahead of the iterations, by a thread or by worker processes."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distillers.data import ImageData, draw_alike
from distillers.training.settings import TrainSettings

SHARED = (0, 1)  # behind (seed, iteration): what all processes draw alike; one process's generator has its number there


class Batches:
    """The batches of one run: that of iteration i is a function of (seed, i, process), whoever draws it.

    Args:
        draws: how many times `settings.batch` items each iteration takes.

    Attributes:
        waited: seconds that iterations have waited for data.
    """

    def __init__(self, settings: TrainSettings, process: int, draws: Sequence[int], *, pin_memory: bool) -> None:
        self.settings, self.process, self.draws, self.pin_memory = settings, process, draws, pin_memory
        self.waited = 0.0
        self._thread, self._ahead = ThreadPoolExecutor(1, "data"), dict[int, Future[dict[str, Tensor]]]()
        self._workers: Iterator[dict[str, Tensor]] | None = None

    def draw(self, data: ImageData, i: int) -> dict[str, Tensor]:
        """Return iteration i's pictures and count the seconds that this took."""
        started = time.perf_counter()
        pictures = self._from_workers(data, i) if self.settings.workers else self.draw_ahead(data, i)
        self.waited += time.perf_counter() - started
        return pictures

    def draw_ahead(self, data: ImageData, i: int) -> dict[str, Tensor]:
        """Return iteration i's pictures; a thread draws the next ones meanwhile."""
        batches = _Indexed(data, self.settings, self.process, self.draws)
        for k in (i, i + 1):
            if k not in self._ahead and k < max(self.settings.iterations, i + 1):
                self._ahead[k] = self._thread.submit(batches.__getitem__, k)
        return self._ahead.pop(i).result()

    def _from_workers(self, data: ImageData, i: int) -> dict[str, Tensor]:
        """Return iteration i's pictures, which processes have drawn ahead. Iterations must be asked for in turn.

        The processes start from a clean one: a fork of this one, which has threads, may wait for ever for one of them.
        """
        if self._workers is None:
            data.draw(1, np.random.default_rng(0))  # decodes what is read once, so that the processes share it
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            loader = DataLoader(
                _Indexed(data, self.settings, self.process, self.draws),
                batch_size=None,
                sampler=range(i, self.settings.iterations),
                num_workers=self.settings.workers,
                pin_memory=self.pin_memory,
                multiprocessing_context=context,
                worker_init_fn=_ignore_interrupts,
            )
            self._workers = iter(loader)
        return next(self._workers)

    def close(self) -> None:
        """End the thread and the processes."""
        self._thread.shutdown(cancel_futures=True)
        self._workers = None


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the training: it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Indexed(Dataset[dict[str, Tensor]]):
    """Draws the batch of every iteration: item i is what iteration i of this process learns from."""

    def __init__(self, data: ImageData, settings: TrainSettings, process: int, draws: Sequence[int]) -> None:
        self.data, self.batch, self.seed, self.process = data, settings.batch, settings.seed, process
        self.draws = draws

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        own, common = (np.random.default_rng((self.seed, i, *others)) for others in ((self.process,), SHARED))
        return draw_alike(self.data, self.batch * self.draws[i], own, common)

    def __getstate__(self) -> dict[str, Any]:
        """Put the arrays of the data into one unnamed file, which all processes map instead of holding copies."""
        if "_file" not in self.__dict__:
            arrays: list[pickle.PickleBuffer] = []
            self._rest = pickle.dumps(self.data, protocol=5, buffer_callback=arrays.append)
            self._ends = np.cumsum([array.raw().nbytes for array in arrays], dtype=np.int64).tolist()
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the training)
            for array in arrays:
                self._file.write(array.raw())
            self._file.flush()
        state = {k: v for k, v in self.__dict__.items() if k not in ("data", "_file")}
        return state | {"file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file, rest, ends = state.pop("file").detach(), state.pop("_rest"), state.pop("_ends")
        shared = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY) if ends and ends[-1] else b"")
        os.close(file)
        arrays = [shared[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        self.__dict__.update(state, data=pickle.loads(rest, buffers=arrays))
