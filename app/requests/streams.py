"""Answer with server-sent events in OpenAI's form: views of unfinished pictures, then each finished picture."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.engine.engine import Engine, Order, Picture
from app.errors import ApiError, from_exception
from app.media.image_files import Pixels
from app.requests.answers import (
    cancel_on_disconnect,
    choice_of,
    describe_answer,
    draw,
    encoder,
    facts_of,
    headers_of,
    timings_of,
)
from app.requests.orders import Work

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
    (b"x-accel-buffering", b"no"),  # or a proxy may hold the events back
]


STREAMED_RESPONSES = describe_answer(
    "text/event-stream",
    {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}},  # of each event
    "With stream: OpenAI's events *.partial_image and *.completed, or an event error.",
)


def partial_steps(first: int, steps: int, partial_images: int) -> dict[int, int]:
    """Return the steps whose estimates are sent, evenly spread over all but the last: step -> number of the view."""
    there = range(first, steps - 1)
    count = min(partial_images, len(there))
    return {there[(i + 1) * (len(there) + 1) // (count + 1) - 1]: i for i in range(count)}


async def stream(request: Request, engine: Engine, work: Work, event: str, partial_images: int) -> Response:
    """Draw the pictures and answer with events; what goes wrong before the first event is an ordinary error.

    Args:
        event: how the events' names begin: "image_generation" or "image_edit".
        partial_images: views of each unfinished picture, as many as there are steps for.
    """
    loop, arrivals = asyncio.get_running_loop(), asyncio.Queue[Partial | None]()
    views = partial_steps(work.first, work.plan.steps, partial_images)

    def with_callback(index: int, order: Order) -> Order:
        def on_partial(step: int, pixels: Pixels) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(arrivals.put_nowait, (index, views[step], pixels))

        return replace(order, on_partial=on_partial, partial_steps=views)

    orders = [with_callback(i, order) for i, order in enumerate(work.orders)]
    drawing = asyncio.ensure_future(draw(engine, work, orders))
    drawing.add_done_callback(lambda _: arrivals.put_nowait(None))
    try:
        arrived = await cancel_on_disconnect(request, arrivals.get())
        if arrived is None:
            drawing.result()  # raises here what is an error as a whole
    except BaseException:
        drawing.cancel()
        raise
    return _Stream(request, engine, work, event, drawing, arrivals, arrived)


class _Stream(Response):
    """Sends events while pictures are drawn, and cancels the drawing when the caller leaves."""

    def __init__(
        self,
        request: Request,
        engine: Engine,
        work: Work,
        event: str,
        drawing: "asyncio.Future[list[Picture]]",
        arrivals: "asyncio.Queue[Partial | None]",
        arrived: Partial | None,
    ) -> None:
        self.status_code, self.background = 200, None
        self.raw_headers = HEADERS + headers_of(work.plan, work.first)
        self.request, self.engine, self.work, self.event = request, engine, work, event
        self.drawing, self.arrivals, self.arrived = drawing, arrivals, arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as an ASGI application."""
        try:
            await cancel_on_disconnect(self.request, self._send(send))
        except (ApiError, OSError):  # the caller has left
            pass
        finally:
            self.drawing.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def put(name: str, content: dict[str, Any]) -> None:
            data = b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(content))
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            finish: Callable[[Pixels], bytes] = encoder(self.work)
            loop, arrived = asyncio.get_running_loop(), self.arrived
            while arrived is not None:
                index, view, pixels = arrived
                file = await loop.run_in_executor(self.engine.codec, finish, pixels)
                name = f"{self.event}.partial_image"
                await put(name, {"type": name, **self._picture(index, file), "partial_image_index": view})
                arrived = await self.arrivals.get()
            pictures = await self.drawing
            facts = {**facts_of(self.work), "chosen": choice_of(self.work.plan), "usage": USAGE}
            facts["timings"] = timings_of(pictures)
            name = f"{self.event}.completed"
            for index, picture in enumerate(pictures):
                await put(name, {"type": name, **facts, **self._picture(index, picture.file)})
        except Exception as error:
            await put("error", {"error": from_exception(error).body.model_dump()})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _picture(self, index: int, file: bytes) -> dict[str, Any]:
        """Return what both events say of a picture: OpenAI's fields, its seed and its label."""
        height, width = self.work.crop
        return {
            "b64_json": file,
            "created_at": int(time.time()),
            "size": f"{width}x{height}",
            "output_format": self.work.plan.output_format,
            "quality": "auto",
            "background": "opaque",
            "seed": self.work.plan.seeds[index],
            "label": self.work.labels[index],
        }
