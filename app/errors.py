"""The one error object, OpenAI's, for everything that is not an answer:

    {"error": {"message": "n: got 99; allowed: 1..16", "type": "invalid_request_error", "param": "n", "code": "..."}}

Wrong input is 400 (OpenAI's clients expect it where FastAPI says 422), an unknown model or path 404, a body or image
over the limit 413, an unreadable kind of body 415, a body that takes too long to arrive 408. Without a valid key 401,
without its scope 403, over the key's own limits 429; a full queue, a model still opening or a closing server 503. 429
and 503 say in Retry-After when another try makes sense. A GeoTIFF where rasterio is not installed 501, a full disk 507.
"""

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
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """What every route answers when it does not answer."""

    error: ErrorBody


class ApiError(Exception):
    """An error that is told to the caller as it is."""

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
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)

    def response(self) -> JSONResponse:
        """The error as the response that tells it."""
        return JSONResponse({"error": self.body.model_dump()}, self.status, self.headers)


def overloaded(message: str, seconds: int, code: str = "server_overloaded") -> ApiError:
    """503: ours, not the caller's; worth trying again after `seconds`."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(seconds)})


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """404, with what there is."""
    message = f"model: got {short(name)}; allowed: {', '.join(known) or 'none is served'}"
    return ApiError(404, message, param="model", code="model_not_found")


def from_bad_input(error: BadInput) -> ApiError:
    """400, field and allowed values named."""
    field = error.field[:80]
    message = f"{field}: got {short(error.given)}; allowed: {error.allowed}"
    return ApiError(400, message, param=field, code="invalid_value")


def internal_error() -> ApiError:
    """500; what it was stands in the log only."""
    return ApiError(500, "an error on our side; it has been logged", code="internal_error")


def from_exception(error: Exception) -> ApiError:
    """Return the error to send where an answer has begun. An unexpected one is logged and becomes 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadInput):
        return from_bad_input(error)
    if isinstance(error, RequestValidationError | ValidationError):
        return from_validation(error.errors())
    log.error("an answer failed", exc_info=error)
    return internal_error()


def short(given: object) -> str:
    """What was given, as far as it helps to see it."""
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "..."


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors, in the house's form: field, given, allowed."""
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
    """The answer to a request that failed; an error that nobody expected is not touched: `Visits` logs it."""
    if isinstance(error, BadInput | RequestValidationError | ValidationError):
        return from_exception(error).response()
    if isinstance(error, HTTPException):
        phrase = http.HTTPStatus(error.status_code).phrase
        detail = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        message = detail.get(error.status_code, str(error.detail or phrase))
        code = phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()
    if not isinstance(error, ApiError):
        raise error
    if error.status in (503, 504):
        request.app.state.metrics.rejected(error.body.code)
    return error.response()


def install(app: FastAPI) -> None:
    """Makes every error of the application the one object."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        """The description without the 422 that FastAPI writes into it and `answer` never gives."""
        for route in (route for verbs in stock()["paths"].values() for route in verbs.values()):
            route["responses"].pop("422", None)
        return stock()

    app.openapi = openapi  # type: ignore[method-assign]
    for kind in (ApiError, BadInput, RequestValidationError, ValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
