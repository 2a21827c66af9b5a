"""Run one device: its only thread takes batches from its queue, draws them and answers each order.

A batch that takes long has a thread of its own, and so have scenes, benchmarks and looks at folders. From there only
slices, calls of a network, come to the device's thread (`passes`, `lanes`), so nobody waits for longer than for one.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from app.engine.batch_cost import BatchCost
from app.engine.batcher import Batcher, QueueEntry
from app.engine.lanes import BACKGROUND, SHARED, Lane
from app.engine.model import Model, Order
from app.engine.passes import Pass, Turn
from app.engine.styles import Style
from app.errors import ApiError, caller_left, overloaded, shutting_down
from app.media.image_files import Pixels
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

log = logging.getLogger("fewstep.engine")


@dataclass(frozen=True)
class BatchKey:
    """Names what the pictures of one forward pass must share.

    It holds the model itself, not its name: an order that waits while its folder is replaced is drawn by the model that
    it was checked against.
    """

    model: Model
    steps: int
    height: int
    width: int
    student: int = 0  # of a folder of several; a pass runs one of them
    first: int = 0  # steps left out at the beginning
    strict: bool = False
    from_picture: bool = False  # not from noise alone
    style: Style | None = None
    loras: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True, eq=False)
class Task:
    """Holds a picture's order, and the function that is called with the picture in a thread of the finishers."""

    order: Order
    finish: Callable[[Pixels], Any] | None
    left: bool = False  # nobody waits for it any more


@dataclass(frozen=True)
class Picture:
    """Holds a picture that was drawn, and how long that took."""

    pixels: Pixels  # (H, W, C), all bands of the model
    file: Any  # what `finish` made of it, or None
    queue_s: float
    forward_s: float  # of the whole batch
    encode_s: float
    turn: int  # number of the forward pass
    batch: int  # pictures in it
    bucket: int  # pictures it was padded to


@dataclass(frozen=True)
class _Long:
    """Holds a batch that runs in slices: how many pictures, and its predicted end by time.monotonic()."""

    pictures: int
    ends: float


class Worker:
    """Owns a device's thread, its queue, and the predicted costs of its batches."""

    def __init__(self, device: str, settings: Settings, metrics: Metrics, finishers: ThreadPoolExecutor) -> None:
        self.device, self.settings, self.metrics, self.finishers = device, settings, metrics, finishers
        self.models: dict[str, Model] = {}
        self.batcher: Batcher[BatchKey | Lane, Any, Any] = Batcher(
            settings.queue_limit, self, settings.max_wait_seconds
        )
        self.thread = threading.Thread(target=self._run, name=f"fewstep-engine-{device}", daemon=True)
        self.turns = 0  # batches drawn
        self._drawing = 0  # pictures in the device's thread
        self._long: dict[BatchKey, _Long] = {}  # batches in threads of their own
        self._threads = ThreadPoolExecutor(LONG_PASSES, "fewstep-pass")
        self._lock = threading.Lock()
        self.broken = False  # the device lost its context: nothing will ever work again in this process
        self._busy_since: float | None = None  # of what the device's thread runs
        self._pass_s = 0.0  # that it was predicted to take
        self._costs: dict[BatchKey, BatchCost] = {}

    # -- the caller's side -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Return whether the thread still answers orders."""
        return self.thread.is_alive() and not self.broken

    @property
    def inflight(self) -> int:
        """Count the pictures that are being drawn."""
        return self._drawing + sum(batch.pictures for batch in list(self._long.values()))

    @property
    def stuck(self) -> bool:
        """Return whether a pass, or a slice of one, runs for longer than any should."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self.settings.hang_seconds

    def backlog_s(self) -> float:
        """Predict the seconds until an order that comes now begins."""
        return self.batcher.backlog_s() + self.inflight_s()

    def load_s(self) -> float:
        """Predict the seconds until all that waits and all that is at work is done."""
        now = time.monotonic()
        return self.backlog_s() + sum(max(0.0, batch.ends - now) for batch in list(self._long.values()))

    def inflight_s(self) -> float:
        """Predict the seconds that the running pass or slice still takes."""
        since, pass_s = self._busy_since, self._pass_s
        return 0.0 if since is None else max(0.0, pass_s - (time.monotonic() - since))

    def lane(self, check: Callable[[], None] | None = None, limit_s: float = float("inf")) -> Lane:
        """Return the lane of some work that can wait: see `Lane`."""
        return Lane(self.batcher, self.device, BACKGROUND, check, limit_s)

    # -- predictions, for the batcher: see `Costs` -------------------------------------------------------------------

    def batch_size(self, key: BatchKey | Lane, waiting: int) -> int:
        """Return how many of the waiting orders should run together now."""
        return 1 if isinstance(key, Lane) else self.cost(key).batch_size(waiting)

    def seconds(self, key: BatchKey | Lane, count: int) -> float:
        """Predict the seconds of so many orders."""
        return key.slice_s * count if isinstance(key, Lane) else self.cost(key).predict(count)

    def patience(self, key: BatchKey | Lane) -> float:
        """Return how many times an order's own seconds others may run before it."""
        return key.patience if isinstance(key, Lane) else 0.0

    def ready(self, key: BatchKey | Lane) -> bool:
        """Return whether orders may run now: one batch of a key at a time, and a few that take long."""
        if not self._long or isinstance(key, Lane):
            return True
        return key not in self._long and (len(self._long) < LONG_PASSES or not self._takes_long(key, 1))

    def cost(self, key: BatchKey) -> BatchCost:
        """Return the costs of batches of a key on this device."""
        if key.loras:  # of any LoRAs the same: callers choose their weights, and costs are kept
            key = replace(key, style=None, loras=STYLED)
        if (cost := self._costs.get(key)) is None:
            cost = self._costs[key] = self._first_cost(key)
        return cost

    def forget(self, model: Model) -> None:
        """Forget the costs of a model that was tuned or unloaded."""
        self._costs = {key: cost for key, cost in self._costs.items() if key.model is not model}

    def _first_cost(self, key: BatchKey) -> BatchCost:
        """Return costs as far as the model measured them; the number and the pixels of a batch are limited."""
        by_pixels = self.settings.max_pixels // (key.height * key.width)
        largest = 1 if key.strict else max(1, min(self.settings.max_batch, by_pixels))
        return key.model.cost(key.steps - key.first, key.height, key.width, largest)

    def _takes_long(self, key: BatchKey, count: int) -> bool:
        """Return whether a batch runs in slices: a single step is one slice in any case."""
        return key.steps - key.first > 1 and self.cost(key).predict(count) > LONG_S

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.broken and (turn := self.batcher.take()) is not None:
            key, entries = turn
            if isinstance(key, Lane):
                self._run_slice(key, entries[0])
            elif self._takes_long(key, len(entries)):
                ends = time.monotonic() + self.cost(key).predict(len(entries))
                self._long[key] = _Long(len(entries), ends)
                self._threads.submit(self._draw_in_slices, key, entries)
            else:
                self._drawing = len(entries)
                self._draw(key, entries)
                self._drawing = 0
        self.batcher.close()
        self._threads.shutdown(wait=False)

    def _run_slice(self, lane: Lane, entry: QueueEntry[Callable[[], Any], Any]) -> None:
        """Run a slice for another thread, which hears of any error."""
        self._busy_since, self._pass_s = time.monotonic(), lane.slice_s
        try:
            result = entry.order()
        except BaseException as error:
            self._see(error)
            entry.answer.set_exception(error)
        else:
            entry.answer.set_result(result)
        finally:
            self._busy_since = None

    def _draw_in_slices(self, key: BatchKey, entries: Sequence[QueueEntry[Task, Any]]) -> None:
        """Draw one batch in this thread, and its slices in turn with others on the device's."""
        check = partial(self._check, [entry.order for entry in entries])
        try:
            self._draw(key, entries, Lane(self.batcher, self.device, SHARED, check))
        finally:
            del self._long[key]
            self.batcher.ring()

    def _check(self, tasks: Sequence[Task]) -> None:
        """Raise what ends a pass between two steps: the server's end, or that nobody waits for any of its pictures."""
        if self.batcher.closed:
            raise shutting_down()
        if all(task.left for task in tasks):
            raise caller_left()

    def _draw(self, key: BatchKey, entries: Sequence[QueueEntry[Task, Any]], lane: Lane | None = None) -> None:
        """Draw one batch and answer every entry, with an error if that is how it ends."""
        orders = [entry.order.order for entry in entries]
        cost = self.cost(key)
        bucket = cost.bucket(len(orders))
        turn: Turn | None = None
        if lane is not None:
            clock, turn = lane.clock, lane.turn
        else:
            clock, self._busy_since, self._pass_s = time.perf_counter, time.monotonic(), cost.predict(len(orders))
            if key.steps - key.first > 1:
                turn = partial(self._unless_left, [entry.order for entry in entries])
        begun, started = time.perf_counter(), clock()
        try:
            padded = (
                orders if bucket == len(orders) else orders + [without_callback(orders[-1])] * (bucket - len(orders))
            )
            with Pass(turn=turn):
                pixels = key.model.draw(key.steps, padded, key.first, key.strict, key.style)[: len(orders)]
                flagged = key.model.flags(pixels)
        except BaseException as error:
            if lane is None:
                self._busy_since = None
            if _out_of_memory(error):
                return self._split(key, entries, lane)
            return self._fail(error, entries)
        if lane is None:
            self._busy_since = None
        spent = clock() - started
        with self._lock:
            self.turns += 1
            turns = self.turns
        waits = [begun - entry.arrived for entry in entries]
        alone = len(entries) == 1 and pixels.size <= SMALL and not len(self.batcher)
        for entry, picture, wait, bad in zip(entries, pixels, waits, flagged, strict=True):
            if bad:
                self._fail(not_shown(key.model.name), [entry])
                continue
            facts = (wait, spent, turns, len(orders), bucket)
            if (finish := entry.order.finish) is None or (picture.size <= TINY and not alone):
                entry.answer.set_result(_picture(picture, None, 0.0, facts))
            elif alone:  # the device is idle, and changing threads would cost more than the encoding
                self._finish(entry, picture, finish, facts)
            else:
                self.finishers.submit(self._finish, entry, picture, finish, facts)
        cost.observe(len(orders), spent)
        self.metrics.batch(key.model.name, len(orders), bucket, waits, spent)

    def _unless_left(self, tasks: Sequence[Task], slice_: Callable[[], Any]) -> Any:
        self._check(tasks)
        return slice_()

    def _finish(
        self, entry: QueueEntry[Any, Any], picture: Pixels, finish: Callable[[Pixels], Any], facts: tuple[Any, ...]
    ) -> None:
        """Encode a picture and answer its entry: in a thread of the finishers, or on this one when it is idle."""
        started = time.perf_counter()
        try:
            file = finish(picture)
        except BaseException as error:
            return self._fail(error, [entry])
        spent = time.perf_counter() - started
        entry.answer.set_result(_picture(picture, file, spent, facts))
        self.metrics.stage("encode", spent)

    def _split(self, key: BatchKey, entries: Sequence[QueueEntry[Task, Any]], lane: Lane | None) -> None:
        """Draw in halves a batch that did not fit into memory, and never so many again; a lone picture ends in 503."""
        self.metrics.out_of_memory(key.model.name)
        _free(self.device)
        log.warning("%d pictures of %s did not fit into memory", len(entries), key.model.name)
        self.cost(key).halve(len(entries))
        if len(entries) == 1:
            return self._fail(overloaded("there is no memory for this picture now", 5, "out_of_memory"), entries)
        middle = len(entries) // 2
        self._draw(key, entries[:middle], lane)
        self._draw(key, entries[middle:], lane)

    def _fail(self, error: BaseException, entries: Sequence[QueueEntry[Task, Any]]) -> None:
        """Answer entries with an error, which is logged unless it is the caller's."""
        if not isinstance(error, BadInput | ApiError):
            log.error("a turn of %d failed", len(entries), exc_info=error)
        self._see(error)
        for entry in entries:
            entry.answer.set_exception(error)

    def _see(self, error: BaseException) -> None:
        """Note an error that is the device's end."""
        if "CUDA error" in str(error):  # sticky: the context is lost; a supervisor should start the process anew
            self.broken = True


STYLED = (("", 1.0),)  # stands for all LoRAs among the costs
LONG_S = 0.25  # predicted, from which a batch of several steps runs in slices
LONG_PASSES = 4  # of different keys, that take turns
TINY = 3 * 64 * 64  # bytes of pixels that the waiting caller encodes itself: a change of threads would cost more
SMALL = 3 * 128 * 128  # bytes of pixels that are encoded in less than half a millisecond


def _picture(picture: Pixels, file: Any, encode_s: float, facts: tuple[Any, ...]) -> Picture:
    queue_s, forward_s, turn, batch, bucket = facts
    return Picture(picture, file, queue_s, forward_s, encode_s, turn, batch, bucket)


def without_callback(order: Order) -> Order:
    """Return the order without its callback, to pad a batch with."""
    return replace(order, on_partial=None, partial_steps=())


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def by_model(waiting: dict[Any, int]) -> dict[str, int]:
    """Sum up waiting pictures by the name of their model."""
    counts = dict[str, int]()
    for key, count in waiting.items():
        if isinstance(key, BatchKey):
            counts[key.model.name] = counts.get(key.model.name, 0) + count
    return counts


def not_shown(name: str) -> ApiError:
    """Return OpenAI's answer for a picture that a model's safety checker flags."""
    message = f"the safety checker of {name} flags this picture, and it is not shown: try another prompt or seed"
    return ApiError(400, message, param="prompt", code="content_policy_violation")
