"""Open the served folders, tune them, replace them when they change and unload them for want of memory.

One thread of its own does all of it, so that no caller waits for another's folder. A folder that cannot be opened, or
that does not draw what it should, harms no other, and the version that was served before stays. A request holds a
model, not a name, so its pictures are drawn by the model that it was checked against.
"""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from app.engine.lanes import TooLong
from app.engine.model import Model
from app.engine.passes import Pass
from app.engine.worker import Worker
from app.errors import ApiError, from_bad_input, shutting_down
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

log = logging.getLogger("fewstep.store")
OPEN, TUNE = 0, 1  # priorities of tasks, the lower first
IDLE_S = 60.0  # without work, after which a doubtful profile is measured again; twice as long after each time


@dataclass(eq=False)
class Slot:
    """Holds a weights folder, and its model on every device while it is open."""

    name: str
    folder: Path
    state: str = "opening"  # open | unloaded | failed
    models: list[Model] = field(default_factory=list)
    version: Any = None  # of the folder that was last tried
    stays_unloaded: bool = False  # unloaded by request: only /load opens it again
    opening: Future[None] | None = None
    measured: int = 0  # times that its profile was measured again
    reason: str = ""  # why it could not be opened when it was last tried


class Store:
    """Keeps the slots by name, and looks after them in a thread.

    Args:
        workers: one for each device; every open model is on each of them.
    """

    def __init__(self, settings: Settings, workers: Sequence[Worker], metrics: Metrics) -> None:
        self.settings, self.workers, self.metrics = settings, workers, metrics
        self.slots: dict[str, Slot] = {}
        self._bases: Any = None  # of text to image: `distillers.weights.read.Bases`, which imports torch
        self.opened = False  # every folder that was there at the start has been tried
        self.closed = False
        self._tasks: list[tuple[int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="fewstep-store", daemon=True)

    # -- for the event loop ----------------------------------------------------------------------------------------

    @property
    def failed(self) -> list[str]:
        """Return the names of folders that could not be opened."""
        return [slot.name for slot in self.slots.values() if slot.state == "failed"]

    @property
    def reasons(self) -> dict[str, str]:
        """Return why folders could not be opened, by name; also of those whose version before is still served."""
        return {slot.name: slot.reason for slot in self.slots.values() if slot.reason}

    def load(self, name: str) -> Future[None]:
        """Open a known folder, or read it again. The future is done when it is served."""
        slot = self.slots[name]
        slot.stays_unloaded = False
        if slot.opening is None or slot.opening.done():
            slot.opening = done = Future[None]()
            self._put(OPEN, lambda: self._answer(done, lambda: self._open(slot)))
        return slot.opening

    def unload(self, name: str) -> Future[None]:
        """Unload a model until `load`. Pictures that wait are still drawn."""
        slot, done = self.slots[name], Future[None]()
        slot.stays_unloaded = True
        self._put(OPEN, lambda: self._answer(done, lambda: self._close(slot)))
        return done

    def close(self) -> None:
        """End the thread after its present task."""
        self.closed = True
        with self._changed:
            self._changed.notify()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _put(self, priority: int, task: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._tasks, (priority, next(self._count), task))
            self._changed.notify()

    def _answer(self, done: Future[None], work: Callable[[], None]) -> None:
        try:
            work()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)

    def _run(self) -> None:
        try:
            from distillers.weights.read import Bases

            self._bases = Bases()
            for worker in self.workers:
                worker.device = _device(worker.device)
            self._scan()
            while not self.closed and self._tasks and self._tasks[0][0] == OPEN:
                heapq.heappop(self._tasks)[2]()
        except Exception:
            log.exception("the models could not be opened")
        self.opened = True
        while not self.closed:
            with self._changed:
                if not self._tasks:
                    self._changed.wait(self.settings.rescan_seconds)
                task = heapq.heappop(self._tasks)[2] if self._tasks else self._look_around
            if self.closed:
                return
            try:
                task()
            except Exception:
                log.exception("looking after the models failed")

    def _look_around(self) -> None:
        self._scan()
        if not self._tasks and (slot := next((s for s in self.slots.values() if self._doubtful(s)), None)):
            slot.measured += 1
            self._tune(slot.models, again=True)

    def _doubtful(self, slot: Slot) -> bool:
        """Return whether an open model's profile is to be measured again now: nobody has asked for long enough."""
        if not self.settings.tune_seconds or all(m.profile is None or m.profile.sure for m in slot.models):
            return False
        if any(worker.inflight or len(worker.batcher) for worker in self.workers):
            return False
        used = max(model.used for one in self.slots.values() for model in one.models)
        return time.monotonic() - used > IDLE_S * 2**slot.measured

    def _scan(self) -> None:
        """Open folders that are new or changed, unload those that are gone, and prepare shapes that come often."""
        from app.engine.folders import draws, shown, version
        from distillers.weights.manifest import find

        found = {shown(folder): folder for folder in find(self.settings.weights).values() if draws(folder)}
        for name, folder in sorted(found.items()):
            if name not in self.slots:
                self.slots = {**self.slots, name: Slot(name, folder)}  # others may be iterating over the old one
            slot = self.slots[name]
            if slot.version != version(folder) and not slot.stays_unloaded:
                self._put(OPEN, partial(self._try, slot))
        for name in [name for name in self.slots if name not in found]:
            self._close(self.slots[name])
            self.slots = {other: slot for other, slot in self.slots.items() if other != name}
            log.info("%s has gone", name)
        for model in [model for slot in self.slots.values() for model in slot.models]:
            model.prepare_frequent_shapes()

    def _try(self, slot: Slot) -> None:
        """Open a folder, and log errors. At the start, one that exceeds the memory waits for its first caller."""
        from app.engine.folders import version

        try:
            if not self.opened and not slot.models and not self._fits(slot):
                slot.state, slot.version = "unloaded", version(slot.folder)
                return
            self._open(slot)
        except BadInput:
            log.error("%s is not served: %s", slot.name, slot.reason)
        except ApiError:  # shutting down
            return
        except Exception:
            log.exception("%s is not served", slot.name)

    def _open(self, slot: Slot) -> None:
        """Open a folder beside the version that is served, check what it draws, and then replace that version."""
        from app.engine.folders import check, version, without_place

        started, slot.version, before = time.perf_counter(), version(slot.folder), slot.models
        slot.reason = ""
        try:
            aside = check(slot.folder, self.settings)
            fresh = []
            for worker in self.workers:
                if self.closed:
                    return
                own = self.settings
                model = Model.open(slot.name, slot.folder, worker.device, own.max_steps, self._bases, own.decoding)
                self._look(model, worker)
                fresh.append(model)
            for model in fresh:
                model.replicas = fresh
            if before:  # present callers must not get slower answers for a while
                self._tune(fresh)
        except Exception as error:
            if not before:
                slot.state = "failed"
            if not isinstance(error, BadInput):
                slot.reason = type(error).__name__
                raise
            error = without_place(error, slot.folder)
            slot.reason = from_bad_input(error).body.message
            raise error from None
        self._replace(slot, fresh)
        if aside:
            slot.reason = f"served without its report: {aside}"
            log.warning("%s is %s", slot.name, slot.reason)
        self._make_room(slot)
        log.info("%s is open on %s after %.1f s", slot.name, fresh[0].device, time.perf_counter() - started)
        if not before and self.settings.tune_seconds:
            for model in fresh:
                model.tuning = True
            self._put(TUNE, lambda: self._tune(fresh))

    def _look(self, model: Model, worker: Worker) -> None:
        """Let a new model draw its first pictures, in turn with the traffic. BadInput for wrong ones or slow ones."""
        lane = worker.lane(self._check, self.settings.hang_seconds)
        try:
            with Pass(turn=lane.turn):
                model.warm_up(lane.clock)
        except TooLong as error:
            raise BadInput("weights", f"{model.name}, whose first pictures take {error}", "faster ones") from None

    def _check(self) -> None:
        if self.closed:
            raise shutting_down()

    def _replace(self, slot: Slot, models: list[Model]) -> None:
        """Serve other models under a slot's name, or none, from the next request on."""
        before, slot.models = slot.models, models
        slot.state = "open" if models else "unloaded"
        for i, worker in enumerate(self.workers):
            others = {name: model for name, model in worker.models.items() if name != slot.name}
            worker.models = dict(sorted({**others, **({slot.name: models[i]} if models else {})}.items()))
            if before:
                worker.forget(before[i])
        for model in before[:1]:
            self.metrics.loaded(slot.name, model.revision, False)
        for model in models[:1]:
            self.metrics.loaded(slot.name, model.revision, True)

    def _close(self, slot: Slot) -> None:
        self._replace(slot, [])
        if self.settings.device != "cpu":
            import gc

            import torch

            gc.collect()
            torch.cuda.empty_cache()
        log.info("%s is unloaded", slot.name)

    def _tune(self, models: Sequence[Model], again: bool = False) -> None:
        from app.engine.tuning import tune

        for worker, model in zip(self.workers, models, strict=True):
            if self.closed or not self.settings.tune_seconds:
                return
            if worker.models.get(model.name) not in (model, None) and not model.tuning:
                continue
            model.tuning = True
            try:
                started, largest = time.perf_counter(), self._largest(model)
                lane = worker.lane(self._check)
                with Pass(turn=lane.turn):
                    profile = tune(
                        model,
                        lane.turn,
                        seconds=self.settings.tune_seconds,
                        tolerance=self.settings.tolerance,
                        largest=largest,
                        doubted=model.profile if again else None,
                    )
                worker.forget(model)
                spent = time.perf_counter() - started
                log.info("%s is run by %s, found after %.1f s", model.name, profile.id, spent)
            except ApiError:  # shutting down
                return
            except Exception:
                log.exception("%s could not be tuned: it is run as it was", model.name)
            finally:
                model.tuning = False

    def _largest(self, model: Model) -> int:
        height, width = model.info.size
        return max(1, min(self.settings.max_batch, self.settings.max_pixels // (height * width)))

    def _make_room(self, newest: Slot) -> None:
        """Unload the models not used for the longest, until the rest fits into the memory budget."""
        while self.settings.memory_mb is not None and self._held() > self.settings.memory_mb * 2**20:
            others = [slot for slot in self.slots.values() if slot.models and slot is not newest]
            if not others:
                log.warning("%s alone is larger than the memory budget", newest.name)
                return
            self._close(min(others, key=lambda slot: max(model.used for model in slot.models)))

    def _held(self) -> int:
        """Return the bytes of parameters on each device; those of a base that adapters share count once."""
        held = dict[int, int]()
        for slot in self.slots.values():
            held |= slot.models[0].bytes_by_parameter if slot.models else {}
        return sum(held.values())

    def _fits(self, slot: Slot) -> bool:
        """Return whether a folder fits into the memory budget: its files are in half precision, opened in float32."""
        if self.settings.memory_mb is None:
            return True
        size = 2 * sum(file.stat().st_size for file in slot.folder.rglob("*.safetensors") if file.is_file())
        return self._held() + size <= self.settings.memory_mb * 2**20


def _device(name: str) -> str:
    """Resolve "auto" to a device. It imports torch, which is slow, on this thread and not on the event loop."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
