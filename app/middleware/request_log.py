"""One request from its first byte to the last of its answer: its id, whether it is let in, its log line, its numbers.

Model, seed and stages are read off the answer's own headers, so that no route has to tell them twice. What is logged is
bounded and ours: the route's template instead of the path, never a query, a prompt or a key.
"""

import logging
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
PROBES = frozenset(("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready", "/metrics"))
READING = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))


def path_of(scope: Scope) -> str:
    """The path as the routes know it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_work(scope: Scope) -> bool:
    """Whether it asks for something to be done: what a key's limits count, and what a closing server refuses."""
    return scope["type"] == "websocket" or scope["method"] not in READING


class Visit:
    """What is known of a request; `scope["visit"]`."""

    __slots__ = ("asked", "code", "ended", "headers", "id", "key", "left", "scope", "sent", "started")

    def __init__(self, scope: Scope) -> None:
        self.scope, self.asked = scope, dict(scope["headers"])
        given = self.asked.get(b"x-request-id", b"")
        self.id: str = (given if SANE_ID.fullmatch(given) else b"req-%s" % secrets.token_hex(8).encode()).decode()
        self.key: str | None = None  # the name of the caller's key
        self.started = time.perf_counter()
        self.code: int | None = None
        self.headers: dict[bytes, bytes] = {}  # of the answer
        self.sent = 0  # bytes of the answer's body
        self.ended = self.left = False

    @property
    def route(self) -> str:
        """The route's template: there are only so many."""
        if (route := self.scope.get("route")) is not None:
            return str(route.path)
        return "/static" if "app_root_path" in self.scope else "none"  # which only a mount sets

    @property
    def model(self) -> str:
        """The model that answered; "" where none did."""
        return unquote(self.headers.get(b"x-fewstep-model", b"").decode("latin-1"))

    def facts(self, seconds: float) -> Facts:
        """What the log and the traces tell."""
        return Facts(
            id=self.id,
            key=self.key,
            method=self.scope.get("method", "WS"),
            route=self.route,
            status=self.code,
            model=self.model or None,
            seed=self.headers.get(b"x-fewstep-seed", b"").decode("latin-1") or None,
            ms=round(1e3 * seconds, 3),
            bytes=self.sent,
        )


class Visits:
    """Pure ASGI, and the outermost: what it answers itself has a request id, too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, drain: Drain, tracing: Tracing | None = None) -> None:
        self.app, self.metrics, self.drain, self.tracing = app, metrics, drain, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets in, watches, and accounts for it, however it ends."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        visit = scope["visit"] = Visit(scope)

        async def arriving() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not visit.ended:
                visit.left = True
            return message

        async def leaving(message: Message) -> None:
            kind = message["type"]
            if kind.endswith(".start") or kind == "websocket.accept":
                visit.code = message.get("status", 101)
                headers = list(message.get("headers", ()))
                visit.headers = dict(headers)
                headers.append((b"x-request-id", visit.id.encode()))
                if self.drain.draining and kind == "http.response.start":
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            elif kind == "http.response.body":
                visit.sent += len(message.get("body", b""))
                visit.ended = not message.get("more_body", False)
            elif kind == "websocket.close" and visit.code is None:
                visit.code = 403
            await send(message)

        probe = path_of(scope) in PROBES
        held = 0 if probe or scope["type"] == "websocket" else 1
        self.drain.inflight += held
        try:
            if self.drain.draining and is_work(scope):
                self.metrics.rejected("shutting_down")
                await self.drain.refusal().response()(scope, arriving, leaving)
            else:
                await self.app(scope, arriving, leaving)
        except Exception:
            if visit.left:
                return
            log.exception("%s failed", visit.id)
            if visit.code is not None:
                raise  # too late for an answer: the server breaks it off
            await internal_error().response()(scope, arriving, leaving)
        finally:
            self.drain.inflight -= held
            self._account(visit, probe)

    def _account(self, visit: Visit, probe: bool) -> None:
        seconds = time.perf_counter() - visit.started
        if visit.code is None or visit.left:
            visit.code = 499
        is_http = visit.scope["type"] == "http"
        self.metrics.answered(visit.route, visit.model, visit.code, seconds if is_http else None)
        level = logging.DEBUG if probe else logging.WARNING if visit.code >= 500 else logging.INFO
        if log.isEnabledFor(level):
            # as log.log(), which would also look up the line that calls it, and take a third longer
            log.handle(log.makeRecord(log.name, level, "", 0, visit.facts(seconds), (), None))
        if self.tracing is not None and not probe:
            self.tracing.record(visit.facts(seconds), visit.scope["headers"], visit.headers, seconds)
