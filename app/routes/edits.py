"""POST /v1/images/edits: a picture in, a picture out, in OpenAI's form.

A translator takes the picture as SAR, and has no use for the prompt that OpenAI's clients insist on. A generator begins
from the picture instead of from noise alone (SDEdit, Meng et al. 2022): it is noised to the time of a later step, and
drawn to its end from there. `strength` is the share of the steps that are taken, so for one step it changes nothing.
"""

import math
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from app.engine.engine import Engine
from app.errors import ApiError, ErrorAnswer
from app.media.images import decode_rgb
from app.requests.answers import BINARY, RESPONSES, Direct, Reading, Work, engine_of, read, respond
from app.routes.images import accepted_unless_streamed, check_size, described, drawing, names, with_events
from app.routes.streams import stream
from app.routes.translations import from_sar
from app.schemas import EditRequest, RealtimeRequest
from distillers.errors import BadInput

router = APIRouter(tags=["images"], route_class=Direct)
PICTURE = "one file: a PNG, JPEG or WebP picture of the model's size; for a translator a SAR picture, PNG or TIFF"


def _form() -> dict[str, Any]:
    properties = {"image": BINARY, **EditRequest.model_json_schema()["properties"]}
    schema = {"type": "object", "properties": properties, "required": ["image"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "/v1/images/edits",
    responses={**with_events(RESPONSES), 415: {"model": ErrorAnswer, "description": "Not a form."}},
    response_class=Response,
    openapi_extra=_form(),
    summary="Edit an image",
)
async def edit(request: Request) -> Response:
    """A generator draws on from the picture, which must have the model's own size; a translator takes it as SAR.

    `strength` is the share of the steps that are taken (SDEdit, Meng et al. 2022): a model of one step takes that one
    whatever it is. A translator ignores prompt and strength. A mask is refused. With several models served, and none
    named, one that draws is chosen before one that translates.
    """
    engine = engine_of(request)
    data, fields = await _read_form(request)
    body = EditRequest.model_validate(fields)
    raw = accepted_unless_streamed(request, body)
    reading = await read(engine, body, fits=editing(engine, body, body.size), n=body.n, raw=raw)
    work = await from_picture(engine, reading, body, data, body.size)
    if body.stream:
        return await stream(request, engine, reading, work, "image_edit", body.partial_images or 0)
    return await respond(request, engine, reading, work)


def editing(engine: Engine, body: EditRequest | RealtimeRequest, size: str | None = None) -> Any:
    """Whether a model is meant where none is named: one that draws; where none does, one that translates."""
    if any(not model.translates for model in engine.models.values()):
        return drawing(body, size)
    return lambda model: True


async def from_picture(
    engine: Engine, reading: Reading, body: EditRequest | RealtimeRequest, data: bytes, size: str | None = None
) -> Work:
    """What is drawn from a picture's bytes, by a translator or by a generator."""
    if reading.model.translates:
        work = await from_sar(engine, reading, data)
        if size not in (None, "auto", f"{work.crop[1]}x{work.crop[0]}"):
            raise BadInput("size", size, f"{work.crop[1]}x{work.crop[0]}, the picture's, or auto")
        return work
    height, width = check_size(reading.model, size)
    orders = described(reading.model, body, reading.seeds)
    start = await engine.decode(decode_rgb, data, engine.settings.max_pixels)
    if start.shape[1:] != (height, width):
        given = f"a picture of {start.shape[2]}x{start.shape[1]} pixels"
        raise BadInput("image", given, f"{width}x{height} pixels, what {reading.model.name} draws; nothing is resized")
    taken = max(1, math.ceil(round(body.strength * reading.steps, 6)))
    started = [replace(order, start=start) for order in orders]
    return Work(started, height, width, (height, width), names(reading.model, orders), reading.steps - taken)


async def _read_form(request: Request) -> tuple[bytes, dict[str, Any]]:
    """The picture's bytes, and the form's other fields."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = f"Content-Type: got {kind!r}; allowed: multipart/form-data"
        raise ApiError(415, message, code="unsupported_media_type")
    if request.query_params:
        raise BadInput(next(iter(request.query_params)), "a query parameter", "form fields, beside the file")
    async with request.form(max_files=17, max_fields=30) as form:
        if "mask" in form:
            raise BadInput("mask", "a mask", "none: the whole picture is drawn anew, as much as strength says")
        pictures = [value for name, value in form.multi_items() if name in ("image", "image[]")]
        if len(pictures) != 1 or not isinstance(pictures[0], UploadFile):
            given = "a text" if len(pictures) == 1 else f"{len(pictures)} of them"
            raise BadInput("image", given, PICTURE)
        fields = {name: value for name, value in form.multi_items() if name not in ("image", "image[]")}
        return await pictures[0].read(), fields
