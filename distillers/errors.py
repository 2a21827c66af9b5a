"""The errors that a person can act on, and the checks of options and of names to write that several floors share."""

import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

LONGEST = 255  # bytes of a file's name, on the file systems of all systems


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


def check_file(path: Path, *suffixes: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file to write before work goes into it.

    Raises:
        BadInput: a name with none of these suffixes, in whatever case, or too long; a folder; one of the files that are
            read; a place where nothing can be written. A missing folder is none of these: whoever writes makes it.
    """
    if path.suffix.lower() not in suffixes:
        raise BadInput("out", str(path), f"a name that ends in {suffixes[0]}")
    if (length := len(os.fsencode(path.name))) > LONGEST:
        raise BadInput("out", f"{path.name[:40]}... of {length} bytes", f"a name of {LONGEST} bytes or fewer")
    if path.is_dir():
        raise BadInput("out", str(path), "a file: this is a folder")
    for read in inputs:
        if path.exists() and read.exists() and path.samefile(read):
            raise BadInput("out", str(path), f"another file than {read}, which is read")
    check_place(path.parent)


def check_place(folder: Path) -> None:
    """Raise BadInput unless files can be written into a folder, or a missing one can be made where it should be."""
    try:
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise BadInput("out", str(folder), f"a folder that can be written ({error.strerror})") from None


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
            raise BadInput(".".join(map(str, (where, key, *_inside(value, first["loc"])))), value, allowed) from None
    return found


def _inside(value: Any, path: Iterable[Any]) -> Iterator[Any]:
    """Yield the keys and positions of pydantic's path that are of the value itself, not names of a union's types."""
    for part in path:
        if not (isinstance(value, dict) or (isinstance(value, list | tuple) and isinstance(part, int))):
            return
        yield part
        value = value.get(part) if isinstance(value, dict) else [*value, *[None] * (part + 1)][part]
