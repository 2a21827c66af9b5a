"""Give every request an id, a log line, its metrics and its trace, and refuse it while the server drains.

Model, seed and stages are read from the answer's own headers, so that routes state them once. The log holds only
values of bounded size: the route's template instead of the path, never a query, a prompt or a key.
"""

import logging
import random
import re
import secrets
import time
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import internal_error
from app.middleware.drain import Drain
from app.telemetry.logs import Facts
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing

log = logging.getLogger("fewstep.request")
SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
random_bits = random.Random(secrets.randbits(256)).getrandbits  # an id is no secret, and the system's source is slow
PROBES = frozenset(("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready", "/metrics"))
READING = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))


def path_of(scope: Scope) -> str:
    """Return the path without the prefix under which the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_work(scope: Scope) -> bool:
    """Return whether a request asks for work, which a key's limits count and a draining server refuses."""
    return scope["type"] == "websocket" or scope["method"] not in READING


class RequestRecord:
    """Records what is known of one request, as `scope["record"]`."""

    def __init__(self, scope: Scope) -> None:
        self.scope, self.request_headers = scope, dict(scope["headers"])
        given = self.request_headers.get(b"x-request-id", b"")
        self.id: str = (given if SANE_ID.fullmatch(given) else b"req-%016x" % random_bits(64)).decode()
        self.key: str | None = None  # the name of the caller's key
        self.started = time.perf_counter()
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}  # of the answer
        self.bytes_sent = 0  # of the answer's body
        self.ended = self.disconnected = False

    @property
    def route(self) -> str:
        """Return the route's template, of which there is a fixed number; "none" for an unknown path."""
        if (route := self.scope.get("route")) is not None:
            return str(route.path)
        return "/static" if "app_root_path" in self.scope else "none"  # only a mount sets it

    @property
    def model(self) -> str:
        """Return the name of the model that answered; "" where none did."""
        return unquote(self.headers.get(b"x-fewstep-model", b"").decode("latin-1"))

    def facts(self, seconds: float) -> Facts:
        """Return the fields of the log line and of the trace."""
        return Facts(
            id=self.id,
            key=self.key,
            method=self.scope.get("method", "WS"),
            route=self.route,
            status=self.status,
            model=self.model or None,
            seed=self.headers.get(b"x-fewstep-seed", b"").decode("latin-1") or None,
            ms=round(1e3 * seconds, 3),
            bytes=self.bytes_sent,
        )


class RequestLog:
    """Logs requests as the outermost ASGI middleware, so that every answer has a request id."""

    def __init__(self, app: ASGIApp, metrics: Metrics, drain: Drain, tracing: Tracing | None = None) -> None:
        self.app, self.metrics, self.drain, self.tracing = app, metrics, drain, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it while draining, and account for it however it ends."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        record = scope["record"] = RequestRecord(scope)

        async def watch_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.ended:
                record.disconnected = True
            return message

        async def watch_send(message: Message) -> None:
            kind = message["type"]
            if kind.endswith(".start") or kind == "websocket.accept":
                record.status = message.get("status", 101)
                headers = list(message.get("headers", ()))
                record.headers = dict(headers)
                headers.append((b"x-request-id", record.id.encode()))
                if self.drain.draining and kind == "http.response.start":
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            elif kind == "http.response.body":
                record.bytes_sent += len(message.get("body", b""))
                record.ended = not message.get("more_body", False)
            elif kind == "websocket.close" and record.status is None:
                record.status = 403
            await send(message)

        is_probe = path_of(scope) in PROBES
        counted = 0 if is_probe or scope["type"] == "websocket" else 1
        self.drain.inflight += counted
        try:
            if self.drain.draining and is_work(scope):
                self.metrics.rejected("shutting_down")
                await self.drain.refusal().response()(scope, watch_receive, watch_send)
            else:
                await self.app(scope, watch_receive, watch_send)
        except Exception:
            if record.disconnected:
                return
            log.exception("%s failed", record.id)
            if record.status is not None:
                raise  # the answer has begun: the server breaks it off
            await internal_error().response()(scope, watch_receive, watch_send)
        finally:
            self.drain.inflight -= counted
            self._account(record, is_probe)

    def _account(self, record: RequestRecord, is_probe: bool) -> None:
        """Write a request that has ended to the metrics, the log and the trace."""
        seconds = time.perf_counter() - record.started
        if record.status is None or record.disconnected:
            record.status = 499
        is_http = record.scope["type"] == "http"
        self.metrics.answered(record.route, record.model, record.status, seconds if is_http else None)
        level = logging.DEBUG if is_probe else logging.WARNING if record.status >= 500 else logging.INFO
        if log.isEnabledFor(level):
            # log.log() would also look up the line that calls it, and take a third longer
            log.handle(log.makeRecord(log.name, level, "", 0, record.facts(seconds), (), None))
        if self.tracing is not None and not is_probe:
            self.tracing.record(record.facts(seconds), record.scope["headers"], record.headers, seconds)
