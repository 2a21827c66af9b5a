"""WS /v1/realtime sends pictures while somebody types or drags, always for the latest request.

The caller sends JSON text messages with a growing `seq`; one with `"image": true` is followed by a binary message, its
picture. In each connection one request is drawn and one waits: a newer one replaces the one that waits, which is
counted and never drawn. An answer is one binary message,

    4 bytes   length of the header, big-endian
    header    JSON: seq, seed, model, steps, width, height, output_format, timings, dropped (until now), ...
    the rest  the picture

and an error is a JSON text message {"seq", "error"}, after which the connection goes on.
"""

import asyncio
import json
from dataclasses import dataclass

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from pydantic_core import to_json

from app.engine.engine import Engine, engine_of
from app.errors import from_exception, overloaded
from app.requests.answers import choice_of, draw, facts_of, timings_of
from app.requests.orders import edits, from_noise, from_picture, generates, make_plan
from app.schemas import RealtimeRequest
from distillers.errors import BadInput

router = APIRouter()
CONNECTIONS = 64  # at once; each holds two pictures at most
IDLE = 300.0  # seconds without a message before it is closed
MESSAGE = 1 << 16  # characters of a text message
PROTOCOL = "fewstep"  # beginning of the names of our subprotocols


@dataclass(frozen=True)
class _Request:
    request: RealtimeRequest
    picture: bytes | None


@router.websocket("/v1/realtime")
async def realtime(websocket: WebSocket) -> None:
    """Serve one connection, from its opening to its end."""
    open_now: set[_Session] = websocket.app.state.realtime
    if len(open_now) >= CONNECTIONS:
        return await websocket.send_denial_response(overloaded(f"{CONNECTIONS} connections are open", 5).response())
    offered = websocket.scope.get("subprotocols", [])
    await websocket.accept(subprotocol=next((name for name in offered if name.startswith(PROTOCOL)), None))
    session = _Session(websocket, engine_of(websocket))
    open_now.add(session)
    try:
        await session.run()
    finally:
        open_now.remove(session)


class _Session:
    """Receives the messages of a connection and, at the same time, draws its latest request."""

    def __init__(self, websocket: WebSocket, engine: Engine) -> None:
        self.websocket, self.engine = websocket, engine
        self.waiting: _Request | None = None
        self.expected: RealtimeRequest | None = None  # whose picture comes next
        self.last = -1  # seq
        self.dropped = 0
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Serve until the caller leaves; a request that waits then is never drawn."""
        drawing = asyncio.create_task(self._draw_latest())
        try:
            await self._listen()
        except WebSocketDisconnect:  # the caller left before an error could be sent
            pass
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE):
                    message = await self.websocket.receive()
            except TimeoutError:
                return await self.websocket.close(1000, f"no message for {IDLE:g} s")
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            try:
                self._take_text(text) if text is not None else self._take_picture(message["bytes"])
            except (BadInput, ValidationError) as error:
                await self._send_error(_seq_of(text), error)

    def _take_text(self, text: str) -> None:
        if self.expected is not None:  # its picture will not come
            self.expected = None
            self.dropped += 1
        if len(text) > MESSAGE:
            raise BadInput("message", f"{len(text)} characters", f"{MESSAGE} at most")
        request = RealtimeRequest.model_validate_json(text)
        if request.seq <= self.last:
            raise BadInput("seq", request.seq, f"above {self.last}: it grows from message to message")
        self.last = request.seq
        if request.image:
            self.expected = request
        else:
            self._take(_Request(request, None))

    def _take_picture(self, picture: bytes) -> None:
        request, self.expected = self.expected, None
        if request is None:
            raise BadInput(
                "message", f"{len(picture)} bytes", 'a binary message after a text message with "image": true'
            )
        limit = self.engine.settings.max_body_bytes
        if len(picture) > limit:
            raise BadInput("message", f"{len(picture)} bytes", f"{limit} at most")
        self._take(_Request(request, picture))

    def _take(self, asked: _Request) -> None:
        self.dropped += self.waiting is not None
        self.waiting = asked
        self.wake.set()

    async def _draw_latest(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            asked, self.waiting = self.waiting, None
            assert asked is not None
            try:
                frame = await self._frame(asked)
            except Exception as error:
                await self._send_error(asked.request.seq, error)
            else:
                await self.websocket.send_bytes(frame)

    async def _frame(self, asked: _Request) -> bytes:
        """Draw a request and return the answer's bytes."""
        engine, body = self.engine, asked.request
        fits = generates(body) if asked.picture is None else edits(engine, body)
        plan = await make_plan(engine, body, fits=fits, raw=body.output_format)
        if asked.picture is not None:
            work = await from_picture(engine, plan, body, asked.picture)
        elif plan.model.translates:
            raise BadInput("image", False, f"true, and a binary message with the SAR picture: {plan.model.name}")
        else:
            work = from_noise(plan, body)
        (picture,) = await draw(engine, work)
        facts = {
            "seq": body.seq,
            **facts_of(work),
            "label": work.labels[0],
            "width": work.crop[1],
            "height": work.crop[0],
            "timings": timings_of([picture]),
            "chosen": choice_of(plan),
            "dropped": self.dropped,
        }
        header = to_json(facts)
        return b"%b%b%b" % (len(header).to_bytes(4), header, picture.file)

    async def _send_error(self, seq: int | None, error: Exception) -> None:
        message = {"seq": seq, "error": from_exception(error).body.model_dump()}
        await self.websocket.send_text(to_json(message).decode())


def _seq_of(text: str | None) -> int | None:
    """Return the seq of any message, if it has one, so that the caller can match the error to its request."""
    if text is None or len(text) > MESSAGE:
        return None
    try:
        seq = json.loads(text)["seq"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return seq if type(seq) is int else None
