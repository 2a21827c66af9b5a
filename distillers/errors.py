"""The errors that a person can act on, and the checks of options and file names that several floors share."""

import inspect
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints


class BadInput(ValueError):
    """Report wrong input: which field, what was given, what is allowed.

    The command prints it and exits with 2; the server answers with a 4xx error object. Neither shows a traceback.
    """

    def __init__(self, field: str, given: Any, allowed: str) -> None:
        self.field, self.given, self.allowed = field, given, allowed
        super().__init__(f"{field}: got {given!r}; allowed: {allowed}")


class TrainingStopped(RuntimeError):
    """Report that a training cannot go on; the message says why and where its last good checkpoint is."""


class Notice(UserWarning):
    """Tell a person what was left out or assumed; the command prints it as one line."""


def check_suffix(path: Path, *suffixes: str) -> None:
    """Refuse with BadInput a file to write whose name has none of these suffixes, in whatever case."""
    if path.suffix.lower() not in suffixes:
        raise BadInput("out", str(path), f"a name that ends in {suffixes[0]}")


def checked(kind: Any, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert options from TOML's types to those that a class takes; `where` is the table that they stand in.

    Raises:
        BadInput: naming an option that the class does not know, or one of the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = inspect.signature(kind).parameters
    hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    found = {}
    for key, value in options.items():
        if key not in known:
            raise BadInput(f"{where}.{key}", value, ", ".join(sorted(known)))
        try:
            # JSON's strict rules: a list is a tuple and 1 a float, but "1" and true are no numbers, nor are nan and inf
            adapter = TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False))
            found[key] = adapter.validate_json(json.dumps(value, default=str))
        except ValidationError as error:
            first = error.errors()[0]
            allowed = "true or false" if first["type"] == "bool_type" else first["msg"]
            raise BadInput(".".join(map(str, (where, key, *first["loc"]))), value, allowed) from None
    return found
