"""Fewstep's library: a teacher in, a few-step generator out. Light: torch is loaded on first use of a name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillers.evaluation.evaluate import evaluate
    from distillers.evaluation.options import EvaluationOptions
    from distillers.generator import Generator
    from distillers.jobs.distill import distill
    from distillers.jobs.recipe import Recipe
    from distillers.models.denoiser import Denoiser
    from distillers.models.schedule import NoiseSchedule
    from distillers.sar.translate import translate
    from distillers.teacher import Teacher
    from distillers.training.distiller import Distiller

__all__ = [
    "Denoiser",
    "Distiller",
    "EvaluationOptions",
    "Generator",
    "NoiseSchedule",
    "Recipe",
    "Teacher",
    "distill",
    "evaluate",
    "translate",
]
__version__ = "0.1.0"

_MODULES = {
    "Denoiser": "models.denoiser",
    "Distiller": "training.distiller",
    "EvaluationOptions": "evaluation.options",
    "Generator": "generator",
    "NoiseSchedule": "models.schedule",
    "Recipe": "jobs.recipe",
    "Teacher": "teacher",
    "distill": "jobs.distill",
    "evaluate": "evaluation.evaluate",
    "translate": "sar.translate",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"distillers.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'distillers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
