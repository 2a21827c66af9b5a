"""Drain the server: after SIGTERM, refuse new requests, answer those accepted, and only then stop.

The server's own handling of signals closes its sockets at once, so that new callers get no answer and a supervisor
cannot read /readyz. Here the signal reaches the server when no request is in flight any more. What takes too long is
given up shortly before the time is over, and a thread that does not hear of it is left: the process ends with 0 in any
case. A second signal ends it at once.
"""

import asyncio
import atexit
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from app.errors import ApiError, overloaded

log = logging.getLogger("fewstep.drain")
MARGIN = 0.2, 3.0  # of the seconds and at most, that are left for the end when requests are given up
LEAST = 2.0  # seconds that any end may take


class Drain:
    """Counts the requests in flight, and knows whether new ones are accepted.

    Args:
        seconds: until the process has ended, at most.
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
    def on_signals(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Take over SIGTERM and SIGINT from the server; they reach it when all requests were answered.

        Args:
            give_up: stops the work for requests that take too long, which are then answered with an error.
        """
        before = _server_handlers()
        loop, ending = asyncio.get_running_loop(), list[asyncio.Task[None]]()  # the loop itself holds tasks weakly

        def take(number: int, frame: FrameType | None) -> None:
            if self.draining:
                os._exit(128 + number)
            self.begin()
            loop.call_soon_threadsafe(end, number)

        def end(number: int) -> None:
            log.info("%s: %d requests in flight", signal.Signals(number).name, self.inflight)
            atexit.register(_leave)
            last = threading.Timer(max(LEAST, self.seconds), _leave)
            last.daemon = True
            last.start()
            ending.append(loop.create_task(self._end(before[number], number, give_up)))

        for number in before:
            signal.signal(number, take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _left(self) -> float:
        return 0.0 if self._deadline is None else self._deadline - time.monotonic()

    async def _end(self, handler: Any, number: int, give_up: Callable[[], None]) -> None:
        margin = min(MARGIN[0] * self.seconds, MARGIN[1])
        while self.inflight and self._left() > margin:
            await asyncio.sleep(0.02)
        if self.inflight:
            log.warning("%d requests are given up, %g s before the end", self.inflight, margin)
            give_up()
        server = getattr(handler, "__self__", None)
        if not isinstance(server, uvicorn.Server):
            handler(number, None)
            return
        # asked, not signalled: a signal that uvicorn has seen it raises again at its end, and the exit would not be 0
        server.config.timeout_graceful_shutdown = max(1, math.ceil(self._left()))
        server.should_exit = True


def _leave() -> None:
    """End the process with 0, also where a thread in a library's call would abort the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _server_handlers() -> dict[int, Any]:
    """Return the signal handlers that the server has installed; {} in a thread that gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {n: found for n, found in handlers.items() if callable(found) and found is not signal.default_int_handler}
