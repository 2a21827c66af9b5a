"""The arguments that several commands share, and how they are read."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from distillers.errors import BadInput
from distillers.models.class_names import class_number

Weights = Annotated[
    Path, typer.Argument(help="A weights folder, such as weights/eurosat-consistency.", show_default=False)
]

Steps = Annotated[int | None, typer.Option(help="Network calls per picture; the folder's default if left out.")]

Seed = Annotated[int, typer.Option(help="Picture i uses seed + i.")]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.", envvar="FEWSTEP_DEVICE")]

Table = Annotated[
    Path | None, typer.Option(help="A .json to write, with the table in a .md beside it.", show_default=False)
]

Root = Annotated[Path, typer.Option("--weights", help="Where published folders are.", envvar="FEWSTEP_WEIGHTS")]


def with_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, and pass it the filled dataclass as `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, own = get_type_hints(kind), list(inspect.signature(command, eval_str=True).parameters.values())
        made = [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["description"])],
            )
            for field in fields(kind)
        ]
        at = [parameter.name for parameter in own].index("options")

        @functools.wraps(command)
        def filled(**given: Any) -> None:
            options = kind(**{parameter.name: given.pop(parameter.name) for parameter in made})
            command(options=options, **given)

        filled.__signature__ = inspect.Signature([*own[:at], *made, *own[at + 1 :]])  # type: ignore[attr-defined]
        filled.__annotations__ = {}  # typer looks here, too
        return filled

    return decorate


def device_of(name: str) -> str:
    """Choose the device of a name; "auto" is the GPU where there is one. Raises BadInput if it cannot be used."""
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros((), device=chosen)
    except (RuntimeError, AssertionError) as error:
        allowed = f"cpu, or a CUDA device of this machine ({str(error).splitlines()[0]})"
        raise BadInput("device", name, allowed) from None
    return chosen


def label_of(given: str, labels: list[str]) -> int:
    """Find the index of a class by its name, a word of its name, or number. Raises BadInput for any other."""
    if (number := class_number(given, labels)) is not None:
        return number
    if given.isdecimal() and int(given) < len(labels):
        return int(given)
    raise BadInput("label", given, ", ".join(labels) or "nothing: this model has no classes")


def open_pairs(generator: Any, folder: Path, options: list[str]) -> tuple[Any, Any]:
    """Open the test and train split of a user's own pairs at the model's size and in its radiometry.

    Raises:
        BadInput: an option without a value, or what the data refuse.
    """
    from distillers.data import open_data
    from distillers.jobs.recipe import value_of

    table: dict[str, Any] = {"size": generator.info.size[0], "radiometry": generator.info.sar or {}}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise BadInput("pairs-option", option, "key=value, for example units=db")
        if key in ("path", "split"):
            raise BadInput("pairs-option", option, f"another key: {key} is what --pairs names and divides")
        table[key] = value_of(key, text)
    test, train = (open_data("pairs", path=str(folder), split=split, **table) for split in ("test", "train"))
    return test, train


def step_counts(field: str, text: str) -> list[int]:
    """Read whole numbers that commas separate, such as "1,2,4". Raises BadInput for anything else."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(field, text, "whole numbers with commas, e.g. 1,2,4") from None
    return counts


def size_of(given: str) -> tuple[int, int]:
    """Read "WIDTHxHEIGHT" as (height, width). BadInput for anything else."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", given)
    if not found:
        raise BadInput("size", given, "WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(found[2]), int(found[1])


def columns_of(n: int) -> int:
    """Choose how many columns a grid of n pictures has: 8 at most."""
    return max(1, min(n, 8))
