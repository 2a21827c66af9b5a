"""The one thread that touches the device: it opens the models, pulls batches, draws, and answers every order.

Callers live on the event loop and hand over orders; what comes back is pixels (uint8) and how long they took. Noise is
the generator's own business: one stream per seed, so a picture does not depend on its batch mates.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from app.engine.batcher import Batcher, Closed, Full, Ticket
from app.engine.model import Model
from app.errors import overloaded, unknown_model
from app.images import Pixels
from app.settings import Settings
from distillers.errors import BadInput

T = TypeVar("T")
log = logging.getLogger("fewstep.engine")


@dataclass(frozen=True)
class Shape:
    """What pictures of one forward pass must share."""

    model: str
    steps: int
    height: int
    width: int
    student: int = 0  # of a folder of several: nobody waits for another student's pass within their own


@dataclass(frozen=True, eq=False)
class Call:
    """Work of another kind, alone in its turn on the engine's thread."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Order:
    """One picture to draw."""

    seed: int
    label: int | None = None
    sar: NDArray[np.float32] | None = None  # (channels, H, W) in [-1, 1]


@dataclass(frozen=True)
class Drawn:
    """One picture, drawn."""

    pixels: Pixels  # (H, W, 3)
    queue_s: float
    forward_s: float  # of the whole batch
    turn: int  # number of the forward pass
    batch: int  # pictures in it


class Engine:
    """Models by name, behind one batcher and one thread. `start()` returns at once; `ready` says when all are open."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.models: dict[str, Model] = {}
        self.failed: list[str] = []  # folders that could not be opened; the log says why, with paths and all
        self.opened = False
        self.codec = ThreadPoolExecutor(settings.codec_threads, "fewstep-codec")
        self._batcher: Batcher[Shape | Call, Order | None, Any] = Batcher(settings.queue_limit, self._largest)
        self._thread = threading.Thread(target=self._run, name="fewstep-engine", daemon=True)
        self._turns = 0
        self._seconds_per_image = 0.1  # measured at work, for Retry-After

    # -- the caller's side: the event loop -------------------------------------------------------------------------

    def start(self) -> None:
        """Opens the models in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the batch at work, or lets go of the models being opened; who still waits is told so."""
        self._batcher.close()
        self._thread.join(timeout=30 if self.opened else 1)
        self.codec.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """False when the engine's thread has died: nothing will be answered any more."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Every folder was tried, at least one is open and warm."""
        return self.alive and self.opened and bool(self.models)

    def named(self, name: str) -> Model:
        """The model of that name."""
        if name in self.models:
            return self.models[name]
        if not self.opened:
            raise overloaded("the models are being opened", 2, "model_loading")
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

    async def draw(self, model: Model, steps: int, orders: Sequence[Order], height: int, width: int) -> list[Drawn]:
        """The pictures, in the sequence of the orders. If the caller is cancelled, what still waits is never drawn."""
        keys = [Shape(model.name, steps, height, width, model.info.student_of(order.label)) for order in orders]
        return cast(list[Drawn], await self._ask(list(zip(keys, orders, strict=True))))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the engine's thread, in its turn."""
        return (await self._ask([(Call(function), None)]))[0]

    def run(self, function: Callable[[], T]) -> T:
        """The same for another thread, which waits for the result, and before it for as long as the queue is full."""
        while True:
            try:
                (future,) = self._batcher.put([(Call(function), None)])
            except Full:  # a caller would be sent away; work of our own gives way
                time.sleep(0.02)
                continue
            except Closed:
                raise overloaded("the server is shutting down", 5, "shutting_down") from None
            try:
                return cast(T, future.result())
            except Closed:
                raise overloaded("the server is shutting down", 5, "shutting_down") from None

    async def _ask(self, orders: Sequence[tuple[Shape | Call, Order | None]]) -> list[Any]:
        try:
            futures = self._batcher.put(orders)
        except Full:
            seconds = math.ceil(len(self._batcher) * self._seconds_per_image)
            raise overloaded(f"{len(self._batcher)} pictures wait already", max(1, seconds)) from None
        except Closed:
            raise overloaded("the server is shutting down", 5, "shutting_down") from None
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except Closed:
            raise overloaded("the server is shutting down", 5, "shutting_down") from None
        finally:
            for future in futures:
                future.cancel()  # those that were answered are not touched by it

    # -- the engine's side: its thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._open_all()
        except Exception:
            log.exception("the models could not be opened")
        self.opened = True
        while (turn := self._batcher.take()) is not None:
            self._serve(*turn)

    def _open_all(self) -> None:
        import torch

        from distillers.weights import find

        if self.settings.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, folder in sorted(find(self.settings.weights).items()):
            if self._batcher.closed:
                return
            started = time.perf_counter()
            try:
                model = Model.open(name, folder, self.device, self.settings.max_steps)
                self._warm(model)
            except BadInput as error:  # one bad folder must not keep the others from being served
                self.failed.append(name)
                log.error("%s is not served: %s", name, error)
                continue
            except Exception:
                self.failed.append(name)
                log.exception("%s is not served", name)
                continue
            self.models = {**self.models, name: model}  # others may be iterating over the old one
            log.info("%s is open on %s after %.1f s", name, self.device, time.perf_counter() - started)

    def _warm(self, model: Model) -> None:
        """One picture by each network, so that the first caller does not pay for what is only done once."""
        height, width = model.info.size
        sar = model.sees(np.zeros((height, width), np.float32)) if model.translates else None
        first = [share[0] for share in model.info.shares] or model.info.classes[:1]
        for label in first or (None,):
            self._forward(model, min(model.steps or [1]), [Order(0, label, sar)])

    def _largest(self, key: Shape | Call) -> int:
        """Pictures in one forward pass: limited by number and, so that memory is, by pixels."""
        if isinstance(key, Call):
            return 1
        return max(1, min(self.settings.max_batch, self.settings.max_pixels // (key.height * key.width)))

    def _serve(self, key: Shape | Call, tickets: Sequence[Ticket[Order | None, Any]]) -> None:
        """One turn: every ticket is answered, with an error if that is how it ends, and the engine lives on."""
        started = time.perf_counter()
        try:
            if isinstance(key, Call):
                answers = [key.function()]
            else:
                orders = [cast(Order, ticket.order) for ticket in tickets]
                pixels = self._forward(self.models[key.model], key.steps, orders)
                seconds = time.perf_counter() - started
                self._turns += 1
                self._seconds_per_image += 0.1 * (seconds / len(tickets) - self._seconds_per_image)
                waits = [started - ticket.arrived for ticket in tickets]
                answers = [
                    Drawn(picture, wait, seconds, self._turns, len(tickets))
                    for picture, wait in zip(pixels, waits, strict=True)
                ]
        except Exception as error:
            if not isinstance(error, BadInput):
                log.exception("a turn of %d failed", len(tickets))
            for ticket in tickets:
                ticket.answer.set_exception(error)
            return
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.answer.set_result(answer)

    def _forward(self, model: Model, steps: int, orders: Sequence[Order]) -> Pixels:
        """(B, H, W, 3) uint8 for B orders of one shape."""
        import torch

        labels = [order.label for order in orders if order.label is not None] or None
        bands = [order.sar for order in orders if order.sar is not None]
        sar = torch.from_numpy(np.stack(bands)).to(self.device) if bands else None
        with torch.inference_mode():
            images = model.generator.sample([order.seed for order in orders], labels=labels, sar=sar, steps=steps)
            levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return cast(Pixels, levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
