"""The engine takes orders from the event loop and returns pictures, encoded by the caller's function, and their times.

It has a worker for each device and the store of their models. Each seed has its own stream of noise, so a picture does
not depend on the others in its batch, its place among them, or the worker.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast

from starlette.requests import HTTPConnection

from app.engine.batcher import Closed, Full
from app.engine.lanes import Lane
from app.engine.model import Model, Order
from app.engine.store import Store
from app.engine.styles import chosen
from app.engine.worker import BatchKey, Picture, Task, Worker, by_model
from app.errors import deadline_exceeded, overloaded, shutting_down, unknown_model
from app.media.image_files import Pixels
from app.settings import Settings
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

__all__ = ["Engine", "Order", "Picture", "engine_of"]
T = TypeVar("T")


class Engine:
    """Serves models by name on every device. `start` returns at once; `ready` says when all are open."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings, self.metrics = settings, metrics or Metrics()
        self.codec = ThreadPoolExecutor(settings.codec_threads, "fewstep-codec")
        devices = settings.device.split(",")
        self.workers = [Worker(device, settings, self.metrics, self.codec) for device in devices]
        self.store = Store(settings, self.workers, self.metrics)

    def start(self) -> None:
        """Start the threads, which open the models in the background."""
        for worker in self.workers:
            worker.thread.start()
        self.store.thread.start()

    def close(self) -> None:
        """Take no more orders, and end passes at their next step; waiting callers get 503."""
        self.store.close()
        for worker in self.workers:
            worker.batcher.close()

    def stop(self) -> None:
        """Close, and wait for the threads, but not for one that is deep in a library's call."""
        self.close()
        for worker in self.workers:
            worker.thread.join(timeout=30)
        self.store.thread.join(timeout=30 if self.opened else 1)
        self.codec.shutdown(wait=False, cancel_futures=True)

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """Return the first device, which runs scenes and benchmarks."""
        return self.workers[0].device

    @property
    def models(self) -> dict[str, Model]:
        """Return the open models by name."""
        return self.workers[0].models

    @property
    def opened(self) -> bool:
        """Return whether every folder that was there at the start has been tried."""
        return self.store.opened

    @property
    def failed(self) -> list[str]:
        """Return the names of folders that could not be opened."""
        return self.store.failed

    @property
    def alive(self) -> bool:
        """Return whether the threads of all devices still answer orders."""
        return all(worker.alive for worker in self.workers)

    @property
    def stuck(self) -> bool:
        """Return whether a forward pass runs for so long that its device must hang."""
        return any(worker.stuck for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Return whether every folder was tried and at least one is open and warmed up."""
        return self.alive and self.opened and bool(self.models)

    @property
    def inflight(self) -> int:
        """Count the images that wait or are being drawn."""
        return sum(len(worker.batcher) + worker.inflight for worker in self.workers)

    def waiting(self) -> dict[str, int]:
        """Count queued images by model; a model without any counts 0."""
        counts = dict.fromkeys(self.models, 0)
        for worker in self.workers:
            for name, count in by_model(worker.batcher.waiting()).items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def backlog_s(self) -> float:
        """Predict the seconds until an order that comes now begins."""
        return min(worker.backlog_s() for worker in self.workers)

    # -- models ------------------------------------------------------------------------------------------------------

    def named(self, name: str) -> Model:
        """Return the open model of a name or alias. ApiError 404 for an unknown one, 503 for one that is not open."""
        name = self.settings.model_aliases.get(name, name)
        if name in self.models:
            return self.models[name]
        slot = self.store.slots.get(name)
        if not self.opened or (slot is not None and slot.state == "opening"):
            raise overloaded("the models are being opened", 2, "model_loading")
        if slot is not None and slot.state == "unloaded":
            raise overloaded(f"{name} is not loaded", 2, "model_not_loaded")
        raise unknown_model(name, list(self.models))

    def choose(self, name: str | None, fitting: Callable[[Model], bool]) -> Model:
        """Return the named model; without a name, of those that fit, the only one, the default or the only student."""
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
        """Choose a model, and open it first if it was unloaded for want of memory."""
        name = self.settings.model_aliases.get(name, name) if name is not None else None
        slot = self.store.slots.get(name) if name is not None else None
        if self.opened and slot is not None and slot.state == "unloaded" and not slot.stays_unloaded:
            await asyncio.wrap_future(self.store.load(slot.name))
        return self.choose(name, fitting)

    async def load(self, name: str) -> Model:
        """Open a folder that was unloaded, failed or changed. BadInput for one that cannot be opened."""
        self._known(name)
        await asyncio.wrap_future(self.store.load(name))
        return self.named(name)

    async def unload(self, name: str) -> None:
        """Free a model's memory until `load`."""
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
    ) -> list[Picture]:
        """Draw the pictures, in the sequence of the orders. Those that wait when the caller is cancelled are not drawn.

        Args:
            first: steps left out at the beginning, for orders that start from a picture.
            strict: the reference backend, one picture at a time.
            deadline: time.perf_counter() by which all must be drawn and encoded.
            finish: called with each picture, usually in a thread of the finishers.

        Raises:
            BadInput: LoRAs that this server or this model does not have.
            ApiError: 503 for a full queue or a server that ends, 504 when the deadline passes.
        """
        worker, own = self._least_loaded(model)
        model.used = time.monotonic()
        from_picture, student_of, loras = orders[0].start is not None, own.info.student_of, orders[0].loras
        style = (
            await self.decode(own.style, chosen(self.settings.loras, [name for name, _ in loras])) if loras else None
        )

        def key(order: Order) -> BatchKey:
            return BatchKey(
                own, steps, height, width, student_of(order.label), first, strict, from_picture, style, loras
            )

        tasks = [(key(order), Task(order, finish)) for order in orders]
        pictures: list[Picture] = await self._submit(worker, tasks, deadline)
        return pictures if finish is None else [self._finish(picture, finish) for picture in pictures]

    def _finish(self, picture: Picture, finish: Callable[[Pixels], Any]) -> Picture:
        """Encode a tiny picture, which comes back as pixels: see `worker.TINY`."""
        if picture.file is not None:
            return picture
        started = time.perf_counter()
        file = finish(picture.pixels)
        spent = time.perf_counter() - started
        self.metrics.stage("encode", spent)
        return replace(picture, file=file, encode_s=spent)

    async def decode(self, function: Callable[..., T], *given: Any) -> T:
        """Run a decoding function in a thread of the finishers."""

        def timed() -> T:
            started = time.perf_counter()
            try:
                return function(*given)
            finally:
                self.metrics.stage("decode", time.perf_counter() - started)

        return await asyncio.get_running_loop().run_in_executor(self.codec, timed)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function on the first device's thread, in its turn."""
        return await asyncio.to_thread(self.lane().turn, function)

    def lane(self, check: Callable[[], None] | None = None, limit_s: float = math.inf) -> Lane:
        """Return a lane on the first device, for work that can wait: see `Lane`."""
        return self.workers[0].lane(check, limit_s)

    def _least_loaded(self, model: Model) -> tuple[Worker, Model]:
        if len(self.workers) == 1:
            return self.workers[0], model
        return min(zip(self.workers, model.replicas, strict=True), key=lambda pair: pair[0].load_s())

    async def _submit(
        self, worker: Worker, tasks: Sequence[tuple[BatchKey, Task]], deadline: float | None
    ) -> list[Any]:
        try:
            futures = worker.batcher.put(tasks)
        except Full as full:
            message = f"{len(worker.batcher)} pictures wait already"
            raise overloaded(message, max(1, math.ceil(full.seconds + worker.inflight_s()))) from None
        except Closed:
            raise shutting_down() from None
        try:
            await in_time(_all(futures), deadline)
            failed = next((future for future in futures if future.done() and future.exception()), None)
            return [future.result() for future in ([failed] if failed else futures)]
        except Closed:
            raise shutting_down() from None
        finally:
            for (_, task), future in zip(tasks, futures, strict=True):
                task.left = True
                if not future.done():
                    self.metrics.cancelled("queue" if future.cancel() else "forward", 1)


def _all(futures: Sequence[Future[Any]]) -> asyncio.Future[None]:
    """Return a future done when all are, or one has failed. It wakes the loop once, not for every one of them."""
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


async def in_time(work: Awaitable[T], deadline: float | None) -> T:
    """Wait for work until a time.perf_counter(), if one is given. ApiError 504 when that passes first."""
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout(deadline - time.perf_counter()):
            return await work
    except TimeoutError:
        raise deadline_exceeded() from None


def engine_of(connection: HTTPConnection) -> Engine:
    """Return the engine of the application that a request or a WebSocket came to."""
    return cast(Engine, connection.app.state.engine)
