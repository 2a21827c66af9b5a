"""Who may ask for what, and how much of it: API keys from a file, their scopes, their rates.

The file holds no key, only SHA-256 digests; random keys of 256 bits need no slower hash. Keys come in a header, never
in a URL, which would be logged on its way:

    Authorization: Bearer KEY                      as OpenAI's clients send it
    Sec-WebSocket-Protocol: fewstep, fewstep-key.KEY      for browsers, whose WebSockets send no other header

Without a file everybody may infer and read the metrics, and nobody may load or unload models.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import time
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError
from app.middleware.request_log import PROBES, is_work, path_of
from app.telemetry.metrics import Metrics
from distillers.errors import BadInput

log = logging.getLogger("fewstep.access")
PUBLIC = (PROBES - {"/metrics"}) | {"/", "/docs", "/openapi.json"}  # and /static/: the page asks for a key itself
SUBPROTOCOL = "fewstep-key."
RECHECK = 1.0  # seconds between looks at the file


class Key(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Stands in the log.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the key, in hex.")
    scopes: frozenset[Literal["infer", "admin", "metrics"]] = Field(min_length=1)
    requests_per_minute: int | None = Field(None, ge=1, strict=True, description="A minute's worth may come at once.")
    concurrent: int | None = Field(None, ge=1, strict=True, description="Requests being answered at the same time.")


class Allowance:
    """What a key may still do now. Requests that only read cost nothing."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.digest = bytes.fromhex(key.sha256)
        self._tokens, self._at = float(key.requests_per_minute or 0), time.monotonic()
        self._inside, self._mean_s = 0, 1.0

    def enter(self) -> None:
        """Takes a request in. 429 with the seconds until another try makes sense."""
        if self.key.concurrent is not None and self._inside >= self.key.concurrent:
            raise self._refusal(f"{self.key.concurrent} requests at the same time", self._mean_s)
        if (wait := self._wait()) > 0:
            raise self._refusal(f"{self.key.requests_per_minute} requests per minute", wait)
        self._tokens -= 1
        self._inside += 1

    def leave(self, seconds: float) -> None:
        """The request was answered, after so long."""
        self._inside -= 1
        self._mean_s += 0.1 * (seconds - self._mean_s)

    async def turn(self) -> None:
        """One more of the same visitor, who waits instead of being refused: a request over a WebSocket."""
        while (wait := self._wait()) > 0:
            await asyncio.sleep(wait)
        self._tokens -= 1

    def _wait(self) -> float:
        """Seconds until a request may be taken; 0 for at once."""
        if self.key.requests_per_minute is None:
            return 0.0
        now, most = time.monotonic(), float(self.key.requests_per_minute)
        self._tokens, self._at = min(most, self._tokens + (now - self._at) * most / 60), now
        return max(0.0, (1 - self._tokens) * 60 / most)

    def _refusal(self, limit: str, seconds: float) -> ApiError:
        message = f"the key {self.key.name} is allowed {limit}"
        after = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return ApiError(429, message, code="rate_limit_exceeded", headers=after)


class Keys:
    """The file's keys, as it is now: it is read again when it has changed, and kept as it was when it is broken.

    Raises:
        BadInput: at the start, naming the entry and the field; later that is only logged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stamp = self._look()
        self._allowances = [Allowance(key) for key in read(file)]
        self._checked = time.monotonic()

    def find(self, given: bytes) -> Allowance | None:
        """Whose key it is. Every digest is compared, and each in constant time."""
        self._refresh()
        digest = hashlib.sha256(given).digest()
        found = [one for one in self._allowances if hmac.compare_digest(one.digest, digest)]
        return found[0] if found else None

    def _look(self) -> tuple[int, int, int] | None:
        try:
            facts = self.file.stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _refresh(self) -> None:
        if (now := time.monotonic()) < self._checked + RECHECK:
            return
        self._checked = now
        if (stamp := self._look()) == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read(self.file)
        except BadInput as error:
            log.error("the keys stay as they were: %s", error)
            return
        known = {allowance.key: allowance for allowance in self._allowances}  # who had used up a rate still has
        self._allowances = [known.get(key) or Allowance(key) for key in keys]
        log.info("%d keys were read again", len(keys))


def read(file: Path) -> list[Key]:
    """The keys of a TOML file, checked. BadInput names the entry and the field, and repeats no secret."""
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput("FEWSTEP_KEYS", str(file), f"a readable TOML file with [[keys]] ({reason})") from None
    entries = table.pop("keys", [])
    if table or not isinstance(entries, list):
        raise BadInput("FEWSTEP_KEYS", ", ".join(table) or "keys", "[[keys]] entries, nothing else")
    keys: list[Key] = []
    for i, entry in enumerate(entries):
        try:
            key = Key.model_validate(entry)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            field = ".".join(["keys", str(i), *map(str, first["loc"])])
            raise BadInput(field, "something else", first["msg"].removeprefix("Input should be ")) from None
        for field in ("name", "sha256"):
            if getattr(key, field) in [getattr(other, field) for other in keys]:
                raise BadInput(f"keys.{i}.{field}", key.name, f"a {field} that no other key has")
        keys.append(key)
    return keys


def scope_of(scope: Scope) -> Literal["infer", "admin", "metrics"] | None:
    """What a key must be for; None where none is asked. Whatever is not known here needs `infer`."""
    path = path_of(scope)
    if path in PUBLIC or path.startswith("/static/"):
        return None
    if path == "/metrics":
        return "metrics"
    changes_models = path.startswith("/v1/models/") and scope.get("method") not in ("GET", "HEAD")
    return "admin" if changes_models else "infer"


class Access:
    """Pure ASGI: a request is let in or refused before a byte of its body is read."""

    def __init__(self, app: ASGIApp, keys: Keys | None, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """401 without a key, 403 without the scope, 429 over the limits."""
        if scope["type"] == "lifespan" or (needed := scope_of(scope)) is None:
            return await self.app(scope, receive, send)
        try:
            allowance = self._admit(scope, needed)
        except ApiError as refusal:
            self.metrics.rejected(refusal.body.code or "")
            return await refusal.response()(scope, receive, send)
        if scope["type"] == "websocket":
            send = _spoken(scope, send)
        if allowance is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            receive = _paced(receive, allowance)
        started = time.perf_counter()
        try:
            await self.app(scope, receive, send)
        finally:
            allowance.leave(time.perf_counter() - started)

    def _admit(self, scope: Scope, needed: str) -> Allowance | None:
        """The allowance that the request was counted against; None where nothing is counted."""
        if self.keys is None:
            if needed == "admin":
                allow = "set FEWSTEP_KEYS to a file with a key of scope admin (`fewstep key NAME --scopes admin`)"
                raise ApiError(403, f"models are loaded with a key only: {allow}", code="admin_disabled")
            return None
        allowance = self.keys.find(_given(scope))
        if allowance is None:
            message = "no valid API key: send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        scope["visit"].key = allowance.key.name
        if needed not in allowance.key.scopes:
            has = ", ".join(sorted(allowance.key.scopes))
            raise ApiError(403, f"the key {allowance.key.name} is for {has}, not for {needed}", code="missing_scope")
        if not is_work(scope):
            return None
        allowance.enter()
        return allowance


def _given(scope: Scope) -> bytes:
    """The key that came along; b"" for none, which is nobody's."""
    kind, _, key = scope["visit"].asked.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return bytes(key.strip())
    offered = [name for name in scope.get("subprotocols", ()) if name.startswith(SUBPROTOCOL)]
    return offered[0].removeprefix(SUBPROTOCOL).encode() if offered else b""


def _paced(receive: Receive, allowance: Allowance) -> Receive:
    """Text messages, each of which asks for something, come in no faster than the key's requests may."""

    async def paced() -> Message:
        message = await receive()
        if message.get("text") is not None:
            await allowance.turn()
        return message

    return paced


def _spoken(scope: Scope, send: Send) -> Send:
    """A browser breaks off unless one of the protocols it offered is chosen; another than the one with the key."""
    offered = scope.get("subprotocols", [])
    others = [name for name in offered if not name.startswith(SUBPROTOCOL)]

    async def spoken(message: Message) -> None:
        if message["type"] == "websocket.accept" and not message.get("subprotocol") and offered:
            message["subprotocol"] = (others or offered)[0]
        await send(message)

    scope["subprotocols"] = others
    return spoken
