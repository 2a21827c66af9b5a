"""The limit on a request's body, kept while it arrives, so that no more than the limit is ever held."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError


class TooLarge(HTTPException):
    """The body passed the limit while it was read. FastAPI's parsing lets only an HTTPException pass."""

    def __init__(self, limit: int, path: str) -> None:
        more = "; whole scenes are jobs: POST /v1/jobs/translations" if path.endswith("/images/translations") else ""
        super().__init__(413, f"the body is larger than {limit} bytes{more}")


class BodyLimit:
    """Pure ASGI, because a BaseHTTPMiddleware hides from the routes that the caller has left.

    Args:
        limit: bytes of a body.
        others: the limits of paths that have their own.
    """

    def __init__(self, app: ASGIApp, limit: int, others: Mapping[str, int] | None = None) -> None:
        self.app, self.limit, self.others = app, limit, others or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses by Content-Length at once, and counts what comes without one."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.others.get(scope["path"].removeprefix(scope.get("root_path", "")), self.limit)
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            too_large = ApiError(413, TooLarge(limit, scope["path"]).detail, code="content_too_large")
            return await too_large.response()(scope, receive, send)
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > limit:
                raise TooLarge(limit, scope["path"])
            return message

        await self.app(scope, counted, send)
