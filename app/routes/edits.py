"""POST /v1/images/edits draws pictures from a picture, in OpenAI's form.

A translator takes the picture as SAR, and has no use for the prompt that OpenAI's clients insist on. A generator starts
from the picture instead of from noise alone: see `orders.from_picture`.
"""

from typing import Any, cast

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from app.engine.engine import engine_of, in_time
from app.errors import ErrorAnswer
from app.requests.answers import accepted_unless_streamed, respond
from app.requests.bodies import check_kind, content_type_of, describe_form, describe_json, read_form, read_json
from app.requests.fast_path import FastRoute
from app.requests.orders import edits, from_picture, make_plan
from app.requests.streams import STREAMED_RESPONSES, stream
from app.schemas import EditRequest, JsonEditRequest
from distillers.errors import BadInput

router = APIRouter(tags=["images"], route_class=FastRoute)
JSON = "application/json"
DESCRIBED = describe_form(EditRequest)
DESCRIBED["requestBody"]["content"] |= describe_json(JsonEditRequest)["requestBody"]["content"]
PICTURE = "one file: a PNG, JPEG or WebP picture of the model's size; for a translator a SAR picture, PNG or TIFF"


@router.post(
    "/v1/images/edits",
    responses={**STREAMED_RESPONSES, 415: {"model": ErrorAnswer, "description": "Neither a form nor JSON."}},
    response_class=Response,
    openapi_extra=DESCRIBED,
    summary="Edit an image",
)
async def edit(request: Request) -> Response:
    """A generator draws on from the picture, which must have the model's own size; a translator takes it as SAR.

    `strength` is the share of the steps that are taken (SDEdit, Meng et al. 2022): a model of one step takes that one
    whatever it is. A translator ignores prompt and strength; it takes the SAR picture's polarisation from `bands`, else
    from the file's name, and refuses if it has several bands and neither says it. A mask is refused. With several
    models served, and none named, one that draws is chosen before one that translates.
    """
    engine = engine_of(request)
    if content_type_of(request) == JSON:
        asked = await read_json(request, JsonEditRequest)
        body, data, name = cast(EditRequest, asked), asked.images[0].image_url, ""
    else:
        data, name, fields = await _read_form(request)
        body = EditRequest.model_validate(fields)
    raw = accepted_unless_streamed(request, body)
    plan = await make_plan(engine, body, fits=edits(engine, body, body.size), n=body.n, raw=raw)
    work = await in_time(from_picture(engine, plan, body, data, body.size, name), plan.deadline)
    if body.stream:
        return await stream(request, engine, work, "image_edit", body.partial_images or 0)
    return await respond(request, engine, work)


async def _read_form(request: Request) -> tuple[bytes, str, dict[str, Any]]:
    """Return the picture's bytes, its file's name, and the form's other fields."""
    check_kind(request, (JSON,))
    async with read_form(request, max_files=17, max_fields=30) as form:
        if "mask" in form:
            raise BadInput("mask", "a mask", "none: the whole picture is drawn anew, as much as strength says")
        pictures = [value for name, value in form.multi_items() if name in ("image", "image[]")]
        if len(pictures) != 1 or not isinstance(pictures[0], UploadFile):
            given = "a text" if len(pictures) == 1 else f"{len(pictures)} of them"
            raise BadInput("image", given, PICTURE)
        fields = {name: value for name, value in form.multi_items() if name not in ("image", "image[]")}
        return await pictures[0].read(), pictures[0].filename or "", fields
