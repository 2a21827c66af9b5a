"""Turn pictures into an answer: JSON with base64, or one picture's bytes with the facts in headers.

This is the hot path, so an answer is put together from bytes: no response model, no second copy of a picture. What
`schemas.ImagesAnswer` documents is what `respond` writes, and a test compares the two.
"""

import asyncio
import json
import re
import time
from binascii import b2a_base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from app.engine.engine import Engine, Order, Picture
from app.errors import ErrorAnswer, caller_left
from app.media.image_files import Pixels, encode
from app.requests.bodies import BINARY
from app.requests.orders import Plan, Work
from app.schemas import ImagesAnswer, OpenAIRequest, SceneFormat
from distillers.errors import BadInput

T = TypeVar("T")
RAW: dict[str, SceneFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "application/octet-stream": "raw",
}
CONTENT_TYPES = {name: kind.encode() for kind, name in RAW.items()}  # by format
PLAIN = {"*/*", "application/json", "image/tiff", *RAW}  # usual values of Accept
WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")
WATCH_AFTER = 0.002  # seconds in which most answers are ready

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Wrong input; the message names field, given and allowed."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    413: {"model": ErrorAnswer, "description": "Body or picture over the limit."},
    401: {"model": ErrorAnswer, "description": "No valid key, where keys are asked for."},
    403: {"model": ErrorAnswer, "description": "A key without the scope."},
    408: {"model": ErrorAnswer, "description": "The body took too long to arrive."},
    429: {"model": ErrorAnswer, "description": "Over the key's limits; see Retry-After."},
    503: {"model": ErrorAnswer, "description": "Full or still opening; see Retry-After."},
}
SCENE_ERRORS: dict[int | str, dict[str, Any]] = {
    415: {"model": ErrorAnswer, "description": "Neither a form nor such a body."},
    501: {"model": ErrorAnswer, "description": "A GeoTIFF, and rasterio is not installed here."},
    507: {"model": ErrorAnswer, "description": "No room on the server's disk."},
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON with base64 pictures; or, with n = 1 and Accept: image/png (image/jpeg, image/webp, "
        "application/octet-stream for the pixels), the picture's bytes, the facts in X-Fewstep-* headers and the times "
        "in Server-Timing.",
        "model": ImagesAnswer,
        "content": {kind: {"schema": BINARY} for kind in RAW},
    },
    **ERRORS,
    504: {"model": ErrorAnswer, "description": "timeout_ms passed before the picture was drawn."},
}


def describe_answer(kind: str, schema: Mapping[str, Any], more: str) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the answers, with another content type and a sentence about it."""
    answer = RESPONSES[200]
    content = {**answer["content"], kind: {"schema": schema}}
    return {**RESPONSES, 200: {**answer, "content": content, "description": f"{answer['description']} {more}"}}


class RawResponse(Response):
    """Sends a body with headers that are bytes already."""

    def __init__(self, body: bytes, kind: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status_code, self.background, self.body = 200, None, body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", kind), *headers]


def accepted_format(request: Request, kinds: Mapping[str, SceneFormat] = RAW) -> SceneFormat | None:
    """Return the format of the raw bytes that the caller prefers to JSON; None for JSON, and where nothing fits.

    The preference is RFC 9110's (12.5.1): the greater weight q; of the same, what is named exactly, then what is named
    first. A type's weight is that of the range that fits it best, and 0 says never.
    """
    accept = request.headers.get("accept", "*/*")
    if "," not in accept and ";" not in accept and accept in PLAIN:
        return kinds.get(accept)
    ranges = [_weighted(part) for part in accept.lower().split(",")]
    best, chosen = (0.0, 0, 0), "application/json"
    for kind in ("application/json", *kinds):
        fitting = {kind: 2, f"{kind.partition('/')[0]}/*": 1, "*/*": 0}
        found = [(fitting[name], q, -i) for i, (name, q) in enumerate(ranges) if name in fitting]
        precision, q, place = max(found, default=(0, 0.0, 0))
        if q > 0 and (q, precision, place) > best:
            best, chosen = (q, precision, place), kind
    return kinds.get(chosen)


def _weighted(part: str) -> tuple[str, float]:
    """Read a part of an Accept header: the range of types and its weight, 0 where that is no number."""
    name, *parameters = (text.strip() for text in part.split(";"))
    weights = [text.removeprefix("q=") for text in parameters if text.startswith("q=")]
    return name, float(weights[0]) if weights and WEIGHT.fullmatch(weights[0]) else float(not weights)


def accepted_unless_streamed(request: Request, body: OpenAIRequest) -> SceneFormat | None:
    """Return the format of raw bytes, or None for JSON. BadInput where it contradicts the stream."""
    raw = accepted_format(request)
    if raw and body.stream:
        raise BadInput("stream", True, f"false with Accept: {request.headers['accept']}")
    if body.partial_images and not body.stream:
        raise BadInput("partial_images", body.partial_images, "0 without stream")
    return raw


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await the work, and cancel it when the caller disconnects. The request's body must have been read.

    The work runs in the caller's task. A second task watches the connection, begun after a moment in which most work
    is done.

    Raises:
        ApiError: 499, the caller has left.
    """
    task, loop = cast(asyncio.Task[Any], asyncio.current_task()), asyncio.get_running_loop()
    disconnected, watching = False, list[asyncio.Task[None]]()

    async def watch() -> None:
        nonlocal disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    later = loop.call_later(WATCH_AFTER, lambda: watching.append(loop.create_task(watch())))
    try:
        return await work
    except asyncio.CancelledError:
        if not disconnected or task.uncancel():
            raise  # cancelled by another
        raise caller_left() from None
    finally:
        later.cancel()
        for watcher in watching:
            watcher.cancel()


def draw(engine: Engine, work: Work, orders: Sequence[Order] | None = None) -> Awaitable[list[Picture]]:
    """Draw the pictures and encode each, in base64 where the answer is JSON.

    Args:
        orders: instead of the work's own, for example with callbacks.
    """
    plan = work.plan
    return engine.draw(
        plan.model,
        plan.steps,
        work.orders if orders is None else orders,
        work.height,
        work.width,
        first=work.first,
        strict=plan.strict,
        deadline=plan.deadline,
        finish=encoder(work),
    )


def encoder(work: Work) -> Callable[[Pixels], bytes]:
    """Return the function that encodes a picture for the answer, to be called in the encoders' threads."""
    (height, width), output_format, quality, raw = work.crop, work.plan.output_format, work.plan.quality, work.plan.raw
    text = None
    if raw and output_format == "png":  # a lone file says itself how to draw it again
        parameters = {**facts_of(work), "label": work.labels[0]}
        if loras := loras_of(work):
            parameters["loras"] = loras
        text = {"parameters": to_json(parameters).decode()}

    def finish(pixels: Pixels) -> bytes:
        file = encode(pixels[:height, :width], output_format, quality, text)
        return file if raw else b2a_base64(file, newline=False)

    return finish


async def respond(request: Request, engine: Engine, work: Work) -> Response:
    """Answer with the pictures as JSON or raw bytes; those still waiting when the caller leaves are never drawn."""
    plan = work.plan
    pictures = await cancel_on_disconnect(request, draw(engine, work))
    timings, headers = timings_of(pictures), headers_of(plan, work.first)
    headers.append((b"server-timing", server_timing(timings)))
    if plan.raw:
        height, width = work.crop
        headers += [(b"x-fewstep-width", b"%d" % width), (b"x-fewstep-height", b"%d" % height)]
        if (label := work.labels[0]) is not None:
            headers.append((b"x-fewstep-label", quoted(label)))
        if work.unread:
            headers.append((b"x-fewstep-unread", quoted(json.dumps(work.unread, ensure_ascii=False))))
        return RawResponse(pictures[0].file, CONTENT_TYPES[plan.output_format], headers)
    facts = {"created": int(time.time()), **facts_of(work), "timings": timings, "chosen": choice_of(plan)}
    facts |= {"scene": None, "loras": loras_of(work), "unread": work.unread}
    data = b",".join(
        b'{"b64_json":"%b","seed":%d,"label":%b}' % (picture.file, seed, to_json(label))
        for picture, seed, label in zip(pictures, plan.seeds, work.labels, strict=True)
    )
    return RawResponse(b'%b,"data":[%b]}' % (to_json(facts)[:-1], data), b"application/json", headers)


def facts_of(work: Work) -> dict[str, Any]:
    """Return what a caller needs to draw the same pictures again."""
    plan = work.plan
    return {
        "model": plan.model.name,
        "steps": plan.steps,
        "nfe": plan.model.nfe(plan.steps - work.first),
        "seed": plan.seed,
        "output_format": plan.output_format,
        "size": f"{work.crop[1]}x{work.crop[0]}",
    }


def loras_of(work: Work) -> list[dict[str, Any]] | None:
    """Return the answer's `loras`; None without any."""
    return [{"name": name, "weight": weight} for name, weight in work.orders[0].loras] or None


def choice_of(plan: Plan) -> dict[str, Any] | None:
    """Return the answer's `chosen`: what was chosen for a latency budget, and why; None without one."""
    return None if plan.choice is None else {**vars(plan.choice), "model": plan.choice.model.name}


def timings_of(pictures: Sequence[Picture]) -> dict[str, float]:
    """Return milliseconds of each stage: the longest wait and encoding, and the sum of all forward passes."""
    turns = {picture.turn: picture for picture in pictures}.values()
    return {
        "queue_ms": round(1e3 * max(picture.queue_s for picture in pictures), 3),
        "forward_ms": round(1e3 * sum(turn.forward_s for turn in turns), 3),
        "encode_ms": round(1e3 * max(picture.encode_s for picture in pictures), 3),
        "batch": max(turn.batch for turn in turns),
        "bucket": max(turn.bucket for turn in turns),
    }


def server_timing(timings: Mapping[str, float]) -> bytes:
    """Return the value of the Server-Timing header."""
    stages = timings["queue_ms"], timings["forward_ms"], timings["encode_ms"]
    return b"queue;dur=%.3f, forward;dur=%.3f, encode;dur=%.3f" % stages


@lru_cache(1024)
def quoted(name: str) -> bytes:
    """Percent-encode a name for a header."""
    return quote(name).encode()


def headers_of(plan: Plan, first: int = 0) -> list[tuple[bytes, bytes]]:
    """Return the headers with an answer's facts, percent-encoded where a header must be."""
    headers = [
        (b"x-fewstep-model", quoted(plan.model.name)),
        (b"x-fewstep-seed", b"%d" % plan.seed),
        (b"x-fewstep-steps", b"%d" % plan.steps),
        (b"x-fewstep-nfe", b"%d" % plan.model.nfe(plan.steps - first)),
    ]
    if plan.choice is not None:
        headers.append((b"x-fewstep-why", quote(plan.choice.why, safe=" ,;:=()/<>").encode()))
    return headers
