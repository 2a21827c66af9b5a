"""The command `fewstep`: arguments in, one call of the library, readable errors out.

This file lists the commands in the order in which `fewstep --help` shows them; each is a function of its module.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from distillers.cli import benchmark, evaluation, pictures, scenes, service, training
from distillers.errors import BadInput, Notice, TrainingStopped
from distillers.runtime import prepare_process

PACKAGE = Path(__file__).parents[1]
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start here": (service.run, service.serve, service.key),
    "Make a model": (
        training.distill,
        training.plan,
        training.methods,
        training.publish,
        training.merge,
        training.adopt,
        training.suggest_student,
    ),
    "Draw": (pictures.generate, scenes.translate, scenes.demonstration, pictures.pairs),
    "Measure": (evaluation.evaluate, evaluation.compare, evaluation.results),
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Make diffusion models answer in one step: **distill** a teacher into a weights folder, look at what it
    **generate**s or **translate**s, **evaluate** what the speed cost, and **serve** it over HTTP.

    Start with `fewstep run`: it distils a small teacher on this machine, measures it and serves it.""",
)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)

benchmarks = typer.Typer(no_args_is_help=True, help="Measure what something costs beside what it cannot avoid.")
for command in (benchmark.training, benchmark.scene, benchmark.serving, benchmark.soak):
    benchmarks.command()(command)
app.add_typer(benchmarks, name="benchmark", rich_help_panel="Measure")


def main() -> Any:
    """Run the command: whatever a person can mend is one line on stderr.

    Exit codes: 2 for bad input, 1 for a stopped training and for files that cannot be read or written; 128 and the
    signal's number for SIGTERM and SIGHUP, after what was written beside has been removed.
    """
    prepare_process()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _leave)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.showwarning = lambda message, kind, file, *where: (
            _note(message) if _is_ours(kind, file) else show(message, kind, file, *where)
        )
        try:
            return app()
        except BadInput as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)
        except TrainingStopped as error:
            typer.echo(f"stopped: {error}", err=True)
            sys.exit(1)
        except UnicodeEncodeError as error:
            typer.echo(f"error: {error.object!r}: no text in UTF-8", err=True)
            sys.exit(2)
        except OSError as error:
            typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
            sys.exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process by an exception, so that every open place is left as at any other error."""
    signal.signal(number, signal.SIG_IGN)  # a second one must not break off the cleaning
    sys.exit(128 + number)


def _note(message: Warning | str) -> None:
    """Print a note, once where torchrun started several processes."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"note: {message}", err=True)


def _is_ours(kind: type[Warning], file: str) -> bool:
    """Say whether a warning is of this library, whose words need neither a category nor a line of code beside them."""
    return issubclass(kind, Notice) or (issubclass(kind, UserWarning) and Path(file).is_relative_to(PACKAGE))
