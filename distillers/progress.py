"""One progress bar for trainings and evaluations alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def progress_bar(*more: ProgressColumn, disable: bool = False) -> Progress:
    """What is done, how much of it, for how long, how long still; then `more` columns."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    what, times = TextColumn("{task.description}"), (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(what, BarColumn(), MofNCompleteColumn(), *times, *more, disable=disable)


@contextmanager
def drawing_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar as what `evaluate` calls: pictures done, pictures in all, what is being drawn."""
    with progress_bar() as progress:
        bar = progress.add_task("drawing", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)

        yield show


@contextmanager
def scene_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar as what `scene.translate` calls: pixels done, pixels in all; shown in megapixels, and per second."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[done]:.1f} of {task.fields[total_mpx]:.1f} Mpx, {task.fields[speed]:.2f} Mpx/s")
    with Progress(BarColumn(), text, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None, done=0.0, total_mpx=0.0, speed=0.0)
        started = time.perf_counter()

        def show(done: int, total: int) -> None:
            speed = done / (time.perf_counter() - started) / 1e6
            progress.update(bar, completed=done, total=total, done=done / 1e6, total_mpx=total / 1e6, speed=speed)

        yield show
