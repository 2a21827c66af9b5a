"""The command `fewstep`: arguments in, one call of the library, readable errors out.

This file lists the commands in the order in which `fewstep --help` shows them; each is a function of its module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from distillers.cli import benchmark, evaluation, pictures, service, training
from distillers.errors import BadInput, Notice, TrainingStopped
from distillers.runtime import prepare_process

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start here": (service.run, service.serve, service.key),
    "Make a model": (
        training.distill,
        training.methods,
        training.publish,
        training.merge,
        training.adopt,
        training.suggest_student,
    ),
    "Draw": (pictures.generate, pictures.translate, pictures.demonstration, pictures.pairs),
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
    """Run the command: bad input is one line on stderr and exit code 2, a stopped training one line and exit code 1."""
    prepare_process()
    show = warnings.showwarning
    warnings.showwarning = lambda message, kind, *where: (
        typer.echo(f"note: {message}", err=True) if issubclass(kind, Notice) else show(message, kind, *where)
    )
    try:
        return app()
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except TrainingStopped as error:
        typer.echo(f"stopped: {error}", err=True)
        sys.exit(1)
