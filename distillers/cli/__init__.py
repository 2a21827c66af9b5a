"""`fewstep`: arguments in, one call of the library, readable errors out."""

from __future__ import annotations

import sys
from typing import Any

import typer

from distillers.cli import benchmark, evaluation, pictures, service, training  # noqa: F401 (they register their commands)
from distillers.cli.arguments import app
from distillers.errors import BadInput
from distillers.runtime import prepare_process


def main() -> Any:
    """Entry point: bad input is one line on stderr and exit code 2; a stopped training 1."""
    prepare_process()
    try:
        return app()
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingStopped":
            raise
        typer.echo(f"stopped: {error}", err=True)
        sys.exit(1)
    sys.exit(2)
