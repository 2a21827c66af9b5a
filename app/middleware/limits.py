"""The limits on a request's body, kept while it arrives: so many bytes are held, and so long is waited for them."""

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError
from app.middleware.request_log import path_of
from app.telemetry.metrics import Metrics

SLOWEST = 64 << 10  # bytes per second, at which a body of any size may go on arriving


class TooLarge(HTTPException):
    """The body passed the limit while it was read. FastAPI's parsing lets only an HTTPException pass."""

    def __init__(self, limit: int, path: str) -> None:
        more = "; whole scenes are jobs: POST /v1/jobs/translations" if path.endswith("/images/translations") else ""
        super().__init__(413, f"the body is larger than {limit} bytes{more}")


class TooSlow(HTTPException):
    """The body did not arrive in time."""

    def __init__(self, seconds: float) -> None:
        message = f"the body did not arrive within {seconds:g} s and one second more for every {SLOWEST} bytes"
        super().__init__(408, message, {"Connection": "close"})


class BodyLimit:
    """Pure ASGI, because a BaseHTTPMiddleware hides from the routes that the caller has left.

    Args:
        limit: bytes of a body.
        seconds: for a small body to arrive; a large one has longer, see SLOWEST.
        others: the limits of paths that have their own.
    """

    def __init__(
        self, app: ASGIApp, limit: int, seconds: float, metrics: Metrics, others: Mapping[str, int] | None = None
    ) -> None:
        self.app, self.limit, self.seconds, self.metrics, self.others = app, limit, seconds, metrics, others or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses by Content-Length at once, and counts what comes without one."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.others.get(path_of(scope), self.limit)
        declared = scope["visit"].asked.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            self.metrics.rejected("content_too_large")
            too_large = ApiError(413, TooLarge(limit, scope["path"]).detail, code="content_too_large")
            return await too_large.response()(scope, receive, send)
        arrived, deadline = 0, asyncio.get_running_loop().time() + self.seconds
        more = True

        async def counted() -> Message:
            nonlocal arrived, more
            if not more:  # all is here: what is waited for now is that the caller leaves
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
