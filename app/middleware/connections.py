"""Guard a connection before its request reaches the application: how large its head is, and how long it takes.

uvicorn has no limit on a header with httptools, which copies an unfinished one at every piece that arrives, and none on
the time in which a request arrives. `fewstep serve` has it take this protocol; others pass `--http` with its name.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import ApiError

MOST_HEAD_BYTES = 64 << 10  # of a request line and its headers, or of what a body brings beside its bytes
SECONDS = "request_seconds"  # in the state that the application's lifespan gives
LINGER = 30.0  # seconds in which a caller who still sends may read a refusal


class _LingeringTransport:
    """Stands for a connection's transport where a request's answer is written, so that closing it may take a while."""

    def __init__(self, transport: asyncio.Transport, close: Any) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


class GuardedProtocol(HttpToolsProtocol):
    """Answers 431 to a head beyond 64 KiB, closes a connection that is slow, and lets a refusal be read.

    A refused body is read on and dropped while its sender may read the answer; of a refused head little more is read.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        # from the first moment of waiting for a request to the end of its head
        self.seconds: float = self.app_state.get(SECONDS, 30.0)
        self._lingering, self._answering = False, _LingeringTransport(transport, self._close_gently)
        self._bytes, self._too_large = 0, False  # bytes that have arrived since something was complete
        self._waits_since: float | None = self.loop.time()  # None while a request is answered, and between requests
        self._timer = self.loop.call_later(self.seconds, self._check_time)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, unless it is more than a head may hold."""
        if self._lingering:
            self._bytes += len(data)
            self._end_if_endless()
            return
        if self._waits_since is None and (self.cycle is None or self.cycle.response_complete):
            self._waits_since = self.loop.time()
        self._bytes += len(data)
        super().data_received(data)
        if (self._too_large or self._bytes > MOST_HEAD_BYTES) and not self.transport.is_closing():
            self._refuse()

    def on_headers_complete(self) -> None:
        """Hand on a request whose head is no larger than allowed."""
        if self._bytes > MOST_HEAD_BYTES:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            self._too_large = size > MOST_HEAD_BYTES
            if self._too_large:
                return  # `data_received` refuses it
        self._bytes, self._waits_since = 0, None
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = self._answering  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, which the application limits."""
        self._bytes = 0
        if not self._too_large:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Count the next request's head from its beginning."""
        self._bytes = 0
        if self._too_large:
            return
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # the rest of a body that was refused
            self.cycle.more_body, self._waits_since = False, None

    def on_response_complete(self) -> None:
        """Wait for the rest of a body that was refused, no longer than for a request."""
        self._waits_since = self.loop.time() if self.cycle.more_body and not self.pipeline else None
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the WebSocket's protocol, which has its own limits of time."""
        if not self._too_large:
            self._timer.cancel()
            super().handle_websocket_upgrade()

    def _refuse(self) -> None:
        """Answer 431, unless another answer is on its way."""
        self._too_large = True
        if self.cycle is None or self.cycle.response_complete:
            message = f"the request's line and headers are larger than {MOST_HEAD_BYTES} bytes"
            self._answer(ApiError(431, message, code="headers_too_large"))
            self._end_if_endless()
        else:
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Answer in the application's stead, and close."""
        response = error.response()
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[error.status], lines, bytes(response.body)))
        self._linger()

    def _close_gently(self) -> None:
        """Close the connection after an answer; at once if nothing more is to come."""
        if self.cycle.more_body and not self.transport.is_closing() and self.transport.can_write_eof():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Close one direction, and read what still arrives: a reset would take the answer from its reader."""
        self._lingering = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer.cancel()
        self._timer = self.loop.call_later(LINGER, self.transport.close)

    def _end_if_endless(self) -> None:
        """Close a connection whose head goes on and on, whether its sender has read the refusal or not."""
        if self._too_large and self._bytes > 2 * MOST_HEAD_BYTES:
            self.transport.close()

    def _check_time(self) -> None:
        """Close a connection that has waited for too long; otherwise look again when it may have."""
        now = self.loop.time()
        left = self.seconds if self._waits_since is None else self._waits_since + self.seconds - now
        if left > 0:
            self._timer = self.loop.call_later(left, self._check_time)
        elif self._bytes and (self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)):
            message = f"the request's headers did not arrive within {self.seconds:g} s"
            self._answer(ApiError(408, message, code="request_timeout"))
        else:
            self.transport.close()
