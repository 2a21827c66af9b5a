"""Read request bodies (JSON, a form with a file, a file's raw bytes) and describe them in OpenAPI."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from app.engine.engine import engine_of
from app.errors import ApiError
from app.schemas import SceneFields
from distillers.errors import BadInput

Json = TypeVar("Json", bound=BaseModel)
FORM = "multipart/form-data"
BINARY = {"type": "string", "format": "binary"}


def content_type_of(request: Request) -> str:
    """Return the body's media type in lower case, without parameters; "" where the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, body: type[Json]) -> Json:
    """Parse and check a JSON body in one go, where FastAPI takes several.

    Raises:
        ApiError: 400 for another content type.
        ValidationError: for fields that the body's class refuses.
    """
    if content_type_of(request) != "application/json":
        message = "the body must be a JSON object, with Content-Type: application/json"
        raise ApiError(400, message, code="invalid_body")
    return body.model_validate_json(await request.body())


def check_kind(request: Request, raw: tuple[str, ...] = ()) -> str:
    """Return the body's media type: a form, or one of those that are taken as raw bytes.

    Raises:
        ApiError: 415 for another type.
        BadInput: for a form beside query parameters, or in another charset than UTF-8.
    """
    kind = content_type_of(request)
    if kind not in (*raw, FORM):
        message = f"Content-Type: got {kind!r}; allowed: {', '.join((FORM, *raw))}"
        raise ApiError(415, message, code="unsupported_media_type")
    charset = request.headers.get("content-type", "").lower().partition("charset=")[2].split(";")[0].strip(' "')
    if kind == FORM and charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise BadInput("charset", charset, "utf-8, in which forms are sent")
    if kind == FORM and request.query_params:
        raise BadInput(next(iter(request.query_params)), "a query parameter", "form fields, beside the file")
    return kind


@asynccontextmanager
async def read_form(request: Request, *, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Parse a form, whose files lie in the server's scratch folder until the context ends. HTTPException 400."""
    parser = _FormParser(request.headers, request.stream(), max_files=max_files, max_fields=max_fields)
    scratch = engine_of(request).settings.scratch
    parser.folder = None if scratch is None else str(scratch)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    try:
        yield form
    finally:
        await form.close()


class _FormParser(MultiPartParser):
    """Spools files to a folder of our choice."""

    folder: str | None = None  # the system's own

    def on_headers_finished(self) -> None:
        """Begin a part."""
        super().on_headers_finished()
        if (upload := self._current_part.file) is not None:
            self._files_to_close_on_error[-1].close()
            file = SpooledTemporaryFile[bytes](max_size=self.spool_max_size, dir=self.folder)
            self._files_to_close_on_error[-1] = file
            upload.file = cast(BinaryIO, file)


def schema_of(body: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a body; the schemas that it refers to stand under `$defs`, to become components."""
    return body.model_json_schema(ref_template="#/components/schemas/{model}")


def describe_json(body: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's description of a body that `read_json` reads."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(body)}}}}


def describe_form(fields: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's description of a form with the file `image`."""
    described = schema_of(fields)
    properties = {"image": BINARY, **described["properties"]}
    schema = {"type": "object", "properties": properties, "required": ["image"], "$defs": described.get("$defs", {})}
    return {"requestBody": {"required": True, "content": {FORM: {"schema": schema}}}}


def describe_upload(fields: type[SceneFields], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return OpenAPI's description of a body that is a form with a file, or the file's raw bytes with a query."""
    described = describe_form(fields)
    described["requestBody"]["content"] |= {kind: {"schema": BINARY} for kind in kinds}
    described["parameters"] = [
        {"name": name, "in": "query", "schema": schema, "description": "With a raw body; in a form, a field."}
        for name, schema in schema_of(fields)["properties"].items()
    ]
    return described
