"""Drain the server: after SIGTERM, refuse new requests, answer those accepted, and only then stop.

The server's own handling of signals closes its sockets at once, so that new callers get no answer and a supervisor
cannot read /readyz. Here the signal reaches the server when no request is in flight any more. A second signal ends the
process at once.
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
    """Counts the requests in flight, and knows whether new ones are accepted.

    Args:
        seconds: how long requests in flight are waited for at most.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.inflight = 0  # requests accepted and not answered yet, without probes
        self._deadline: float | None = None

    @property
    def draining(self) -> bool:
        """Return whether the process is about to end and refuses new requests."""
        return self._deadline is not None

    def refusal(self) -> ApiError:
        """Return the 503 for new requests, with the seconds after which another process may answer."""
        return overloaded("the server is shutting down", max(1, math.ceil(self._left())), "shutting_down")

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self._deadline = self._deadline or time.monotonic() + self.seconds

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take over SIGTERM and SIGINT from the server; they reach it when all requests were answered."""
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
    """Return the signal handlers that the server has installed; {} in a thread that gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {n: found for n, found in handlers.items() if callable(found) and found is not signal.default_int_handler}
