"""Choose a model's backend and its batch sizes by measurement, while it serves.

Preparing and comparing happen in the caller's thread, slice by slice where its pass takes turns; each timed pass is one
turn on the engine's thread, as the traffic's passes are. The result
is kept beside the weights (`profile.json`), by device and versions, so that the next start prepares the winner only and
measures nothing. A profile whose measurements were noisy serves all the same, until it was measured again in an idle
moment.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from app.engine.backends import Backend, Forward, Prepare, candidates, shapes_of
from app.engine.batch_cost import worth_having
from app.engine.model import Model
from app.engine.profile import Profile, profile_key, read_profiles, write_profile
from app.errors import ApiError
from app.media.image_files import Pixels

T = TypeVar("T")
Run = Callable[[Callable[[], T]], T]  # runs a function on the engine's thread, in its turn
log = logging.getLogger("fewstep.tuning")
SLOW_FROM = 60.0  # seconds of measuring allowed, from which torch.compile is tried
COMPARED = (1, 4)  # batch sizes at which backends are compared
LEVEL = 1  # of 255: what another order of summation may move a pixel by
PROBES = 4  # pictures that a backend is compared with the reference by
SAMPLE_S = 0.1  # seconds of timed passes for each measurement, and 3 passes at least
Prepared = list[dict[Any, Forward]]  # for each network of a model, functions by shapes


def tune(
    model: Model, run: Run[Any], *, seconds: float, tolerance: int, largest: int, doubted: Profile | None = None
) -> Profile:
    """Find and install the fastest backend of a model, and the batch sizes worth having.

    Args:
        run: runs a function on the engine's thread.
        seconds: of measuring after the reference; backends that were not tried by then are left out.
        tolerance: levels of 255 that a backend of lower precision may move a pixel by.
        largest: pictures in one pass.
        doubted: the profile in use, which is measured again, and stays if this is not done better.
    """
    key = profile_key(model.info, model.device, tolerance, largest)
    if doubted is None and (stored := read_profiles(model.folder).get(key)):
        try:
            return _install(model, Profile.from_json(stored), run, tolerance)
        except ApiError:  # the server ends
            raise
        except Exception as error:
            log.info("the profile kept for %s is measured anew: %s", model.name, error)
    profile = _measure(model, run, seconds, tolerance, largest, doubted)
    try:
        write_profile(model.folder, key, profile)
    except OSError:
        log.info("the profile of %s cannot be kept beside its weights", model.name)
    return profile


def _measure(
    model: Model, run: Run[Any], seconds: float, tolerance: int, largest: int, doubted: Profile | None
) -> Profile:
    """Compare every backend's pictures with the reference's, time those that agree, and install the fastest."""
    reference = {n: probe(model, n) for n in {model.fewest_steps, model.default_steps}}
    best: tuple[float, Backend, list[Prepare], Prepared] | None = None
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0  # Windows tells none
    profile = Profile(steps=model.fewest_steps, date=time.strftime("%Y-%m-%d"), load=round(load, 2))
    until = math.inf
    for backend in candidates(model.device, seconds >= SLOW_FROM):
        if time.perf_counter() > until:
            break
        if any(
            one["backend"] == f"{name}/{backend.threads}" and _drew_well(one)
            for one in profile.tried
            for name in backend.unless
        ):
            continue
        try:
            prepares = backend.open_all(model.networks)
            prepared = prepare(model, prepares, [n for n in COMPARED if n <= largest], run)
            # rounding in bfloat16 adds up over the steps
            steps = [model.fewest_steps] if backend.exact else list(reference)
            levels = max(max_difference(probe(model, n, prepared, backend.threads), reference[n]) for n in steps)
            sizes = [n for n in COMPARED if n <= largest]
            spent = {n: median_and_spread(model, n, prepared, backend.threads, run)[0] for n in sizes}
        except ApiError:  # the server ends
            raise
        except Exception as error:  # a backend that cannot run this network is no choice
            log.info("%s does not run %s: %s", backend.name, model.name, str(error).splitlines()[:1])
            profile.tried.append({"backend": backend.id, "failed": type(error).__name__})
            continue
        allowed = LEVEL if backend.exact else tolerance
        score = float(np.mean([s / n for n, s in spent.items()]))
        entry = {"backend": backend.id, "ms": {n: round(1e3 * s, 3) for n, s in spent.items()}, "levels": levels}
        profile.tried.append(entry | ({} if levels <= allowed else {"refused": f"more than {allowed} levels"}))
        if levels <= allowed and (best is None or score < best[0]):
            best = (score, backend, prepares, prepared)
            profile.backend, profile.threads, profile.levels = backend.name, backend.threads, levels
        if until == math.inf:  # a large model's reference alone may take longer: what is better must have its turn
            until = time.perf_counter() + seconds
    assert best is not None  # the reference differs from itself by nothing
    _, backend, prepares, prepared = best
    prepared = _measure_buckets(model, backend, prepares, prepared, profile, run, largest)
    if doubted is not None and not profile.sure and profile.doubt >= doubted.doubt:
        return doubted
    model.install(backend, _exact(model, backend, prepares), prepared, profile)
    return profile


def _drew_well(one: dict[str, Any]) -> bool:
    return "failed" not in one and "refused" not in one


def _measure_buckets(
    model: Model,
    backend: Backend,
    prepares: list[Prepare],
    prepared: Prepared,
    profile: Profile,
    run: Run[Any],
    largest: int,
) -> Prepared:
    """Time batches of 1, 2, 4, ... until two in a row gain nothing, and compare each with its pictures drawn alone."""
    measured, alone, size, lost, worst = dict[int, float](), dict[int, Pixels](), 1, 0, 0.0
    while size <= largest and lost < 2:
        prepared = prepare(model, prepares, [size], run, prepared)
        spent, spread = median_and_spread(model, size, prepared, backend.threads, run)
        worst = max(worst, spread)
        levels = _difference_from_alone(model, size, prepared, backend.threads, alone)
        profile.against_one[size] = levels
        if levels > (LEVEL if backend.exact else 2 * LEVEL):
            profile.dropped[size] = f"its pictures differ by {levels} levels from those drawn alone"
        else:
            measured[size] = spent
        lost = 0 if size in worth_having(measured) else lost + 1
        size *= 2
    profile.buckets, profile.spread = worth_having(measured), round(worst, 3)
    for size in set(measured) - set(profile.buckets):
        profile.dropped[size] = f"{1e3 * measured[size] / size:.3g} ms a picture, which smaller ones do as well"
    wanted = prepare(model, [lambda _: _none] * len(prepares), list(profile.buckets), run)
    return [{shape: all_of[shape] for shape in some} for all_of, some in zip(prepared, wanted, strict=True)]


def _none(*_: Any) -> Any:
    raise AssertionError("stands for a function where only the shapes are asked for")


def _install(model: Model, profile: Profile, run: Run[Any], tolerance: int) -> Profile:
    """Prepare and install the winner of a stored profile. ValueError if it no longer draws what the reference draws."""
    backend = next(b for b in candidates(model.device, True) if b.id == profile.id)
    prepares = backend.open_all(model.networks)
    prepared = prepare(model, prepares, list(profile.buckets), run)
    few = model.fewest_steps
    if max_difference(probe(model, few, prepared, backend.threads), probe(model, few)) > (
        LEVEL if backend.exact else tolerance
    ):
        raise ValueError("it draws other pictures than it did")
    model.install(backend, _exact(model, backend, prepares), prepared, profile)
    return profile


def _exact(model: Model, backend: Backend, prepares: list[Prepare]) -> list[Prepare]:
    """Return what prepares shapes whose pictures were not compared: the exact backend, where there is one."""
    other = next((b for b in candidates(model.device, True) if b.id == backend.fallback), None)
    if other is not None:
        return other.open_all(model.networks)
    return prepares if backend.exact else []


def prepare(
    model: Model, prepares: Sequence[Prepare], sizes: Sequence[int], run: Run[Any], known: Prepared | None = None
) -> Prepared:
    """Prepare every network for batches of these sizes, beside what is `known`, in the caller's thread."""
    found: Prepared = [dict(prepared) for prepared in known] if known else [{} for _ in prepares]
    for size in sizes:
        for student, prepared in enumerate(found):
            for inputs in run(partial(model.inputs, size, student)):
                if shapes_of(inputs) not in prepared:
                    prepared[shapes_of(inputs)] = prepares[student](inputs)
    return found


def probe(model: Model, steps: int, prepared: Prepared | None = None, threads: int | None = None) -> Pixels:
    """Draw the probes one by one, (N, H, W, C); without prepared functions by the reference."""
    students = range(model.students)
    orders = [order for k in students for order in model.probes(max(2, PROBES // len(students)), k)]
    with model.using(prepared, threads):
        return np.concatenate([model.draw(steps, [order], strict=prepared is None) for order in orders])


def median_and_spread(
    model: Model, size: int, prepared: Prepared, threads: int, run: Run[float]
) -> tuple[float, float]:
    """Time passes over a fraction of a second. Return their median, and their quartiles' distance as a share of it."""
    orders = model.probes(1) * size

    def timed() -> float:
        started = time.perf_counter()
        with model.using(prepared, threads):
            model.draw(model.fewest_steps, orders)
        return time.perf_counter() - started

    run(timed)
    spent = list[float]()
    while len(spent) < 3 or sum(spent) < SAMPLE_S:
        spent.append(run(timed))
    low, median, high = np.percentile(spent, (25, 50, 75))
    return float(median), float((high - low) / median)


def _difference_from_alone(model: Model, size: int, prepared: Prepared, threads: int, alone: dict[int, Pixels]) -> int:
    """Return the most levels by which a picture in a full batch differs from the same one drawn alone."""
    orders = model.probes(size)
    with model.using(prepared, threads):
        for i, order in enumerate(orders):
            if i not in alone:
                alone[i] = model.draw(model.fewest_steps, [order])[0]
        together = model.draw(model.fewest_steps, orders)
    return max_difference(together, np.stack([alone[i] for i in range(size)]))


def max_difference(one: Pixels, other: Pixels) -> int:
    """Return the largest difference between two pictures, in levels of 255."""
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
