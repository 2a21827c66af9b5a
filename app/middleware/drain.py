"""How the service ends: SIGTERM turns away what is new, answers what was accepted, and only then stops the server.

The server's own handling of signals closes its sockets at once, so that who comes meanwhile is refused without a word
and a supervisor cannot read /readyz. Here the server hears of a signal when nothing is in flight any more. A second
signal ends the process at once.
"""

import asyncio
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from app.errors import ApiError, overloaded

log = logging.getLogger("fewstep.drain")


class Drain:
    """The door: who is inside, and whether anybody else may come in.

    Args:
        seconds: how long those inside are waited for at most.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.inflight = 0  # requests accepted and not answered yet, probes left out
        self._deadline: float | None = None

    @property
    def draining(self) -> bool:
        """Whether the process is about to end."""
        return self._deadline is not None

    def refusal(self) -> ApiError:
        """503 for who comes too late; by then another process, or this one's successor, may answer."""
        return overloaded("the server is shutting down", max(1, math.ceil(self._left())), "shutting_down")

    def begin(self) -> None:
        """From now on nobody is let in."""
        self._deadline = self._deadline or time.monotonic() + self.seconds

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT from the server that runs the loop; they reach it when everybody was answered."""
        before = _server_handlers()
        loop, ending = asyncio.get_running_loop(), list[asyncio.Task[None]]()  # the loop itself holds tasks weakly

        def take(number: int, frame: FrameType | None) -> None:
            if self.draining:
                os._exit(128 + number)
            self.begin()
            loop.call_soon_threadsafe(end, number)

        def end(number: int) -> None:
            log.info("%s: %d requests in flight", signal.Signals(number).name, self.inflight)
            ending.append(loop.create_task(self._end(before[number], number)))

        for number in before:
            signal.signal(number, take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _left(self) -> float:
        return 0.0 if self._deadline is None else self._deadline - time.monotonic()

    async def _end(self, handler: Any, number: int) -> None:
        while self.inflight and self._left() > 0:
            await asyncio.sleep(0.02)
        if self.inflight:
            log.warning("%d requests are given up after %g s", self.inflight, self.seconds)
        server = getattr(handler, "__self__", None)
        if not isinstance(server, uvicorn.Server):
            handler(number, None)
            return
        # asked, not signalled: a signal that uvicorn has seen it raises again at its end, and the exit would not be 0
        server.config.timeout_graceful_shutdown = max(1, math.ceil(self._left()))
        server.should_exit = True


def _server_handlers() -> dict[int, Any]:
    """What a server has installed; nothing in a thread that gets no signals, such as a test's."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {n: found for n, found in handlers.items() if callable(found) and found is not signal.default_int_handler}
