"""Run one device: its only thread takes batches from its queue, draws them and answers each order."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from app.engine.batch_cost import BatchCost
from app.engine.batcher import Batcher, Closed, Full, QueueEntry
from app.engine.model import Model, Order
from app.engine.styles import Style
from app.errors import ApiError, overloaded
from app.media.image_files import Pixels
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

T = TypeVar("T")
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


@dataclass(frozen=True, eq=False)
class Call:
    """Holds a function to run on the device's thread, alone in its turn."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """Holds a picture's order, and the function that is called with the picture in a thread of the finishers."""

    order: Order
    finish: Callable[[Pixels], Any] | None


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


class Worker:
    """Owns a device's thread, its queue, and the predicted costs of its batches."""

    def __init__(self, device: str, settings: Settings, metrics: Metrics, finishers: ThreadPoolExecutor) -> None:
        self.device, self.settings, self.metrics, self.finishers = device, settings, metrics, finishers
        self.models: dict[str, Model] = {}
        self.batcher: Batcher[BatchKey | Call, Task | None, Any] = Batcher(
            settings.queue_limit, self, settings.max_wait_seconds
        )
        self.thread = threading.Thread(target=self._run, name=f"fewstep-engine-{device}", daemon=True)
        self.turns = self.inflight = 0
        self.broken = False  # the device lost its context: nothing will ever work again in this process
        self._busy_since: float | None = None  # of a forward pass
        self._pass_s = 0.0  # that it was predicted to take
        self._costs: dict[BatchKey, BatchCost] = {}

    # -- the caller's side -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Return whether the thread still answers orders."""
        return self.thread.is_alive() and not self.broken

    @property
    def stuck(self) -> bool:
        """Return whether a forward pass runs for longer than any should."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self.settings.hang_seconds

    def backlog_s(self) -> float:
        """Predict the seconds until an order that comes now begins."""
        return self.batcher.backlog_s() + self.inflight_s()

    def inflight_s(self) -> float:
        """Predict the seconds that the running pass still takes."""
        since, pass_s = self._busy_since, self._pass_s
        return 0.0 if since is None else max(0.0, pass_s - (time.monotonic() - since))

    def run(self, function: Callable[[], T]) -> T:
        """Run a function on the device's thread and wait for its result, and before it for room in the queue."""
        if threading.current_thread() is self.thread:
            return function()
        while True:
            try:
                (future,) = self.batcher.put([(Call(function), None)])
            except Full:  # a request would get 503; internal work waits
                time.sleep(0.02)
                continue
            except Closed:
                raise shutting_down() from None
            try:
                return cast(T, future.result())
            except Closed:
                raise shutting_down() from None

    # -- predictions, for the batcher: see `Costs` -------------------------------------------------------------------

    def batch_size(self, key: BatchKey | Call, waiting: int) -> int:
        """Return how many of the waiting orders should run together now."""
        return 1 if isinstance(key, Call) else self.cost(key).batch_size(waiting)

    def seconds(self, key: BatchKey | Call, count: int) -> float:
        """Predict the seconds of so many orders."""
        return CALL_S * count if isinstance(key, Call) else self.cost(key).predict(count)

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

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.broken and (turn := self.batcher.take()) is not None:
            key, entries = turn
            self.inflight += len(entries)
            try:
                if isinstance(key, Call):
                    self._call(key, entries)
                else:
                    self._draw(key, entries)
            finally:
                self.inflight -= len(entries)
        self.batcher.close()

    def _call(self, key: Call, entries: Sequence[QueueEntry[Task | None, Any]]) -> None:
        try:
            entries[0].answer.set_result(key.function())
        except BaseException as error:
            self._fail(error, entries)

    def _draw(self, key: BatchKey, entries: Sequence[QueueEntry[Task | None, Any]]) -> None:
        """Draw one batch and answer every entry, with an error if that is how it ends."""
        orders = [cast(Task, entry.order).order for entry in entries]
        cost = self.cost(key)
        bucket = cost.bucket(len(orders))
        started, self._busy_since, self._pass_s = time.perf_counter(), time.monotonic(), cost.predict(len(orders))
        try:
            padded = (
                orders if bucket == len(orders) else orders + [without_callback(orders[-1])] * (bucket - len(orders))
            )
            pixels = key.model.draw(key.steps, padded, key.first, key.strict, key.style)[: len(orders)]
            flagged = key.model.flags(pixels)
        except BaseException as error:
            self._busy_since = None
            if _out_of_memory(error):
                return self._split(key, entries)
            return self._fail(error, entries)
        self._busy_since = None
        spent = time.perf_counter() - started
        self.turns += 1
        waits = [started - entry.arrived for entry in entries]
        alone = len(entries) == 1 and pixels.size <= SMALL and not len(self.batcher)
        for entry, picture, wait, bad in zip(entries, pixels, waits, flagged, strict=True):
            if bad:
                self._fail(not_shown(key.model.name), [entry])
                continue
            facts = (wait, spent, self.turns, len(orders), bucket)
            if (finish := cast(Task, entry.order).finish) is None or (picture.size <= TINY and not alone):
                entry.answer.set_result(_picture(picture, None, 0.0, facts))
            elif alone:  # the device is idle, and changing threads would cost more than the encoding
                self._finish(entry, picture, finish, facts)
            else:
                self.finishers.submit(self._finish, entry, picture, finish, facts)
        cost.observe(len(orders), spent)
        self.metrics.batch(key.model.name, len(orders), bucket, waits, spent)

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

    def _split(self, key: BatchKey, entries: Sequence[QueueEntry[Task | None, Any]]) -> None:
        """Draw in halves a batch that did not fit into memory, and never so many again; a lone picture ends in 503."""
        self.metrics.out_of_memory(key.model.name)
        _free(self.device)
        log.warning("%d pictures of %s did not fit into memory", len(entries), key.model.name)
        self.cost(key).halve(len(entries))
        if len(entries) == 1:
            return self._fail(overloaded("there is no memory for this picture now", 5, "out_of_memory"), entries)
        middle = len(entries) // 2
        self._draw(key, entries[:middle])
        self._draw(key, entries[middle:])

    def _fail(self, error: BaseException, entries: Sequence[QueueEntry[Task | None, Any]]) -> None:
        """Answer entries with an error, which is logged unless it is the caller's."""
        if not isinstance(error, BadInput | ApiError):
            log.error("a turn of %d failed", len(entries), exc_info=error)
        if "CUDA error" in str(error):  # sticky: the context is lost; a supervisor should start the process anew
            self.broken = True
        for entry in entries:
            entry.answer.set_exception(error)


STYLED = (("", 1.0),)  # stands for all LoRAs among the costs
CALL_S = 0.02  # a tile of a scene, for example
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


def shutting_down() -> ApiError:
    """Return the 503 for callers who still wait when the server ends."""
    return overloaded("the server is shutting down", 5, "shutting_down")
