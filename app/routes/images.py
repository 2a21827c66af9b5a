"""POST /v1/images/generations draws pictures from noise, of a class or a prompt, in OpenAI's form."""

from fastapi import APIRouter, Request, Response

from app.engine.engine import engine_of
from app.requests.answers import accepted_unless_streamed, respond
from app.requests.bodies import describe_json, read_json
from app.requests.fast_path import FastRoute
from app.requests.orders import from_noise, generates, make_plan
from app.requests.streams import STREAMED_RESPONSES, stream
from app.schemas import ImageRequest

router = APIRouter(tags=["images"], route_class=FastRoute)


@router.post(
    "/v1/images/generations",
    responses=STREAMED_RESPONSES,
    response_class=Response,
    openapi_extra=describe_json(ImageRequest),
    summary="Generate images",
)
async def generate(request: Request) -> Response:
    """Draw pictures. Picture i depends on seed + i and its class alone, whatever else the server is doing."""
    engine, body = engine_of(request), await read_json(request, ImageRequest)
    raw = accepted_unless_streamed(request, body)
    plan = await make_plan(engine, body, fits=generates(body, body.size), n=body.n, raw=raw)
    work = from_noise(plan, body, body.size)
    if body.stream:
        return await stream(request, engine, work, "image_generation", body.partial_images or 0)
    return await respond(request, engine, work)
