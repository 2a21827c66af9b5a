"""What generations and translations share: who waits, what the caller accepts, and the answer in either form."""

import asyncio
import base64
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from app.engine.engine import Drawn, Engine, Order
from app.engine.model import Model
from app.errors import ApiError, ErrorAnswer
from app.images import encode
from app.schemas import SEEDS, ImageData, ImagesAnswer, Sampling, SceneFormat, Timings
from distillers.errors import BadInput

T = TypeVar("T")
RAW: dict[str, SceneFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Wrong input; the message names field, given and allowed."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    413: {"model": ErrorAnswer, "description": "Body or picture over the limit."},
    503: {"model": ErrorAnswer, "description": "Full or still opening; see Retry-After."},
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON with base64 pictures; or, with n = 1 and Accept: image/png (image/jpeg, image/webp), the "
        "picture's bytes, the facts in X-Fewstep-* headers and the times in Server-Timing.",
        "model": ImagesAnswer,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW},
    },
    **ERRORS,
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

    @property
    def seeds(self) -> range:
        """One per picture."""
        return range(self.seed, self.seed + self.n)


def choose(engine: Engine, name: str | None, *, translates: bool) -> Model:
    """The model of a request. BadInput for one that answers at another route."""
    model = engine.choose(name, lambda model: model.translates == translates)
    if model.translates != translates:
        other = "/v1/images/translations" if model.translates else "/v1/images/generations"
        raise BadInput("model", model.name, f"another kind of model here; this one answers at {other}")
    return model


def read(
    request: Request,
    engine: Engine,
    body: Sampling,
    *,
    translates: bool,
    random_seed: int,
    kinds: Mapping[str, SceneFormat] = RAW,
) -> Reading:
    """The common fields against the model and the limits; `kinds`: what may be answered as raw bytes."""
    model = choose(engine, body.model, translates=translates)
    n, limit = body.n or 1, engine.settings.max_n
    if n > limit:
        raise BadInput("n", n, f"1..{limit}")
    seed = random_seed if body.seed is None else body.seed
    if seed + n > SEEDS:
        raise BadInput("seed", seed, f"0..{SEEDS - n}")
    raw = accepted(request, kinds)
    if raw and n > 1:
        raise BadInput("n", n, f"1 with Accept: {request.headers['accept']}; several pictures are answered as JSON")
    quality = 90 if body.output_compression is None else body.output_compression
    return Reading(model, model.check_steps(body.steps), seed, n, raw is not None, raw or body.output_format, quality)


def accepted(request: Request, kinds: Mapping[str, SceneFormat]) -> SceneFormat | None:
    """The raw format that the caller prefers to JSON; None for JSON."""
    for kind in request.headers.get("accept", "*/*").split(","):
        name = kind.split(";")[0].strip().lower()
        if name in kinds:
            return kinds[name]
        if name in ("application/json", "*/*"):
            return None
    return None


async def draw(
    request: Request, engine: Engine, reading: Reading, orders: Sequence[Order], height: int, width: int
) -> list[Drawn]:
    """The pictures; and if the caller leaves while the order waits, it is never drawn."""
    drawing = engine.draw(reading.model, reading.steps, orders, height, width)
    return await unless_gone(request, drawing)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits the work, and cancels it when the caller disconnects. The request's body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the caller has left", code="client_closed_request")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer(
    engine: Engine, reading: Reading, drawn: Sequence[Drawn], crop: tuple[int, int], labels: Sequence[str | None]
) -> Response:
    """The pictures, cropped to (height, width) and encoded off the loop, as JSON or raw bytes."""
    started = time.perf_counter()
    loop = asyncio.get_running_loop()
    height, width = crop

    def encoded(picture: Drawn) -> bytes:
        return encode(picture.pixels[:height, :width], reading.output_format, reading.quality)

    files = await asyncio.gather(*(loop.run_in_executor(engine.codec, encoded, picture) for picture in drawn))
    turns = {picture.turn: picture for picture in drawn}.values()
    timings = Timings(
        queue_ms=round(1e3 * drawn[0].queue_s, 3),
        forward_ms=round(1e3 * sum(turn.forward_s for turn in turns), 3),
        encode_ms=round(1e3 * (time.perf_counter() - started), 3),
        batch=max(turn.batch for turn in turns),
    )
    stages = {"queue": timings.queue_ms, "forward": timings.forward_ms, "encode": timings.encode_ms}
    headers = {
        "Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items()),
        "X-Fewstep-Model": quote(reading.model.name),
        "X-Fewstep-Seed": str(reading.seed),
        "X-Fewstep-Steps": str(reading.steps),
        "X-Fewstep-Nfe": str(reading.model.nfe(reading.steps)),
    }
    if reading.raw:
        if labels[0] is not None:
            headers["X-Fewstep-Label"] = quote(labels[0])
        return Response(files[0], media_type=f"image/{reading.output_format}", headers=headers)
    content = ImagesAnswer(
        created=int(time.time()),
        data=[
            ImageData(b64_json=base64.b64encode(file).decode(), seed=seed, label=label)
            for file, seed, label in zip(files, reading.seeds, labels, strict=True)
        ],
        model=reading.model.name,
        steps=reading.steps,
        nfe=reading.model.nfe(reading.steps),
        seed=reading.seed,
        output_format=reading.output_format,
        size=f"{width}x{height}",
        timings=timings,
    )
    return JSONResponse(content.model_dump(), headers=headers)


def engine_of(request: Request) -> Engine:
    """The application's one engine."""
    return cast(Engine, request.app.state.engine)
