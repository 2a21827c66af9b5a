"""One progress bar for trainings and evaluations alike."""

from __future__ import annotations

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
