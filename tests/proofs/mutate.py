"""Broken copies of our modules: a proof that passes on one of them proves nothing."""

import inspect
from types import ModuleType
from typing import Any


def mutated(module: ModuleType, old: str, new: str) -> Any:
    """A second copy of a module in which `old`, which stands there exactly once, reads `new`. The first stays whole."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    copy = ModuleType(module.__name__)  # its own name, by which dataclasses look their annotations up
    exec(compile(source.replace(old, new), f"{module.__file__} (mutated)", "exec"), vars(copy))
    return copy
