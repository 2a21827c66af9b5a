"""The errors that a person can act on, and the check of a file name's ending."""

from pathlib import Path
from typing import Any


class BadInput(ValueError):
    """Report wrong input: which field, what was given, what is allowed.

    The command prints it and exits with 2; the server answers with a 4xx error object. Neither shows a traceback.
    """

    def __init__(self, field: str, given: Any, allowed: str) -> None:
        self.field, self.given, self.allowed = field, given, allowed
        super().__init__(f"{field}: got {given!r}; allowed: {allowed}")


class TrainingStopped(RuntimeError):
    """Report that a training cannot go on; the message says why and where its last good checkpoint is."""


def check_suffix(path: Path, *suffixes: str) -> None:
    """Refuse with BadInput a file to write whose name has none of these suffixes, in whatever case."""
    if path.suffix.lower() not in suffixes:
        raise BadInput("out", str(path), f"a name that ends in {suffixes[0]}")
