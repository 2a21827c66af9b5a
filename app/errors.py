"""Answer every error with OpenAI's error object:

    {"error": {"message": "n: got 99; allowed: 1..16", "type": "invalid_request_error", "param": "n", "code": "..."}}

    400  wrong input, where FastAPI says 422          413  a body or picture over the limit
    401  no valid key                                 415  an unreadable kind of body
    403  a key without the scope                      429  over the key's own limits
    404  an unknown model or path                     431  headers over the limit
    408  a body that takes too long to arrive         501  a GeoTIFF, and rasterio is not installed
    426  /v1/realtime without a WebSocket             507  a full disk
    503  a full queue, a model still opening, or a closing server

429 and 503 say in Retry-After when another try makes sense.
"""

import errno
import http
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from distillers.errors import BadInput

log = logging.getLogger("fewstep.routes")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """Holds the fields of OpenAI's error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Wraps the error, as every route answers when it fails."""

    error: ErrorBody


class ApiError(Exception):
    """Carries a status and an error object to the caller."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
        self.status, self.headers = status, headers
        self.body = ErrorBody(message=told(message), type=kind, param=param and told(param), code=code)

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse({"error": self.body.model_dump()}, self.status, self.headers)


def overloaded(message: str, seconds: int, code: str = "server_overloaded") -> ApiError:
    """Return a 503, worth another try after `seconds`."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(seconds)})


def shutting_down() -> ApiError:
    """Return the 503 for callers who still wait when the server ends."""
    return overloaded("the server is shutting down", 5, "shutting_down")


def deadline_exceeded() -> ApiError:
    """Return the 504 for a request that is not answered when its `timeout_ms` have passed."""
    message = "the deadline passed before the picture was drawn"
    return ApiError(504, message, param="timeout_ms", code="deadline_exceeded")


def caller_left() -> ApiError:
    """Return the 499 that nobody reads: for work whose caller has left."""
    return ApiError(499, "the caller has left", code="client_closed_request")


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """Return the 404 for an unknown model, with the known ones."""
    message = f"model: got {short(name)}; allowed: {', '.join(known) or 'none is served'}"
    return ApiError(404, message, param="model", code="model_not_found")


def from_bad_input(error: BadInput) -> ApiError:
    """Return the 400 for wrong input, with the field, what was given and what is allowed."""
    field = error.field[:80]
    message = f"{field}: got {short(error.given)}; allowed: {error.allowed}"
    return ApiError(400, message, param=field, code="invalid_value")


def no_room(what: str) -> ApiError:
    """Return the 507 for a full disk."""
    return ApiError(507, f"the server has no room for {what}", code="no_room")


def internal_error() -> ApiError:
    """Return the 500 for an unexpected error, whose cause stands in the log only."""
    return ApiError(500, "an error on our side; it has been logged", code="internal_error")


def from_exception(error: Exception) -> ApiError:
    """Return the error to send where an answer has begun. An unexpected one is logged and becomes 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadInput):
        return from_bad_input(error)
    if isinstance(error, RequestValidationError | ValidationError):
        return from_validation(error.errors())
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        log.error("the disk is full: %s", error)
        return no_room("this request")
    log.error("an answer failed", exc_info=error)
    return internal_error()


def told(text: str) -> str:
    """Return a text with escapes for lone surrogates, which UTF-8 cannot express."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(given: object) -> str:
    """Return what was given as text of at most 80 characters."""
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "..."


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Return the 400 for the first of pydantic's errors, in the same form: field, given, allowed."""
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, BadInput):
        return from_bad_input(cause)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {cause or first['msg']}", code="invalid_json")
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if not path:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json", code="invalid_body")
    name = ".".join(path)
    message = f"{name}: got {short(first.get('input'))}; allowed: {first['msg'].removeprefix('Input should be ')}"
    return ApiError(400, message, param=name, code=first["type"])


def answer(request: Request, error: Exception) -> JSONResponse:
    """Return the answer to a request that failed. An unexpected error is raised again: `RequestLog` logs it."""
    if isinstance(error, BadInput | RequestValidationError | ValidationError):
        return from_exception(error).response()
    if isinstance(error, HTTPException):
        phrase = http.HTTPStatus(error.status_code).phrase
        detail = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        message = detail.get(error.status_code, str(error.detail or phrase))
        code = phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return from_exception(error).response()
    if not isinstance(error, ApiError):
        raise error
    if error.status in (503, 504):
        request.app.state.metrics.rejected(error.body.code)
    return error.response()


def install(app: FastAPI) -> None:
    """Answer every error of the application with OpenAI's error object."""
    for kind in (ApiError, BadInput, RequestValidationError, ValidationError, HTTPException, OSError):
        app.add_exception_handler(kind, answer)
