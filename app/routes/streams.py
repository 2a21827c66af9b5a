"""Answers as server-sent events in OpenAI's form: views of the unfinished pictures, then each one finished."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.engine.engine import Drawn, Engine, Order
from app.errors import ApiError, from_bad_input, internal_error
from app.media.images import Pixels
from app.requests.answers import Reading, Work, chosen, draw, facts_of, finisher, headers_of, timings_of, unless_gone
from distillers.errors import BadInput

log = logging.getLogger("fewstep.routes")
Partial = tuple[int, int, Pixels]  # picture, number of the view, pixels
# OpenAI's clients read these; nothing here is counted in tokens
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathered the events would make them worthless
]


def told(error: Exception) -> ApiError:
    """An error as it is told where the answer has begun."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadInput):
        return from_bad_input(error)
    log.error("an answer failed", exc_info=error)
    return internal_error()


def shown(first: int, steps: int, partial_images: int) -> dict[int, int]:
    """Which steps' estimates are shown, evenly spread over those there are: step -> number of the view."""
    there = range(first, steps - 1)
    count = min(partial_images, len(there))
    return {there[(i + 1) * (len(there) + 1) // (count + 1) - 1]: i for i in range(count)}


async def stream(
    request: Request, engine: Engine, reading: Reading, work: Work, event: str, partial_images: int
) -> Response:
    """`event`: "image_generation" or "image_edit". What goes wrong before the first event is an ordinary error."""
    loop, arrivals = asyncio.get_running_loop(), asyncio.Queue[Partial | None]()
    views = shown(work.first, reading.steps, partial_images)

    def watched(index: int, order: Order) -> Order:
        def partial(step: int, pixels: Pixels) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(arrivals.put_nowait, (index, views[step], pixels))

        return replace(order, partial=partial, shown=views)

    orders = [watched(i, order) for i, order in enumerate(work.orders)]
    drawing = asyncio.ensure_future(draw(engine, reading, work, orders))
    drawing.add_done_callback(lambda _: arrivals.put_nowait(None))
    try:
        arrived = await unless_gone(request, arrivals.get())
        if arrived is None:
            drawing.result()  # raises here what is an error as a whole
    except BaseException:
        drawing.cancel()
        raise
    return _Stream(request, engine, reading, work, event, drawing, arrivals, arrived)


class _Stream(Response):
    """Sends while it draws; when the caller leaves, what still waits is never drawn."""

    def __init__(
        self,
        request: Request,
        engine: Engine,
        reading: Reading,
        work: Work,
        event: str,
        drawing: "asyncio.Future[list[Drawn]]",
        arrivals: "asyncio.Queue[Partial | None]",
        arrived: Partial | None,
    ) -> None:
        self.status_code, self.background = 200, None
        self.raw_headers = HEADERS + headers_of(reading, work.first)
        self.request, self.engine, self.reading, self.work, self.event = request, engine, reading, work, event
        self.drawing, self.arrivals, self.arrived = drawing, arrivals, arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await unless_gone(self.request, self._send(send))
        except (ApiError, OSError):  # nobody is there to be told
            pass
        finally:
            self.drawing.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def put(name: str, content: dict[str, Any]) -> None:
            data = b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(content))
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            finish: Callable[[Pixels], bytes] = finisher(self.reading, self.work)
            loop, arrived = asyncio.get_running_loop(), self.arrived
            while arrived is not None:
                index, view, pixels = arrived
                file = await loop.run_in_executor(self.engine.codec, finish, pixels)
                name = f"{self.event}.partial_image"
                await put(name, {"type": name, **self._picture(index, file), "partial_image_index": view})
                arrived = await self.arrivals.get()
            drawn = await self.drawing
            facts = {**facts_of(self.reading, self.work), "chosen": chosen(self.reading), "usage": USAGE}
            facts["timings"] = timings_of(drawn)
            name = f"{self.event}.completed"
            for index, picture in enumerate(drawn):
                await put(name, {"type": name, **facts, **self._picture(index, picture.file)})
        except Exception as error:
            await put("error", {"error": told(error).body.model_dump()})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _picture(self, index: int, file: bytes) -> dict[str, Any]:
        """What both events tell of one picture: OpenAI's fields, and which picture it is."""
        height, width = self.work.crop
        return {
            "b64_json": file,
            "created_at": int(time.time()),
            "size": f"{width}x{height}",
            "output_format": self.reading.output_format,
            "quality": "auto",
            "background": "opaque",
            "seed": self.reading.seeds[index],
            "label": self.work.labels[index],
        }
