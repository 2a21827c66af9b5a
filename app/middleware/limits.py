"""Limit the size of a request's body and the time it takes to arrive."""

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError
from app.middleware.request_log import path_of
from app.telemetry.metrics import Metrics

SLOWEST = 64 << 10  # bytes per second, at which a body of any size may go on arriving


class TooLarge(HTTPException):
    """The body exceeds the limit. It is an HTTPException, the only kind that FastAPI's parsing lets pass."""

    def __init__(self, limit: int, path: str) -> None:
        more = "; whole scenes are jobs: POST /v1/jobs/translations" if path.endswith("/images/translations") else ""
        super().__init__(413, f"the body is larger than {limit} bytes{more}")


class TooSlow(HTTPException):
    """The body did not arrive in time."""

    def __init__(self, seconds: float) -> None:
        message = f"the body did not arrive within {seconds:g} s and one second more for every {SLOWEST} bytes"
        super().__init__(408, message, {"Connection": "close"})


class BodyLimit:
    """Enforces the limits, as ASGI middleware (a BaseHTTPMiddleware would hide disconnects from the routes).

    Args:
        limit: bytes of a body.
        seconds: for a small body to arrive; a large one has longer, see SLOWEST.
        others: limits of paths that have their own.
    """

    def __init__(
        self, app: ASGIApp, limit: int, seconds: float, metrics: Metrics, others: Mapping[str, int] | None = None
    ) -> None:
        self.app, self.limit, self.seconds, self.metrics, self.others = app, limit, seconds, metrics, others or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a body by its Content-Length at once, and otherwise count its bytes as they arrive."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.others.get(path_of(scope), self.limit)
        declared = scope["record"].request_headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            self.metrics.rejected("content_too_large")
            too_large = ApiError(413, TooLarge(limit, scope["path"]).detail, code="content_too_large")
            return await too_large.response()(scope, receive, send)
        arrived, deadline = 0, asyncio.get_running_loop().time() + self.seconds
        more = True

        async def counted() -> Message:
            nonlocal arrived, more
            if not more:  # the body is complete: only a disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(deadline + arrived / SLOWEST):
                    message = await receive()
            except TimeoutError:
                self.metrics.rejected("request_timeout")
                raise TooSlow(self.seconds) from None
            more = message.get("more_body", False)
            arrived += len(message.get("body", b""))
            if arrived > limit:
                self.metrics.rejected("content_too_large")
                raise TooLarge(limit, scope["path"])
            return message

        await self.app(scope, counted, send)
