"""POST /v1/images/generations: pictures from noise, with or without a class, in OpenAI's form."""

import hashlib
import secrets
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from app.engine.engine import Order
from app.engine.model import Model
from app.routes.answers import RESPONSES, answer, draw, engine_of, read
from app.schemas import ImageRequest
from distillers.errors import BadInput

router = APIRouter(tags=["images"])


@router.post("/v1/images/generations", responses=RESPONSES, response_class=Response, summary="Generate images")
async def generate(body: ImageRequest, request: Request) -> Response:
    """Picture i of a request is a function of seed + i and its class alone, whatever else the server is doing."""
    engine = engine_of(request)
    reading = read(request, engine, body, translates=False, random_seed=secrets.randbelow(2**32))
    height, width = _size(reading.model, body.size)
    labels = _labels(reading.model, body, reading.seeds)
    orders = [Order(seed, label) for seed, label in zip(reading.seeds, labels, strict=True)]
    drawn = await draw(request, engine, reading, orders, height, width)
    names = [None if label is None else reading.model.info.labels[label] for label in labels]
    return await answer(engine, reading, drawn, (height, width), names)


def _size(model: Model, size: str | None) -> tuple[int, int]:
    """(height, width); a model draws the one size it was made for."""
    height, width = model.info.size
    if size not in (None, "auto", f"{width}x{height}"):
        raise BadInput("size", size, f"{width}x{height}, auto ({model.name})")
    return height, width


def _labels(model: Model, body: ImageRequest, seeds: Sequence[int]) -> list[int | None]:
    """A class for every picture, from the label, the prompt, or the seeds."""
    names, classes, prompt = model.info.labels, model.info.classes, (body.prompt or "").strip()
    if not names:
        if prompt or body.label is not None:
            field, given = ("prompt", prompt) if prompt else ("label", body.label)
            raise BadInput(field, given, f"nothing: {model.name} draws without a class")
        return [None for _ in seeds]
    label = body.label
    if prompt:
        folded = [name.casefold() for name in names]
        if prompt.casefold() not in folded:
            more = f" and {len(names) - 40} more in /v1/models/{model.name}" if len(names) > 40 else ""
            raise BadInput("prompt", prompt, ", ".join(names[:40]) + more)
        label = folded.index(prompt.casefold())
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
