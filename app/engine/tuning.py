"""The choice of a backend by measurement, and the measured cost of every batch size: a model's profile.

Beside the serving: preparing happens in the caller's thread, and only the timed passes take turns with the traffic on
the engine's. What was found is kept beside the weights (`profile.json`), by device and versions, so that the next
start prepares the winner only and measures nothing.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from app.engine.backends import Backend, Prepare, Way, candidates, signature
from app.engine.cost import worth_having
from app.engine.model import Model
from app.engine.profile import Profile, profile_key, read_profiles, write_profile
from app.errors import ApiError
from app.media.images import Pixels

T = TypeVar("T")
Run = Callable[[Callable[[], T]], T]  # runs a function on the engine's thread, in its turn
log = logging.getLogger("fewstep.tuning")
SLOW_FROM = 60.0  # seconds of measuring allowed, from which torch.compile is tried
COMPARED = (1, 4)  # the batch sizes that backends are compared at
LEVEL = 1  # of 255: what another order of summation may move a pixel by
PROBES = 4  # pictures that a backend is held against the reference with
SAMPLE_S = 0.1  # seconds of timed passes for each measurement, and 3 passes at least
Ways = list[dict[Any, Way]]  # for each network of a model


def tune(model: Model, run: Run[Any], *, seconds: float, tolerance: int, largest: int) -> Profile:
    """Finds and installs the fastest backend of a model, and the buckets worth having.

    Args:
        run: on the engine's thread.
        seconds: of measuring after the reference, when the backends that were not tried are left out.
        tolerance: levels of 255 that a backend of lower precision may move a pixel by.
        largest: pictures in one pass.
    """
    key = profile_key(model.info, model.device, tolerance, largest)
    if stored := read_profiles(model.folder).get(key):
        try:
            return _install(model, Profile.from_json(stored), run, tolerance)
        except ApiError:  # the server ends
            raise
        except Exception as error:
            log.info("the profile kept for %s is measured anew: %s", model.name, error)
    profile = _measure(model, run, seconds, tolerance, largest)
    try:
        write_profile(model.folder, key, profile)
    except OSError:
        log.info("the profile of %s cannot be kept beside its weights", model.name)
    return profile


def _measure(model: Model, run: Run[Any], seconds: float, tolerance: int, largest: int) -> Profile:
    reference = {n: run(partial(probe, model, n)) for n in {model.fewest_steps, model.default_steps}}
    best: tuple[float, Backend, list[Prepare], Ways] | None = None
    profile = Profile(steps=model.fewest_steps, date=time.strftime("%Y-%m-%d"))
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
            opened = backend.opened(model.networks)
            ways = prepare(model, opened, [n for n in COMPARED if n <= largest], run)
            # rounding in bfloat16 adds up over the steps
            steps = [model.fewest_steps] if backend.exact else list(reference)
            levels = max(difference(run(partial(probe, model, n, ways, backend.threads)), reference[n]) for n in steps)
            sizes = [n for n in COMPARED if n <= largest]
            spent = {n: run(partial(timed, model, n, ways, backend.threads)) for n in sizes}
        except ApiError:  # the server ends
            raise
        except Exception as error:  # a backend that cannot run this network is no choice
            log.info("%s does not run %s: %s", backend.name, model.name, str(error).splitlines()[:1])
            profile.tried.append({"backend": backend.id, "failed": type(error).__name__})
            continue
        allowed = LEVEL if backend.exact else tolerance
        score = float(np.mean([s / n for n, s in spent.items()]))
        told = {"backend": backend.id, "ms": {n: round(1e3 * s, 3) for n, s in spent.items()}, "levels": levels}
        profile.tried.append(told | ({} if levels <= allowed else {"refused": f"more than {allowed} levels"}))
        if levels <= allowed and (best is None or score < best[0]):
            best = (score, backend, opened, ways)
            profile.backend, profile.threads, profile.levels = backend.name, backend.threads, levels
        if until == math.inf:  # a large model's reference alone may take longer: what is better must have its turn
            until = time.perf_counter() + seconds
    assert best is not None  # the reference differs from itself by nothing
    _, backend, opened, ways = best
    ways = _measure_buckets(model, backend, opened, ways, profile, run, largest)
    model.install(backend, _exact(model, backend, opened), ways, profile)
    return profile


def _drew_well(one: dict[str, Any]) -> bool:
    return "failed" not in one and "refused" not in one


def _measure_buckets(
    model: Model, backend: Backend, opened: list[Prepare], ways: Ways, profile: Profile, run: Run[Any], largest: int
) -> Ways:
    """Every power of two, until two in a row gain nothing; and each against its pictures drawn one by one."""
    measured, alone, size, lost = dict[int, float](), dict[int, Pixels](), 1, 0
    while size <= largest and lost < 2:
        ways = prepare(model, opened, [size], run, ways)
        spent = run(partial(timed, model, size, ways, backend.threads))
        levels = run(partial(_against_one, model, size, ways, backend.threads, alone))
        profile.against_one[size] = levels
        if levels > (LEVEL if backend.exact else 2 * LEVEL):
            profile.dropped[size] = f"its pictures differ by {levels} levels from those drawn alone"
        else:
            measured[size] = spent
        lost = 0 if size in worth_having(measured) else lost + 1
        size *= 2
    profile.buckets = worth_having(measured)
    for size in set(measured) - set(profile.buckets):
        profile.dropped[size] = f"{1e3 * measured[size] / size:.3g} ms a picture, which smaller ones do as well"
    wanted = prepare(model, [lambda _: _none] * len(opened), list(profile.buckets), run)
    return [{shape: all_of[shape] for shape in some} for all_of, some in zip(ways, wanted, strict=True)]


def _none(*_: Any) -> Any:
    raise AssertionError("stands for a way where only its shape is asked for")


def _install(model: Model, profile: Profile, run: Run[Any], tolerance: int) -> Profile:
    """A profile that was measured before: the winner is prepared and looked at once."""
    backend = next(b for b in candidates(model.device, True) if b.id == profile.id)
    opened = backend.opened(model.networks)
    ways = prepare(model, opened, list(profile.buckets), run)
    few = model.fewest_steps
    pictures, reference = run(lambda: (probe(model, few, ways, backend.threads), probe(model, few)))
    if difference(pictures, reference) > (LEVEL if backend.exact else tolerance):
        raise ValueError("it draws other pictures than it did")
    model.install(backend, _exact(model, backend, opened), ways, profile)
    return profile


def _exact(model: Model, backend: Backend, opened: list[Prepare]) -> list[Prepare]:
    """What prepares shapes that were not compared."""
    other = next((b for b in candidates(model.device, True) if b.id == backend.fallback), None)
    if other is not None:
        return other.opened(model.networks)
    return opened if backend.exact else []


def prepare(
    model: Model, opened: Sequence[Prepare], sizes: Sequence[int], run: Run[Any], known: Ways | None = None
) -> Ways:
    """Ways for batches of these sizes, for each network of the model, beside those known; in the caller's thread."""
    found: Ways = [dict(ways) for ways in known] if known else [{} for _ in opened]
    for size in sizes:
        for student, ways in enumerate(found):
            for inputs in run(partial(model.inputs, size, student)):
                if signature(inputs) not in ways:
                    ways[signature(inputs)] = opened[student](inputs)
    return found


def probe(model: Model, steps: int, ways: Ways | None = None, threads: int | None = None) -> Pixels:
    """The probes' pictures one by one, (N, H, W, 3); by the reference without ways. On the engine's thread."""
    students = range(model.students)
    orders = [order for k in students for order in model.probes(max(2, PROBES // len(students)), k)]
    with model.using(ways, threads):
        return np.concatenate([model.draw(steps, [order], strict=ways is None) for order in orders])


def timed(model: Model, size: int, ways: Ways, threads: int) -> float:
    """Seconds of a pass, the median. On the engine's thread: what waits meanwhile waits a fraction of a second."""
    orders = model.probes(1) * size
    spent = list[float]()
    with model.using(ways, threads):
        model.draw(model.fewest_steps, orders)
        until = time.perf_counter() + SAMPLE_S
        while len(spent) < 3 or time.perf_counter() < until:
            started = time.perf_counter()
            model.draw(model.fewest_steps, orders)
            spent.append(time.perf_counter() - started)
    return float(np.median(spent))


def _against_one(model: Model, size: int, ways: Ways, threads: int, alone: dict[int, Pixels]) -> int:
    """The most levels by which a picture in a full batch differs from itself alone."""
    orders = model.probes(size)
    with model.using(ways, threads):
        for i, order in enumerate(orders):
            if i not in alone:
                alone[i] = model.draw(model.fewest_steps, [order])[0]
        together = model.draw(model.fewest_steps, orders)
    return difference(together, np.stack([alone[i] for i in range(size)]))


def difference(one: Pixels, other: Pixels) -> int:
    """The most levels of 255 between two pictures."""
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
