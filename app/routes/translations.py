"""POST /v1/images/translations: SAR to optical, from a form with a file or from the raw bytes of a PNG or TIFF."""

import asyncio
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from app.engine.engine import Order
from app.errors import ApiError
from app.images import KINDS, decode_sar, pad
from app.routes.answers import RESPONSES, answer, draw, engine_of, read
from app.schemas import TranslationRequest
from distillers.errors import BadInput

router = APIRouter(tags=["images"])
RAW_KINDS = ("image/png", "image/tiff")
_FIELDS = TranslationRequest.model_json_schema()["properties"]
_BINARY = {"type": "string", "format": "binary"}
_BODY: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "schema": schema, "description": "With a raw body; in a form, a field."}
        for name, schema in _FIELDS.items()
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": _BINARY, **_FIELDS}, "required": ["image"]}
            },
            **{kind: {"schema": _BINARY} for kind in RAW_KINDS},
        },
    },
}


@router.post(
    "/v1/images/translations",
    responses=RESPONSES | {415: {"description": "Neither a form nor a PNG or TIFF body."}},
    response_class=Response,
    openapi_extra=_BODY,
    summary="Translate SAR to optical",
)
async def translate(request: Request) -> Response:
    """One band of 8 or 16 bit or float32 in 0..1, at the model's own stretch (sar in /v1/models/{id}).

    Any size up to the pixel limit: the picture is grown by reflection to what the network needs and cropped back.
    """
    engine = engine_of(request)
    data, parameters = await _read_body(request)
    body = TranslationRequest.model_validate(parameters)
    reading = read(request, engine, body, translates=True, random_seed=secrets.randbelow(2**32))
    loop = asyncio.get_running_loop()
    sar = await loop.run_in_executor(engine.codec, decode_sar, data, engine.settings.max_pixels)
    padded = pad(sar, reading.model.generator.size_multiple)
    orders = [Order(seed, sar=padded) for seed in reading.seeds]
    drawn = await draw(request, engine, reading, orders, *padded.shape)
    return await answer(engine, reading, drawn, sar.shape, [None for _ in orders])


async def _read_body(request: Request) -> tuple[bytes, dict[str, Any]]:
    """The picture's bytes, and the parameters: the form's other fields, or the query."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in RAW_KINDS:
        return await request.body(), dict(request.query_params)
    if kind != "multipart/form-data":
        message = f"Content-Type: got {kind!r}; allowed: multipart/form-data, {', '.join(RAW_KINDS)}"
        raise ApiError(415, message, code="unsupported_media_type")
    if request.query_params:
        raise BadInput(next(iter(request.query_params)), "a query parameter", "form fields, beside the file")
    async with request.form(max_files=1, max_fields=20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise BadInput("image", image, f"a file: {KINDS}")
        data = await image.read()
        return data, {name: value for name, value in form.multi_items() if name != "image"}
