"""Control access by API keys from a file, with scopes and rate limits.

The file holds no key, only SHA-256 digests; random keys of 256 bits need no slower hash. Keys come in a header, never
in a URL, which others may log:

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
from collections.abc import Sequence
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
MOST = 10**9  # of a limit
RECHECK = 1.0  # seconds between checks of the file


class Key(BaseModel):
    """Describes one key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Stands in the log.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the key, in hex.")
    scopes: frozenset[Literal["infer", "benchmark", "admin", "metrics"]] = Field(min_length=1)
    requests_per_minute: int | None = Field(
        None, ge=1, le=MOST, strict=True, description="A minute's worth may come at once."
    )
    concurrent: int | None = Field(
        None, ge=1, le=MOST, strict=True, description="Requests being answered at the same time."
    )


class Allowance:
    """Counts the requests of a key against its limits. Those that only read are not counted."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.digest = bytes.fromhex(key.sha256)
        self._tokens, self._at = float(key.requests_per_minute or 0), time.monotonic()
        self._running, self._mean_s = 0, 1.0

    def enter(self) -> None:
        """Count a request. ApiError 429 over a limit, with the seconds until another try makes sense."""
        if self.key.concurrent is not None and self._running >= self.key.concurrent:
            raise self._refusal(f"{self.key.concurrent} requests at the same time", self._mean_s)
        if (wait := self._wait()) > 0:
            raise self._refusal(f"{self.key.requests_per_minute} requests per minute", wait)
        self._tokens -= 1
        self._running += 1

    def leave(self, seconds: float) -> None:
        """Count a request as answered after so many seconds."""
        self._running -= 1
        self._mean_s += 0.1 * (seconds - self._mean_s)

    async def turn(self) -> None:
        """Wait until the rate allows another request over a WebSocket, which is delayed instead of refused."""
        while (wait := self._wait()) > 0:
            await asyncio.sleep(wait)
        self._tokens -= 1

    def _wait(self) -> float:
        """Return the seconds until the rate allows a request; 0 for at once."""
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
    """Holds the keys of a file and reads it again when it has changed. A broken file leaves the keys as they were.

    Raises:
        BadInput: at the start, naming the entry and the field; later it is only logged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stamp = self._file_stamp()
        self._allowances = [Allowance(key) for key in read(file)]
        self._checked = time.monotonic()

    def find(self, given: bytes) -> Allowance | None:
        """Return the allowance of a key; None for an unknown one. All digests are compared, each in constant time."""
        self._refresh()
        digest = hashlib.sha256(given).digest()
        found = [one for one in self._allowances if hmac.compare_digest(one.digest, digest)]
        return found[0] if found else None

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            facts = self.file.stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _refresh(self) -> None:
        if (now := time.monotonic()) < self._checked + RECHECK:
            return
        self._checked = now
        if (stamp := self._file_stamp()) == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read(self.file)
        except BadInput as error:
            log.error("the keys stay as they were: %s", error)
            return
        known = {allowance.key: allowance for allowance in self._allowances}  # a rate that was used up stays so
        self._allowances = [known.get(key) or Allowance(key) for key in keys]
        log.info("%d keys were read again", len(keys))


def read(file: Path) -> list[Key]:
    """Read and check the keys of a TOML file. BadInput names the entry and the field, and repeats no secret."""
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
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


def scope_of(scope: Scope) -> Literal["infer", "benchmark", "admin", "metrics"] | None:
    """Return the scope that a request needs; None where no key is needed. Unknown paths need `infer`."""
    path = path_of(scope)
    if path in PUBLIC or path.startswith("/static/"):
        return None
    if path == "/metrics":
        return "metrics"
    if path == "/v1/benchmarks":
        return "benchmark"
    changes_models = path.startswith("/v1/models/") and scope.get("method") not in ("GET", "HEAD")
    return "admin" if changes_models else "infer"


class Access:
    """Accepts or refuses requests before their body is read, as ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Keys | None, metrics: Metrics, origins: Sequence[str] = ()) -> None:
        self.app, self.keys, self.metrics, self.origins = app, keys, metrics, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or answer 401 without a valid key, 403 without the scope, 429 over the limits.

        A page of another site gets 403 for work, which its browser would ask for without the user's knowledge.
        """
        if scope["type"] == "lifespan" or (needed := scope_of(scope)) is None:
            return await self.app(scope, receive, send)
        try:
            allowance = self._admit(scope, needed)
        except ApiError as refusal:
            self.metrics.rejected(refusal.body.code or "")
            return await refusal.response()(scope, receive, send)
        if scope["type"] == "websocket":
            send = _choose_subprotocol(scope, send)
        if allowance is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            receive = _rate_limited(receive, allowance)
        started = time.perf_counter()
        try:
            await self.app(scope, receive, send)
        finally:
            allowance.leave(time.perf_counter() - started)

    def _admit(self, scope: Scope, needed: str) -> Allowance | None:
        """Check a request and return the allowance that it was counted against; None where nothing is counted."""
        if (origin := scope["record"].request_headers.get(b"origin")) is not None and is_work(scope):
            self._check_origin(scope, origin.decode("latin-1").lower())
        if self.keys is None:
            if needed == "admin":
                allow = "set FEWSTEP_KEYS to a file with a key of scope admin (`fewstep key NAME --scopes admin`)"
                raise ApiError(403, f"models are loaded with a key only: {allow}", code="admin_disabled")
            return None
        allowance = self.keys.find(_key_of(scope))
        if allowance is None:
            message = "no valid API key: send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        scope["record"].key = allowance.key.name
        if needed not in allowance.key.scopes:
            has = ", ".join(sorted(allowance.key.scopes))
            raise ApiError(403, f"the key {allowance.key.name} is for {has}, not for {needed}", code="missing_scope")
        if not is_work(scope):
            return None
        allowance.enter()
        return allowance

    def _check_origin(self, scope: Scope, origin: str) -> None:
        """Refuse a browser's request from a page that neither this server nor an allowed one has sent."""
        headers = scope["record"].request_headers
        if headers.get(b"sec-fetch-site") in (b"same-origin", b"none") or origin in self.origins:
            return
        if origin.partition("://")[2] != headers.get(b"host", b"").decode("latin-1").lower():
            message = "pages of this origin may not ask: FEWSTEP_ORIGINS names those that may"
            raise ApiError(403, message, code="foreign_origin")


def _key_of(scope: Scope) -> bytes:
    """Return the key that a request carries; b"" for none."""
    kind, _, key = scope["record"].request_headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return bytes(key.strip())
    offered = [name for name in scope.get("subprotocols", ()) if name.startswith(SUBPROTOCOL)]
    return offered[0].removeprefix(SUBPROTOCOL).encode() if offered else b""


def _rate_limited(receive: Receive, allowance: Allowance) -> Receive:
    """Delay text messages, each of which is a request, to the rate of the key."""

    async def receive_limited() -> Message:
        message = await receive()
        if message.get("text") is not None:
            await allowance.turn()
        return message

    return receive_limited


def _choose_subprotocol(scope: Scope, send: Send) -> Send:
    """Choose one of the offered subprotocols, not the one with the key: browsers break off if none is chosen."""
    offered = scope.get("subprotocols", [])
    others = [name for name in offered if not name.startswith(SUBPROTOCOL)]

    async def send_choice(message: Message) -> None:
        if message["type"] == "websocket.accept" and not message.get("subprotocol") and offered:
            message["subprotocol"] = (others or offered)[0]
        await send(message)

    scope["subprotocols"] = others
    return send_choice
