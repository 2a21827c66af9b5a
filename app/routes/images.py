"""POST /v1/images/generations: pictures from noise, with or without a class, in OpenAI's form."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app.engine.engine import Order
from app.engine.model import Model
from app.errors import ApiError
from app.requests.answers import RESPONSES, Direct, Reading, Work, accepted, engine_of, of_task, read, respond
from app.routes.streams import stream
from app.schemas import Described, ImageRequest, OpenAIRequest
from distillers.errors import BadInput

Json = TypeVar("Json", bound=BaseModel)
router = APIRouter(tags=["images"], route_class=Direct)


def with_events(responses: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """The documented answers, and the stream."""
    both: dict[str, Any] = dict(responses[200])
    both["content"] = {**both["content"], "text/event-stream": {"schema": {"type": "string"}}}
    both["description"] += " With stream: OpenAI's events *.partial_image and *.completed, or an event error."
    return {**responses, 200: both}


def json_of(body: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI is told of a body that is read by `read_json`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


@router.post(
    "/v1/images/generations",
    responses=with_events(RESPONSES),
    response_class=Response,
    openapi_extra=json_of(ImageRequest),
    summary="Generate images",
)
async def generate(request: Request) -> Response:
    """Picture i of a request is a function of seed + i and its class alone, whatever else the server is doing."""
    engine, body = engine_of(request), await read_json(request, ImageRequest)
    raw = accepted_unless_streamed(request, body)
    reading = await read(engine, body, fits=drawing(body, body.size), n=body.n, raw=raw)
    work = from_noise(reading, body, body.size)
    if body.stream:
        return await stream(request, engine, reading, work, "image_generation", body.partial_images or 0)
    return await respond(request, engine, reading, work)


async def read_json(request: Request, body: type[Json]) -> Json:
    """The body, parsed and checked in one go; FastAPI's way takes several."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        message = "the body must be a JSON object, with Content-Type: application/json"
        raise ApiError(400, message, code="invalid_body")
    return body.model_validate_json(await request.body())


def accepted_unless_streamed(request: Request, body: OpenAIRequest) -> Any:
    """The raw format; BadInput where it contradicts the stream."""
    raw = accepted(request)
    if raw and body.stream:
        raise BadInput("stream", True, f"false with Accept: {request.headers['accept']}")
    if body.partial_images and not body.stream:
        raise BadInput("partial_images", body.partial_images, "0 without stream")
    return raw


def drawing(body: Described, size: str | None = None) -> Callable[[Model], bool]:
    """Whether a model draws such a picture; with a latency budget all that do are candidates."""

    def fits(model: Model) -> bool:
        if model.translates:
            return False
        if not (body.prompt or "").strip() and body.label is None and size is None:
            return True
        try:
            check_size(model, size)
            described(model, body, [0])
        except BadInput:
            return False
        return True

    return fits if getattr(body, "latency_budget_ms", None) is not None else lambda model: not model.translates


def from_noise(reading: Reading, body: Described, size: str | None = None) -> Work:
    """Pictures from noise alone, or with a class. BadInput for a model that translates."""
    model = of_task(reading.model, translates=False)
    height, width = check_size(model, size)
    orders = described(model, body, reading.seeds)
    return Work(orders, height, width, (height, width), names(model, orders))


def described(model: Model, body: Described, seeds: Sequence[int]) -> list[Order]:
    """An order for every seed, of what the body says is in the picture."""
    if model.generator.prompts is None:
        return [Order(seed, label) for seed, label in zip(seeds, labels(model, body, seeds), strict=True)]
    if body.label is not None:
        raise BadInput("label", body.label, f"nothing: {model.name} draws what the prompt says")
    from distillers.models.text import check_prompts

    check_prompts([body.prompt or ""])
    return [Order(seed, prompt=body.prompt or "") for seed in seeds]


def names(model: Model, orders: Sequence[Order]) -> list[str | None]:
    """The classes in words."""
    return [None if order.label is None else model.info.labels[order.label] for order in orders]


def check_size(model: Model, size: str | None) -> tuple[int, int]:
    """(height, width); a model draws the one size it was made for."""
    height, width = model.info.size
    if size not in (None, "auto", f"{width}x{height}"):
        raise BadInput("size", size, f"{width}x{height}, auto ({model.name})")
    return height, width


def labels(model: Model, body: Described, seeds: Sequence[int]) -> list[int | None]:
    """A class for every picture, from the label, the prompt, or the seeds."""
    names, classes, prompt = model.info.labels, model.info.classes, (body.prompt or "").strip()
    if not names:
        if prompt or body.label is not None:
            field, given = ("prompt", prompt) if prompt else ("label", body.label)
            raise BadInput(field, given, f"nothing: {model.name} draws without a class")
        return [None for _ in seeds]
    label = body.label
    if prompt:
        folded = prompt.casefold()
        label = next((k for k, name in enumerate(names) if name.casefold() == folded), None)
        if label is None:
            more = f" and {len(names) - 40} more in /v1/models/{model.name}" if len(names) > 40 else ""
            raise BadInput("prompt", prompt, ", ".join(names[:40]) + more)
        if label not in classes:  # a lone student's
            raise BadInput("prompt", prompt, ", ".join(names[k] for k in classes[:40]))
        if body.label not in (None, label):
            raise BadInput("label", body.label, f"{label}, which is {names[label]}, or no prompt beside it")
    if label is None:
        return [classes[class_of_seed(seed, len(classes))] for seed in seeds]
    if label not in classes:
        raise BadInput("label", label, f"{model.info.classes_in_words}: {', '.join(names[k] for k in classes[:40])}")
    return [label for _ in seeds]


def class_of_seed(seed: int, classes: int) -> int:
    """The class that a seed draws when none is asked for: the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8]) % classes
