"""The dial between quality and latency: a budget in milliseconds in, a model and its steps out.

What a choice costs is what this device measured and how much waits now; how good it is, what was measured and published
with the model (`report.json`): the Frechet distance of its pictures to real ones by steps, lower is better. Distances
are compared within one set of features and data only, teachers included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.engine.engine import Engine
from app.engine.model import Model
from distillers.errors import BadInput

TEACHER_STEPS = (1, 2, 4, 8, 10, 16, 25, 32, 50, 64, 100, 128, 250, 500, 1000)


@dataclass(frozen=True)
class Choice:
    """What fits a budget best."""

    model: Model
    steps: int
    expected_ms: float  # waiting and drawing, encoding left out
    quality: float | None  # Frechet distance as published; None where it was not measured
    why: str


def choose(engine: Engine, candidates: Sequence[Model], budget_ms: float, n: int = 1) -> Choice:
    """The best measured quality that fits, or where none was measured the most steps.

    Args:
        candidates: models of one task.
        budget_ms: for the whole request, waiting included, encoding left out.
        n: pictures of the request.

    Raises:
        BadInput: nothing fits; what the fastest would take is told.
    """
    wait_ms = 1e3 * engine.backlog_s()
    choices = [choice for model in candidates for choice in _choices(engine, model, wait_ms, n)]
    fitting = [choice for choice in choices if choice.expected_ms <= budget_ms]
    if not fitting:
        fastest = min(choices, key=lambda choice: choice.expected_ms)
        told = f"{fastest.expected_ms:.4g} or more now ({fastest.model.name} in {fastest.steps} steps"
        raise BadInput("latency_budget_ms", budget_ms, f"{told}, {wait_ms:.3g} of it waiting)")
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
    measured = qualities(model)
    steps = model.steps or sorted({s for s in (*TEACHER_STEPS, *measured, model.default_steps) if s <= model.max_steps})
    height, width = model.info.size
    for count in steps:
        cost = model.cost(count, height, width, engine.settings.max_batch)
        yield Choice(model, count, wait_ms + 1e3 * cost.predict(n), measured.get(count), "")


def qualities(model: Model) -> dict[int, float]:
    """Published Frechet distances by steps: a student's from its own report, a teacher's from its."""
    report = model.report()
    rows = report.get("rows", []) if isinstance(report, dict) else []
    found = dict[int, float]()
    for row in rows:
        if isinstance(row, dict) and row.get("role") == model.info.role and "frechet" in row and "steps" in row:
            found.setdefault(int(row["steps"]), float(row["frechet"]))
    return found
