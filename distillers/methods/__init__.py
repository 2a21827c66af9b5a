"""The folder is the registry of methods: each file implements one paper, and its name is the method's name."""

from __future__ import annotations

import importlib
import pkgutil

from distillers.errors import BadInput
from distillers.training.distiller import Distiller


def names() -> list[str]:
    """List all methods, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[Distiller]:
    """Import the Distiller that file `name` defines. Raises BadInput for any other name, with a list of all."""
    if name not in names():
        raise BadInput("method", name, ", ".join(names()))
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Distiller) and value.__module__ == module.__name__
    )
