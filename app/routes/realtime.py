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

from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from pydantic_core import to_json

from app.engine.engine import Engine, engine_of
from app.errors import ApiError, ErrorAnswer, from_exception, overloaded
from app.requests.answers import ERRORS, choice_of, draw, facts_of, timings_of
from app.requests.bodies import schema_of
from app.requests.orders import edits, from_noise, from_picture, generates, make_plan
from app.schemas import RealtimeRequest
from distillers.errors import BadInput

router = APIRouter()
CONNECTIONS = 64  # at once; each holds two pictures at most
EACH = 16  # of them for one caller: a key, or an address where there are no keys
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
    caller = _caller_of(websocket)
    if len(open_now) >= CONNECTIONS:
        return await websocket.send_denial_response(overloaded(f"{CONNECTIONS} connections are open", 5).response())
    if sum(session.caller == caller for session in open_now) >= EACH:
        refusal = ApiError(
            429, f"{EACH} connections are open already", code="too_many_connections", headers={"Retry-After": "5"}
        )
        return await websocket.send_denial_response(refusal.response())
    offered = websocket.scope.get("subprotocols", [])
    await websocket.accept(subprotocol=next((name for name in offered if name.startswith(PROTOCOL)), None))
    session = _Session(websocket, engine_of(websocket), caller)
    open_now.add(session)
    try:
        await session.run()
    finally:
        open_now.remove(session)


@router.get(
    "/v1/realtime",
    tags=["images"],
    status_code=101,
    response_class=Response,
    responses={
        101: {"description": "A WebSocket. JSON text messages ask, binary messages answer; errors are JSON text."},
        **{status: ERRORS[status] for status in (401, 403, 429, 503)},
        426: {"model": ErrorAnswer, "description": "The request asks for no WebSocket."},
    },
    openapi_extra={"x-messages": schema_of(RealtimeRequest)},
    summary="Draw while something changes",
)
async def describe() -> Response:
    """Open a WebSocket; the latest request wins, and one that waits then is counted and never drawn.

    A text message is a request in JSON, as `x-messages` here describes it. With "image": true the next binary message
    is its picture. An answer is one binary message: 4 bytes with the length of a header (big-endian), the header (JSON
    with seq, seed, model, steps, width, height, output_format, timings, dropped, ...), and the picture. An error is a
    JSON text message {"seq", "error"}, after which the connection goes on.
    """
    message = "this address speaks WebSocket: send Connection: Upgrade and Upgrade: websocket"
    raise ApiError(426, message, code="upgrade_required", headers={"Upgrade": "websocket", "Connection": "Upgrade"})


def _caller_of(websocket: WebSocket) -> str:
    """Return the name of the caller's key; without one the address it calls from."""
    key: str | None = websocket.scope["record"].key
    return f"key {key}" if key else f"address {websocket.client.host if websocket.client else ''}"


class _Session:
    """Receives the messages of a connection and, at the same time, draws its latest request."""

    def __init__(self, websocket: WebSocket, engine: Engine, caller: str) -> None:
        self.websocket, self.engine, self.caller = websocket, engine, caller
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
