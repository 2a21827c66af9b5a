"""Choose the model and the steps with the best quality within a latency budget in milliseconds.

The cost of a choice is what this device measured plus what waits now. Its quality is the Frechet distance of its
pictures to real ones by steps, lower is better, as published with the model (`report.json`); a teacher's stands in its
students' reports. Distances to different data cannot be compared, so all candidates must have learnt from the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.engine.engine import Engine
from app.engine.model import Model
from distillers.errors import BadInput

TEACHER_STEPS = (1, 2, 4, 8, 10, 16, 25, 32, 50, 64, 100, 128, 250, 500, 1000)


@dataclass(frozen=True)
class Choice:
    """Holds the model and steps that fit a budget best, and why."""

    model: Model
    steps: int
    expected_ms: float  # waiting and drawing, encoding left out
    quality: float | None  # Frechet distance as published; None where it was not measured
    why: str


def choose(engine: Engine, candidates: Sequence[Model], budget_ms: float, n: int = 1) -> Choice:
    """Choose the best measured quality that fits or, where none was measured, the most steps.

    Args:
        candidates: models of one task.
        budget_ms: for the whole request, waiting included, encoding left out.
        n: pictures of the request.

    Raises:
        BadInput: nothing fits (the message says what the fastest would take), or candidates of different data.
    """
    if len({model.info.data for model in candidates}) > 1:
        names = ", ".join(model.name for model in candidates)
        raise BadInput("model", None, f"with latency_budget_ms, one of models that cannot be compared: {names}")
    wait_ms = 1e3 * engine.backlog_s()
    choices = [choice for model in candidates for choice in _choices(engine, model, wait_ms, n)]
    fitting = [choice for choice in choices if choice.expected_ms <= budget_ms]
    if not fitting:
        fastest = min(choices, key=lambda choice: choice.expected_ms)
        least = f"{fastest.expected_ms:.4g} or more now ({fastest.model.name} in {fastest.steps} steps"
        raise BadInput("latency_budget_ms", budget_ms, f"{least}, {wait_ms:.3g} of it waiting)")
    measured = [choice for choice in fitting if choice.quality is not None]
    if measured:
        best = min(measured, key=lambda choice: (choice.quality, choice.expected_ms))
        how = f"the lowest measured Frechet distance, {best.quality:.4g}, of {len(measured)} that fit"
    else:
        best = max(fitting, key=lambda choice: (choice.steps, -choice.expected_ms))
        how = f"the most steps of {len(fitting)} that fit; no quality was measured"
    why = f"{how} {budget_ms:.4g} ms: {best.expected_ms:.4g} ms expected, {wait_ms:.3g} of it waiting"
    return Choice(best.model, best.steps, round(best.expected_ms, 3), best.quality, why)


def _choices(engine: Engine, model: Model, wait_ms: float, n: int) -> Iterator[Choice]:
    measured = qualities(engine, model)
    steps = model.steps or sorted({s for s in (*TEACHER_STEPS, *measured, model.default_steps) if s <= model.max_steps})
    height, width = model.info.size
    for count in steps:
        cost = model.cost(count, height, width, engine.settings.max_batch)
        yield Choice(model, count, wait_ms + 1e3 * cost.predict(n), measured.get(count), "")


def qualities(engine: Engine, model: Model) -> dict[int, float]:
    """Return published Frechet distances by steps, from the model's own report and, for a teacher, its students'."""
    found = dict[int, float]()
    for other in engine.models.values():
        if model is other or other.info.teacher == model.name:
            for steps, distance in _published(other, model.info.role):
                found.setdefault(steps, distance)
    return found


def _published(model: Model, role: str) -> tuple[tuple[int, float], ...]:
    path = model.folder / "report.json"
    try:
        return _rows(path, path.stat().st_mtime_ns, role)
    except OSError:
        return ()


@lru_cache(maxsize=1024)
def _rows(path: Path, _written: int, role: str) -> tuple[tuple[int, float], ...]:
    """Return (steps, Frechet distance) of a report's rows of a role; `_written` makes the cache read a new report."""
    from distillers.weights.manifest import inside, load_json

    try:
        rows: Any = load_json(path)["rows"] if inside(path.parent, path) else ()
        return tuple((int(row["steps"]), float(row["frechet"])) for row in rows if _counts(row, role))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return ()


def _counts(row: Any, role: str) -> bool:
    """Return whether a row measures single pictures of a role; a mean of several pictures is something else."""
    return row.get("role") == role and "steps" in row and "frechet" in row and row.get("nfe", 0) <= 2 * row["steps"]
