"""Fewstep's library: a teacher in, a few-step generator out. Light: torch is loaded on first use of a name."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Denoiser": "denoiser",
    "Distiller": "distiller",
    "Generator": "generator",
    "NoiseSchedule": "schedule",
    "Teacher": "teacher",
}
__all__ = ["Denoiser", "Distiller", "Generator", "NoiseSchedule", "Teacher"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"distillers.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'distillers' has no attribute {name!r}")
