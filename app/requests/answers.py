"""What the routes that draw share: the model and its steps, who waits, what the caller accepts, and the answer.

This is the hot path, so an answer is put together from bytes: no response model, no second copy of a picture. What
`schemas.ImagesAnswer` documents is what `respond` writes, and a test holds one against the other.
"""

import asyncio
import time
from binascii import b2a_base64
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from app.engine import dial
from app.engine.dial import Choice
from app.engine.engine import Drawn, Engine, Order
from app.engine.model import Model
from app.errors import ApiError, ErrorAnswer, answer
from app.media.images import Pixels, encode
from app.middleware.request_log import path_of
from app.schemas import SEEDS, ImagesAnswer, SceneFormat, Turn
from distillers.errors import BadInput

T = TypeVar("T")
RAW: dict[str, SceneFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "application/octet-stream": "raw",
}
KINDS = {name: kind.encode() for kind, name in RAW.items()}  # Content-Type by format
MOMENT = 0.002  # seconds
BINARY = {"type": "string", "format": "binary"}

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
LATE: dict[int | str, dict[str, Any]] = {
    504: {"model": ErrorAnswer, "description": "timeout_ms passed before the picture was drawn."},
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
    **LATE,
}


@dataclass(frozen=True)
class Reading:
    """A request, checked against the model it names."""

    model: Model
    steps: int
    seed: int
    n: int
    raw: bool  # bytes instead of JSON
    output_format: SceneFormat
    quality: int
    strict: bool
    deadline: float | None  # time.perf_counter
    choice: Choice | None  # with latency_budget_ms

    @property
    def seeds(self) -> range:
        """One per picture."""
        return range(self.seed, self.seed + self.n)


@dataclass(frozen=True)
class Work:
    """What is to be drawn for a request, one order per picture."""

    orders: Sequence[Order]
    height: int
    width: int
    crop: tuple[int, int]  # (height, width) of the answer
    labels: Sequence[str | None]
    first: int = 0  # steps left out at the beginning


class Direct(APIRoute):
    """A route whose function takes the request and gives the response: it does itself what FastAPI would do in between.

    The description for OpenAPI is FastAPI's all the same.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        return self.endpoint


class Lane:
    """Pure ASGI: straight from the path to the functions of `Direct` routes; everything else goes FastAPI's way.

    FastAPI's asks each router twice whether it knows the path, and enters four context managers before the function.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Any]) -> None:
        direct = [route for route in routes if isinstance(route, Direct)]
        self.app, self.routes = app, {(method, route.path): route for route in direct for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, errors included."""
        route = self.routes.get((scope["method"], path_of(scope))) if scope["type"] == "http" else None
        if route is None:
            return await self.app(scope, receive, send)
        scope["route"], request = route, Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except Exception as error:
            response = answer(request, error)
        await response(scope, receive, send)


class Bytes(Response):
    """A body with headers that are bytes already."""

    def __init__(self, body: bytes, kind: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status_code, self.background, self.body = 200, None, body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", kind), *headers]


async def choose(engine: Engine, name: str | None, *, translates: bool) -> Model:
    """The model of a request, open. BadInput for one that answers at another route."""
    return of_task(await engine.open_for(name, lambda model: model.translates == translates), translates)


def of_task(model: Model, translates: bool) -> Model:
    """The model, if it answers here."""
    if model.translates != translates:
        other = "/v1/images/translations" if model.translates else "/v1/images/generations"
        raise BadInput("model", model.name, f"another kind of model here; this one answers at {other}")
    return model


async def read(
    engine: Engine,
    body: Turn,
    *,
    fits: Callable[[Model], bool],
    n: int | None = None,
    raw: SceneFormat | None = None,
) -> Reading:
    """The common fields against the model and the limits; the model is open, and among several one that `fits`.

    With a latency budget the steps, and without a named model the model, are those that the dial chooses.
    """
    arrived = time.perf_counter()
    n, limit = n or 1, engine.settings.max_n
    if n > limit:
        raise BadInput("n", n, f"1..{limit}")
    seed = _random_seed() if body.seed is None else body.seed
    if seed + n > SEEDS:
        raise BadInput("seed", seed, f"0..{SEEDS - n}")
    if raw and n > 1:
        raise BadInput("n", n, "1 with Accept: one picture's bytes; several pictures are answered as JSON")
    choice = None
    if body.latency_budget_ms is None:
        model = await engine.open_for(body.model, fits)
        steps = model.check_steps(body.steps)
    else:
        named = body.model is not None
        candidates = [await engine.open_for(body.model, fits)] if named else [*filter(fits, engine.models.values())]
        if not candidates:
            raise BadInput("model", None, "a model that draws this; see /v1/models")
        choice = dial.choose(engine, candidates, body.latency_budget_ms, n)
        model, steps = choice.model, choice.steps
    deadline = None if body.timeout_ms is None else arrived + body.timeout_ms / 1e3
    quality = 90 if body.output_compression is None else body.output_compression
    output_format = raw or cast(SceneFormat, body.output_format)
    strict = body.determinism == "strict"
    return Reading(model, steps, seed, n, raw is not None, output_format, quality, strict, deadline, choice)


def _random_seed() -> int:
    import secrets

    return secrets.randbelow(2**32)


def accepted(request: Request, kinds: Mapping[str, SceneFormat] = RAW) -> SceneFormat | None:
    """The raw format that the caller prefers to JSON; None for JSON."""
    for kind in request.headers.get("accept", "*/*").split(","):
        name = kind.split(";")[0].strip().lower()
        if name in kinds:
            return kinds[name]
        if name in ("application/json", "*/*"):
            return None
    return None


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Awaits the work, and cancels it when the caller disconnects. The request's body must have been read.

    One task that watches, after a moment in which most work is done; and none for the work, which runs in the caller's.
    """
    task, loop = cast(asyncio.Task[Any], asyncio.current_task()), asyncio.get_running_loop()
    gone, watching = False, list[asyncio.Task[None]]()

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    later = loop.call_later(MOMENT, lambda: watching.append(loop.create_task(watch())))
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or task.uncancel():
            raise  # cancelled by another
        raise ApiError(499, "the caller has left", code="client_closed_request") from None
    finally:
        later.cancel()
        for watcher in watching:
            watcher.cancel()


def draw(engine: Engine, reading: Reading, work: Work, orders: Sequence[Order] | None = None) -> Awaitable[list[Drawn]]:
    """The pictures, each with its encoded file; base64 where the answer is JSON."""
    return engine.draw(
        reading.model,
        reading.steps,
        work.orders if orders is None else orders,
        work.height,
        work.width,
        first=work.first,
        strict=reading.strict,
        deadline=reading.deadline,
        finish=finisher(reading, work),
    )


def finisher(reading: Reading, work: Work) -> Callable[[Pixels], bytes]:
    """What turns pixels into what the answer holds, in the pool of the encoders."""
    (height, width), output_format, quality = work.crop, reading.output_format, reading.quality
    text = None
    if reading.raw and output_format == "png":  # a lone file says itself how to draw it again
        text = {"parameters": to_json({**facts_of(reading, work), "label": work.labels[0]}).decode()}

    def finish(pixels: Pixels) -> bytes:
        file = encode(pixels[:height, :width], output_format, quality, text)
        return file if reading.raw else b2a_base64(file, newline=False)

    return finish


async def respond(request: Request, engine: Engine, reading: Reading, work: Work) -> Response:
    """The pictures as JSON or raw bytes; and if the caller leaves while they wait, they are never drawn."""
    drawn = await unless_gone(request, draw(engine, reading, work))
    timings, headers = timings_of(drawn), headers_of(reading, work.first)
    headers.append((b"server-timing", server_timing(timings)))
    if reading.raw:
        height, width = work.crop
        headers += [(b"x-fewstep-width", b"%d" % width), (b"x-fewstep-height", b"%d" % height)]
        if (label := work.labels[0]) is not None:
            headers.append((b"x-fewstep-label", quoted(label)))
        return Bytes(drawn[0].file, KINDS[reading.output_format], headers)
    facts = {"created": int(time.time()), **facts_of(reading, work), "timings": timings, "chosen": chosen(reading)}
    facts["scene"] = None
    pictures = b",".join(
        b'{"b64_json":"%b","seed":%d,"label":%b}' % (picture.file, seed, to_json(label))
        for picture, seed, label in zip(drawn, reading.seeds, work.labels, strict=True)
    )
    return Bytes(b'%b,"data":[%b]}' % (to_json(facts)[:-1], pictures), b"application/json", headers)


def facts_of(reading: Reading, work: Work) -> dict[str, Any]:
    """What is needed to draw the same again."""
    return {
        "model": reading.model.name,
        "steps": reading.steps,
        "nfe": reading.model.nfe(reading.steps - work.first),
        "seed": reading.seed,
        "output_format": reading.output_format,
        "size": f"{work.crop[1]}x{work.crop[0]}",
    }


def chosen(reading: Reading) -> dict[str, Any] | None:
    """What the dial chose, for the caller."""
    choice = reading.choice
    if choice is None:
        return None
    return {
        "model": choice.model.name,
        "steps": choice.steps,
        "expected_ms": choice.expected_ms,
        "quality": choice.quality,
        "why": choice.why,
    }


def timings_of(drawn: Sequence[Drawn]) -> dict[str, float]:
    """Milliseconds of each stage: the longest wait and encoding, and every forward pass once."""
    turns = {picture.turn: picture for picture in drawn}.values()
    return {
        "queue_ms": round(1e3 * max(picture.queue_s for picture in drawn), 3),
        "forward_ms": round(1e3 * sum(turn.forward_s for turn in turns), 3),
        "encode_ms": round(1e3 * max(picture.encode_s for picture in drawn), 3),
        "batch": max(turn.batch for turn in turns),
        "bucket": max(turn.bucket for turn in turns),
    }


def server_timing(timings: Mapping[str, float]) -> bytes:
    """The header's value."""
    stages = timings["queue_ms"], timings["forward_ms"], timings["encode_ms"]
    return b"queue;dur=%.3f, forward;dur=%.3f, encode;dur=%.3f" % stages


@lru_cache(1024)
def quoted(name: str) -> bytes:
    """A name as a header may hold it."""
    return quote(name).encode()


def headers_of(reading: Reading, first: int = 0) -> list[tuple[bytes, bytes]]:
    """The facts of an answer for who takes the bytes alone; percent-encoded where a header must be."""
    headers = [
        (b"x-fewstep-model", quoted(reading.model.name)),
        (b"x-fewstep-seed", b"%d" % reading.seed),
        (b"x-fewstep-steps", b"%d" % reading.steps),
        (b"x-fewstep-nfe", b"%d" % reading.model.nfe(reading.steps - first)),
    ]
    if reading.choice is not None:
        headers.append((b"x-fewstep-why", quote(reading.choice.why, safe=" ,;:=()/<>").encode()))
    return headers


def engine_of(connection: HTTPConnection) -> Engine:
    """The application's one engine."""
    return cast(Engine, connection.app.state.engine)
