"""One device: its queue, and the one thread that touches it. It pulls batches, draws, and answers every order."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from app.engine.batcher import Batcher, Closed, Full, Ticket
from app.engine.cost import Cost
from app.engine.model import Model, Order
from app.errors import ApiError, overloaded
from app.media.images import Pixels
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

T = TypeVar("T")
log = logging.getLogger("fewstep.engine")


@dataclass(frozen=True)
class Shape:
    """What pictures of one forward pass must share. The model itself, not its name: an order that waits while its
    folder is replaced is drawn by the model that it was checked against."""

    model: Model
    steps: int
    height: int
    width: int
    student: int = 0  # of a folder of several: nobody waits for another student's pass within their own
    first: int = 0
    strict: bool = False
    started: bool = False  # from a picture, not from noise alone


@dataclass(frozen=True, eq=False)
class Call:
    """Work of another kind, alone in its turn."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Piece:
    """A picture to draw, and what is to be done with it afterwards, in a thread of the finishers."""

    order: Order
    finish: Callable[[Pixels], Any] | None


@dataclass(frozen=True)
class Drawn:
    """One picture, drawn."""

    pixels: Pixels  # (H, W, 3)
    file: Any  # what `finish` made of it, or None
    queue_s: float
    forward_s: float  # of the whole batch
    encode_s: float
    turn: int  # number of the forward pass
    batch: int  # pictures in it
    bucket: int  # pictures it was padded to


class Worker:
    """A device's thread, its queue, and the costs of what is asked of it."""

    def __init__(self, device: str, settings: Settings, metrics: Metrics, finishers: ThreadPoolExecutor) -> None:
        self.device, self.settings, self.metrics, self.finishers = device, settings, metrics, finishers
        self.models: dict[str, Model] = {}
        self.batcher: Batcher[Shape | Call, Piece | None, Any] = Batcher(
            settings.queue_limit, self, settings.max_wait_seconds
        )
        self.thread = threading.Thread(target=self._run, name=f"fewstep-engine-{device}", daemon=True)
        self.turns = self.inflight = 0
        self.broken = False  # the device lost its context: nothing will ever work again in this process
        self._busy_since: float | None = None  # of a forward pass
        self._pass_s = 0.0  # that it was predicted to take
        self._costs: dict[Shape, Cost] = {}

    # -- the caller's side -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False when nothing will be answered any more."""
        return self.thread.is_alive() and not self.broken

    @property
    def stuck(self) -> bool:
        """Whether a forward pass runs for longer than any should."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > self.settings.hang_seconds

    def backlog_s(self) -> float:
        """Predicted seconds until an order that comes now begins."""
        return self.batcher.backlog_s() + self.inflight_s()

    def inflight_s(self) -> float:
        """Predicted seconds that the pass at work still takes."""
        since, pass_s = self._busy_since, self._pass_s
        return 0.0 if since is None else max(0.0, pass_s - (time.monotonic() - since))

    def run(self, function: Callable[[], T]) -> T:
        """Runs a function on this thread, from another that waits for it, and before it for as long as it is full."""
        if threading.current_thread() is self.thread:
            return function()
        while True:
            try:
                (future,) = self.batcher.put([(Call(function), None)])
            except Full:  # a caller would be sent away; work of our own gives way
                time.sleep(0.02)
                continue
            except Closed:
                raise shutting_down() from None
            try:
                return cast(T, future.result())
            except Closed:
                raise shutting_down() from None

    # -- what is known of the work: the batcher's questions ----------------------------------------------------------

    def take(self, key: Shape | Call, waiting: int) -> int:
        """See `Costs`."""
        return 1 if isinstance(key, Call) else self.cost(key).take(waiting)

    def seconds(self, key: Shape | Call, count: int) -> float:
        """See `Costs`."""
        return CALL_S * count if isinstance(key, Call) else self.cost(key).predict(count)

    def cost(self, key: Shape) -> Cost:
        """Of passes of a shape on this device."""
        if (found := self._costs.get(key)) is None:
            found = self._costs[key] = self._first_cost(key)
        return found

    def forget(self, model: Model) -> None:
        """What was predicted of a model that was tuned, or has gone."""
        self._costs = {key: cost for key, cost in self._costs.items() if key.model is not model}

    def _first_cost(self, key: Shape) -> Cost:
        """Limited by number and, so that memory is, by pixels."""
        by_pixels = self.settings.max_pixels // (key.height * key.width)
        largest = 1 if key.strict else max(1, min(self.settings.max_batch, by_pixels))
        return key.model.cost(key.steps - key.first, key.height, key.width, largest)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.broken and (turn := self.batcher.take()) is not None:
            key, tickets = turn
            self.inflight += len(tickets)
            try:
                if isinstance(key, Call):
                    self._call(key, tickets)
                else:
                    self._draw(key, tickets)
            finally:
                self.inflight -= len(tickets)
        self.batcher.close()

    def _call(self, key: Call, tickets: Sequence[Ticket[Piece | None, Any]]) -> None:
        try:
            tickets[0].answer.set_result(key.function())
        except BaseException as error:
            self._tell(error, tickets)

    def _draw(self, key: Shape, tickets: Sequence[Ticket[Piece | None, Any]]) -> None:
        """One turn: every ticket is answered, with an error if that is how it ends, and the worker lives on."""
        orders = [cast(Piece, ticket.order).order for ticket in tickets]
        cost = self.cost(key)
        bucket = cost.bucket(len(orders))
        started, self._busy_since, self._pass_s = time.perf_counter(), time.monotonic(), cost.predict(len(orders))
        try:
            padded = orders if bucket == len(orders) else orders + [mute(orders[-1])] * (bucket - len(orders))
            pixels = key.model.draw(key.steps, padded, key.first, key.strict)[: len(orders)]
        except BaseException as error:
            self._busy_since = None
            if _out_of_memory(error):
                return self._split(key, tickets)
            return self._tell(error, tickets)
        self._busy_since = None
        spent = time.perf_counter() - started
        self.turns += 1
        waits = [started - ticket.arrived for ticket in tickets]
        alone = len(tickets) == 1 and pixels.size <= SMALL and not len(self.batcher)
        for ticket, picture, wait in zip(tickets, pixels, waits, strict=True):
            facts = (wait, spent, self.turns, len(orders), bucket)
            if (finish := cast(Piece, ticket.order).finish) is None or (picture.size <= TINY and not alone):
                ticket.answer.set_result(_drawn(picture, None, 0.0, facts))
            elif alone:  # nobody waits for the device: changing threads would cost more than the encoding
                self._finish(ticket, picture, finish, facts)
            else:
                self.finishers.submit(self._finish, ticket, picture, finish, facts)
        cost.observe(len(orders), spent)
        self.metrics.batch(key.model.name, len(orders), bucket, waits, spent)

    def _finish(
        self, ticket: Ticket[Any, Any], picture: Pixels, finish: Callable[[Pixels], Any], facts: tuple[Any, ...]
    ) -> None:
        """In a thread of the finishers, so that the device works on; or here, when it has nothing to do."""
        started = time.perf_counter()
        try:
            file = finish(picture)
        except BaseException as error:
            return self._tell(error, [ticket])
        spent = time.perf_counter() - started
        ticket.answer.set_result(_drawn(picture, file, spent, facts))
        self.metrics.stage("encode", spent)

    def _split(self, key: Shape, tickets: Sequence[Ticket[Piece | None, Any]]) -> None:
        """The batch did not fit into memory: halves, and never so many again. A lone picture is told to come back."""
        self.metrics.out_of_memory(key.model.name)
        _free(self.device)
        log.warning("%d pictures of %s did not fit into memory", len(tickets), key.model.name)
        self.cost(key).halve(len(tickets))
        if len(tickets) == 1:
            return self._tell(overloaded("there is no memory for this picture now", 5, "out_of_memory"), tickets)
        middle = len(tickets) // 2
        self._draw(key, tickets[:middle])
        self._draw(key, tickets[middle:])

    def _tell(self, error: BaseException, tickets: Sequence[Ticket[Piece | None, Any]]) -> None:
        if not isinstance(error, BadInput | ApiError):
            log.error("a turn of %d failed", len(tickets), exc_info=error)
        if "CUDA error" in str(error):  # sticky: the context is lost; a supervisor should start the process anew
            self.broken = True
        for ticket in tickets:
            ticket.answer.set_exception(error)


CALL_S = 0.02  # a tile of a scene, for example
TINY = 3 * 64 * 64  # bytes of pixels that whoever waits for them encodes: each change of threads costs more
SMALL = 3 * 128 * 128  # bytes of pixels that are encoded in less than half a millisecond


def _drawn(picture: Pixels, file: Any, encode_s: float, facts: tuple[Any, ...]) -> Drawn:
    queue_s, forward_s, turn, batch, bucket = facts
    return Drawn(picture, file, queue_s, forward_s, encode_s, turn, batch, bucket)


def mute(order: Order) -> Order:
    """The same picture for nobody."""
    return replace(order, partial=None, shown=())


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
    """Pictures that wait, by model."""
    counts = dict[str, int]()
    for key, count in waiting.items():
        if isinstance(key, Shape):
            counts[key.model.name] = counts.get(key.model.name, 0) + count
    return counts


def shutting_down() -> ApiError:
    """503 for who is still waiting when the server ends."""
    return overloaded("the server is shutting down", 5, "shutting_down")
