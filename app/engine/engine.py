"""The face of the engine: who draws what. Callers live on the event loop and hand over orders; what comes back is
pixels, or what was made of them, and how long it took.

Behind it one worker for each device, and the store that keeps their models. Noise is the generator's own business: one
stream per seed, so a picture does not depend on its batch mates, its place among them, or the worker.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast

from starlette.requests import HTTPConnection

from app.engine.batcher import Closed, Expired, Full
from app.engine.model import Model, Order
from app.engine.store import Store
from app.engine.worker import Call, Drawn, Piece, Shape, Worker, by_model, shutting_down
from app.errors import ApiError, overloaded, unknown_model
from app.media.images import Pixels
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

__all__ = ["Drawn", "Engine", "Order", "engine_of"]
T = TypeVar("T")


class Engine:
    """Models by name, behind a worker for each device. `start()` returns at once; `ready` says when all are open."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings, self.metrics = settings, metrics or Metrics()
        self.codec = ThreadPoolExecutor(settings.codec_threads, "fewstep-codec")
        devices = settings.device.split(",")
        self.workers = [Worker(device, settings, self.metrics, self.codec) for device in devices]
        self.store = Store(settings, self.workers, self.metrics)

    def start(self) -> None:
        """Opens the models in the background."""
        for worker in self.workers:
            worker.thread.start()
        self.store.thread.start()

    def stop(self) -> None:
        """Ends the batches at work, or lets go of the models being opened; who still waits is told so."""
        self.store.close()
        for worker in self.workers:
            worker.batcher.close()
        for worker in self.workers:
            worker.thread.join(timeout=30)
        self.store.thread.join(timeout=30 if self.opened else 1)
        self.codec.shutdown(wait=False, cancel_futures=True)

    # -- what it is at -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """Of scenes and benchmarks: the first."""
        return self.workers[0].device

    @property
    def models(self) -> dict[str, Model]:
        """The open ones."""
        return self.workers[0].models

    @property
    def opened(self) -> bool:
        """Whether every folder that was there at the start has been tried."""
        return self.store.opened

    @property
    def failed(self) -> list[str]:
        """Folders that could not be opened; the log says why, with paths and all."""
        return self.store.failed

    @property
    def alive(self) -> bool:
        """False when the thread of a device has died: its orders will not be answered any more."""
        return all(worker.alive for worker in self.workers)

    @property
    def stuck(self) -> bool:
        """A forward pass runs for longer than any should: the device hangs."""
        return any(worker.stuck for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Every folder was tried, at least one is open and warm."""
        return self.alive and self.opened and bool(self.models)

    @property
    def inflight(self) -> int:
        """Images waiting or being drawn."""
        return sum(len(worker.batcher) + worker.inflight for worker in self.workers)

    def waiting(self) -> dict[str, int]:
        """Images queued, by model; 0 for those that nobody asks."""
        counts = dict.fromkeys(self.models, 0)
        for worker in self.workers:
            for name, count in by_model(worker.batcher.waiting()).items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def backlog_s(self) -> float:
        """Predicted seconds until an order that comes now begins."""
        return min(worker.backlog_s() for worker in self.workers)

    # -- which model -------------------------------------------------------------------------------------------------

    def named(self, name: str) -> Model:
        """The open model of that name."""
        if name in self.models:
            return self.models[name]
        slot = self.store.slots.get(name)
        if not self.opened or (slot is not None and slot.state == "opening"):
            raise overloaded("the models are being opened", 2, "model_loading")
        if slot is not None and slot.state == "unloaded":
            raise overloaded(f"{name} is not loaded", 2, "model_not_loaded")
        raise unknown_model(name, list(self.models))

    def choose(self, name: str | None, fitting: Callable[[Model], bool]) -> Model:
        """The model of a request: by name; or of those that fit the only one, the configured one, the only student."""
        if name is not None:
            return self.named(name)
        if not self.opened:
            raise overloaded("the models are being opened", 2, "model_loading")
        candidates = [model for model in self.models.values() if fitting(model)]
        default = [model for model in candidates if model.name == self.settings.default_model]
        students = [model for model in candidates if model.info.role == "student"]
        for choice in (candidates, default, students):
            if len(choice) == 1:
                return choice[0]
        raise BadInput("model", None, ", ".join(model.name for model in candidates) or "none is served for this task")

    async def open_for(self, name: str | None, fitting: Callable[[Model], bool]) -> Model:
        """The same, and a model that was put away for want of memory is opened again first."""
        slot = self.store.slots.get(name) if name is not None else None
        if self.opened and slot is not None and slot.state == "unloaded" and not slot.kept_out:
            await asyncio.wrap_future(self.store.load(slot.name))
        return self.choose(name, fitting)

    async def load(self, name: str) -> Model:
        """Opens a folder that was unloaded, failed or changed; BadInput for one that cannot be opened."""
        self._known(name)
        await asyncio.wrap_future(self.store.load(name))
        return self.named(name)

    async def unload(self, name: str) -> None:
        """Puts a model away until `load`."""
        self._known(name)
        await asyncio.wrap_future(self.store.unload(name))

    def _known(self, name: str) -> None:
        if not self.opened:
            raise overloaded("the models are being opened", 2, "model_loading")
        if name not in self.store.slots:
            raise unknown_model(name, list(self.store.slots))

    # -- work --------------------------------------------------------------------------------------------------------

    async def draw(
        self,
        model: Model,
        steps: int,
        orders: Sequence[Order],
        height: int,
        width: int,
        *,
        first: int = 0,
        strict: bool = False,
        deadline: float | None = None,
        finish: Callable[[Pixels], Any] | None = None,
    ) -> list[Drawn]:
        """The pictures, in the sequence of the orders. If the caller is cancelled, what still waits is never drawn.

        Args:
            first: steps left out at the beginning, for orders that begin from a picture.
            strict: the reference backend, one picture at a time.
            deadline: time.perf_counter() by which a turn must have begun.
            finish: called with each picture in a thread of the finishers.

        Raises:
            ApiError: 503 for a full queue or a server that ends, 504 when the deadline passed, or surely will.
        """
        worker, own = self._least_loaded(model)
        model.used = time.monotonic()
        started = orders[0].start is not None
        student_of = own.info.student_of
        pieces = [
            (
                Shape(own, steps, height, width, student_of(order.label), first, strict, started),
                Piece(order, finish),
            )
            for order in orders
        ]
        if deadline is not None and time.perf_counter() + worker.backlog_s() > deadline:
            raise late()
        drawn: list[Drawn] = await self._ask(worker, pieces, deadline)
        return drawn if finish is None else [self._finished(one, finish) for one in drawn]

    def _finished(self, drawn: Drawn, finish: Callable[[Pixels], Any]) -> Drawn:
        """Tiny pictures come back as pixels: see `worker.TINY`."""
        if drawn.file is not None:
            return drawn
        started = time.perf_counter()
        file = finish(drawn.pixels)
        spent = time.perf_counter() - started
        self.metrics.stage("encode", spent)
        return replace(drawn, file=file, encode_s=spent)

    async def decode(self, function: Callable[..., T], *given: Any) -> T:
        """Reads what a caller has sent, in a thread of the finishers."""

        def timed() -> T:
            started = time.perf_counter()
            try:
                return function(*given)
            finally:
                self.metrics.stage("decode", time.perf_counter() - started)

        return await asyncio.get_running_loop().run_in_executor(self.codec, timed)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the first device's thread, in its turn."""
        return (await self._ask(self.workers[0], [(Call(function), None)], None))[0]

    def run(self, function: Callable[[], T]) -> T:
        """The same for another thread, which waits for the result, and before it for as long as the queue is full."""
        return self.workers[0].run(function)

    def _least_loaded(self, model: Model) -> tuple[Worker, Model]:
        if len(self.workers) == 1:
            return self.workers[0], model
        return min(zip(self.workers, model.siblings, strict=True), key=lambda pair: pair[0].backlog_s())

    async def _ask(
        self, worker: Worker, pieces: Sequence[tuple[Shape | Call, Piece | None]], deadline: float | None
    ) -> list[Any]:
        try:
            futures = worker.batcher.put(pieces, deadline)
        except Full as full:
            message = f"{len(worker.batcher)} pictures wait already"
            raise overloaded(message, max(1, math.ceil(full.seconds))) from None
        except Closed:
            raise shutting_down() from None
        try:
            await _all(futures)
            failed = next((future for future in futures if future.done() and future.exception()), None)
            return [future.result() for future in ([failed] if failed else futures)]
        except Closed:
            raise shutting_down() from None
        except Expired:
            raise late() from None
        except asyncio.CancelledError:
            left = sum(future.cancel() or future.cancelled() for future in futures)
            self.metrics.cancelled("queue", left)
            self.metrics.cancelled("forward", sum(not future.done() for future in futures))
            raise
        finally:
            for future in futures:
                future.cancel()  # those that were answered are not touched by it


def _all(futures: Sequence[Future[Any]]) -> asyncio.Future[None]:
    """Done when all are, or one has failed. The loop is woken once, where asyncio.wrap_future would for every one."""
    loop = asyncio.get_running_loop()
    waiter, done = loop.create_future(), list[None]()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def answered(future: Future[Any]) -> None:
        done.append(None)
        if len(done) >= len(futures) or future.cancelled() or future.exception() is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(wake)

    for future in futures:
        future.add_done_callback(answered)
    return waiter


def engine_of(connection: HTTPConnection) -> Engine:
    """Return the engine of the application that a request or a WebSocket came to."""
    return cast(Engine, connection.app.state.engine)


def late() -> ApiError:
    """504: nobody would have waited for the picture."""
    message = "the deadline passed before the picture's turn came"
    return ApiError(504, message, param="timeout_ms", code="deadline_exceeded")
