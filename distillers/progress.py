"""Show the progress of trainings, evaluations and scenes in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def progress_bar(*more: ProgressColumn, disable: bool = False) -> Progress:
    """Make a bar of what is running, how much is done, for how long, how long still; then `more` columns."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), *more, disable=disable)


@contextmanager
def drawing_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar, and yield the `progress` of `evaluate`: pictures done, pictures in all, what is being drawn."""
    with progress_bar() as progress:
        bar = progress.add_task("drawing", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)

        yield show


@contextmanager
def scene_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar in megapixels and their rate, and yield the `progress` of `translate`: pixels done, pixels in all."""
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
