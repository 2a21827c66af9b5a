"""Put a server under load and check its answers: HTTP/1.1 over bare sockets, in a process of its own, without torch.

In a closed loop each of so many callers asks again when answered. In an open loop requests arrive at random (Poisson),
whether or not the server keeps up, and a latency counts from the moment at which the request was meant to be sent, so
waiting for a connection or for this client counts too. Every picture that came back is decoded and compared with the
raw forward pass of its seed, after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PATIENCE_S = 3.0  # for answers that are still missing when the load has ended
CONNECTIONS = 900  # of an open loop at most; beyond it requests wait here, and the wait counts
SPIN_S = 1.2e-3  # timers are no finer than this
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


class Broken(ConnectionError):
    """Report that the server closed the connection, or that its answer is no HTTP with a length."""


# --- one connection


def parse(buffer: bytearray) -> tuple[int, bytes, bool] | None:
    """Parse one answer into (status, body, whether the connection stays); None while it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = bytes(buffer[:end]).split(b"\r\n")
    if not first.startswith(b"HTTP/1."):
        raise Broken("no HTTP answer")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    stays = headers.get(b"connection", b"").lower() != b"close"
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = _join_chunks(buffer, end + 4)
    elif b"content-length" in headers:
        length = int(headers[b"content-length"])
        body = bytes(buffer[end + 4 : end + 4 + length]) if len(buffer) >= end + 4 + length else None
    else:
        raise Broken("an answer without a length")
    return None if body is None else (int(first.split(b" ", 2)[1]), body, stays)


def _join_chunks(buffer: bytearray, at: int) -> bytes | None:
    """Join the chunks of a body that starts at a position; None while it is incomplete."""
    parts: list[bytes] = []
    while (end := buffer.find(b"\r\n", at)) >= 0:
        length = int(bytes(buffer[at:end]).split(b";")[0], 16)
        if len(buffer) < end + 2 + length + 2:
            return None
        if length == 0:
            return b"".join(parts)
        parts.append(bytes(buffer[end + 2 : end + 2 + length]))
        at = end + 2 + length + 2
    return None


class Connection(asyncio.Protocol):
    """Send one request at a time; connect when there is a request, and again after the server has closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def open(self) -> None:
        """Connect, unless there is a connection."""
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self.port)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return (status, body). Raises Broken, or another OSError, without an answer."""
        await self.open()
        assert self._transport is not None
        self._buffer.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        """Close the connection and abandon a request in flight."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes from the event loop, and finish the request when its answer is whole."""
        self._buffer += data
        try:
            answer = parse(self._buffer)
        except (Broken, ValueError) as error:
            self._fail(error)
            return
        if answer is not None and self._answer is not None and not self._answer.done():
            status, body, stays = answer
            if not stays:
                self.close()
            self._answer.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request in flight when the event loop says that the connection is gone."""
        self._transport = None
        self._fail(error or Broken("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Broken(str(error)))


# --- the two loops


@dataclass(slots=True)
class Exchange:
    """Record one request and its answer; seconds by time.perf_counter."""

    index: int  # in the pool
    intended: float
    sent: float = math.nan
    done: float = math.nan
    status: int = 0  # 0: no answer
    body: bytes = b""


async def closed_loop(
    port: int, pool: Sequence[bytes], callers: int, seconds: float, warm_s: float = 0.1
) -> tuple[list[Exchange], float]:
    """Run a closed loop; return all requests, and when the `seconds` began that count: `warm_s` after the first round.

    In the first round, an answer for each caller, batches are not full yet.
    """
    turn, asked = itertools.count(), list[Exchange]()
    connections = [Connection(port) for _ in range(callers)]
    start = end = math.inf

    async def caller(connection: Connection) -> None:
        nonlocal start, end
        while (now := time.perf_counter()) < end:
            one = Exchange(next(turn) % len(pool), now, now)
            try:
                one.status, one.body = await connection.ask(pool[one.index])
            except OSError:
                await asyncio.sleep(0.01)  # a server that refuses connections is not to be flooded with them
            one.done = time.perf_counter()
            asked.append(one)
            if len(asked) == callers:
                start = one.done + warm_s
                end = start + seconds

    tasks = [asyncio.ensure_future(caller(connection)) for connection in connections]
    _, late = await asyncio.wait(tasks, timeout=warm_s + seconds + 2 * PATIENCE_S)  # first round, last
    await _cancel(late)
    for connection in connections:
        connection.close()
    return asked, start


def arrivals(phases: Iterable[tuple[float, float]], seed: int) -> NDArray[np.float64]:
    """Draw Poisson arrival times in seconds, for phases of (requests a second, seconds) one after the other."""
    rng, at, times = np.random.default_rng(seed), 0.0, list[NDArray[np.float64]]()
    for rate, seconds in phases:
        gaps = rng.exponential(1 / rate, int(rate * seconds + 10 * math.sqrt(rate * seconds) + 10))
        come = np.cumsum(gaps)
        times.append(at + come[come < seconds])
        at += seconds
    return np.concatenate(times)


async def open_loop(
    port: int, pool: Sequence[bytes], times: Sequence[float] | NDArray[np.float64], patience_s: float = PATIENCE_S
) -> list[Exchange]:
    """Run an open loop: a request at each arrival time. Without an answer `patience_s` after the last, done is nan."""
    idle = [Connection(port) for _ in range(8)]
    await asyncio.gather(*(connection.open() for connection in idle), return_exceptions=True)
    every, waiting, free = list(idle), set[asyncio.Task[None]](), asyncio.Semaphore(CONNECTIONS)
    start = time.perf_counter() + 0.01
    asked = [Exchange(i % len(pool), start + at) for i, at in enumerate(times)]

    async def ask(one: Exchange) -> None:
        async with free:
            if not idle:
                idle.append(Connection(port))
                every.append(idle[-1])
            connection = idle.pop()
            one.sent = time.perf_counter()
            try:
                one.status, one.body = await connection.ask(pool[one.index])
            except OSError:
                pass
            finally:
                one.done = time.perf_counter()
                idle.append(connection)

    for one in asked:
        if (left := one.intended - time.perf_counter()) > SPIN_S:
            await asyncio.sleep(left - SPIN_S)
        while time.perf_counter() < one.intended:
            await asyncio.sleep(0)
        task = asyncio.ensure_future(ask(one))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        _, late = await asyncio.wait(set(waiting), timeout=patience_s)
        await _cancel(late)
    for one in asked:
        if not one.status and one.done > asked[-1].intended + patience_s:
            one.done = math.nan
    for connection in every:
        connection.close()
    return asked


async def abandon_requests(port: int, pool: Sequence[bytes], callers: int, after_s: float = 0.02) -> None:
    """Send requests of so many callers at once, and close their connections before they are answered."""
    connections = [Connection(port) for _ in range(callers)]
    await asyncio.gather(*(connection.open() for connection in connections))
    asking = [asyncio.ensure_future(one.ask(pool[i % len(pool)])) for i, one in enumerate(connections)]
    await asyncio.sleep(after_s)
    for connection in connections:
        connection.close()
    await asyncio.gather(*asking, return_exceptions=True)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- what came back


@dataclass
class Gate:
    """Compare answers with the pictures of the raw forward pass.

    Args:
        expected: those pictures, (N, H, W, 3) uint8.
        tolerance: how many levels of 255 a pixel may differ by.
        unwrap: from an answer's body to a PNG.
    """

    expected: Pixels
    tolerance: int
    unwrap: Callable[[bytes], bytes] = bytes
    _differences: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def difference(self, index: int, body: bytes) -> int:
        """Return the largest difference in levels of 255; 256 for what is no picture, or not one of that size."""
        if (index, body) not in self._differences:
            try:
                with Image.open(io.BytesIO(self.unwrap(body)), formats=("PNG",)) as picture:
                    pixels = np.asarray(picture)
                same = pixels.shape == self.expected[index].shape
                levels = int(np.abs(pixels.astype(int) - self.expected[index]).max()) if same else 256
            except Exception:  # whatever a broken file makes Pillow or json raise
                levels = 256
            self._differences[index, body] = levels
        return self._differences[index, body]


def first_of_list(body: bytes) -> bytes:
    """Decode the PNG in a JSON list of one base64 text."""
    return base64.b64decode(json.loads(body)[0])


UNWRAP: dict[str, Callable[[bytes], bytes]] = {"bytes": bytes, "list": first_of_list}


def summarise(every: Sequence[Exchange], seconds: float, gate: Gate, start: float | None = None) -> dict[str, Any]:
    """Summarise rates, latencies in ms, and what the gate says of every answer. Only right pictures count as images.

    Args:
        start: counted is what was answered within `seconds` from then; None: all.
    """
    served = [one for one in every if one.status == 200]
    differences = [gate.difference(one.index, one.body) for one in served]
    asked = [one for one in every if start is None or start <= one.done <= start + seconds]
    right = [one.done for one in served if gate.difference(one.index, one.body) <= gate.tolerance]
    end = max((one.done for one in every if not math.isnan(one.done)), default=0.0)
    # who was sent away is counted apart; who got no answer at all has waited at least until the end
    waited = [one for one in asked if one.status == 200 or math.isnan(one.done)]
    latencies = [1e3 * ((end if math.isnan(one.done) else one.done) - one.intended) for one in waited]
    late = [1e3 * (one.sent - one.intended) for one in asked if not math.isnan(one.sent)]
    return {
        "asked": len(asked),
        "images_per_second": len(right) / seconds if start is None else rate(right, start, start + seconds),
        "served": len(served),  # before and after the counted seconds, too
        "failed": dict(Counter(str(one.status or "none") for one in every if one.status != 200)),
        "latency_ms": quantiles(latencies),
        "sent_late_ms_p99": float(np.quantile(late, 0.99)) if late else None,
        "bytes": len(served[0].body) if served else 0,
        "wrong": sum(levels > gate.tolerance for levels in differences),
        "max_difference": max(differences, default=None),
    }


def rate(answers: Iterable[float], start: float, end: float) -> float:
    """Count answers a second between two moments over whole batches, of a server that may answer in batches.

    Sixteen pictures at once every 0.3 s are 53 a second, but half a second sees 16 of them or 32. So the clock runs
    from the last answer before `start` to the last one before `end`; but on to `end`, less the longest pause so far, if
    the server fell silent.
    """
    times = sorted(answers)
    since = max((at for at in times if at < start), default=start)
    within = [at for at in times if start <= at <= end]
    if not within:
        return 0.0
    pause = float(np.diff([since, *within]).max())
    return len(within) / (max(within[-1], end - pause) - since)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return p50 to p99.9, mean and max; None without values."""
    if not len(values):
        return None
    figures = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {**figures, "mean": float(np.mean(values)), "max": float(np.max(values))}


def recovery(asked: Sequence[Exchange], start: float, end: float) -> float | None:
    """Return the seconds from the end of a burst until latency is again at most twice what it was before, for good.

    Args:
        asked: of an open loop, before, in and after the burst.
        start, end: of the burst, in seconds after the first request was meant to be sent.

    Returns:
        None if it was not again by the last request.
    """
    first = asked[0].intended
    before = [one.done - one.intended for one in asked if one.intended - first < start and one.status == 200]
    after = [one for one in asked if one.intended - first >= end]
    if not before or not after:
        return None
    limit, tenths = 2 * float(np.quantile(before, 0.9)), dict[int, list[float]]()
    for one in after:
        answered = one.status == 200 and not math.isnan(one.done)
        tenths.setdefault(int(10 * (one.intended - first - end)), []).append(
            one.done - one.intended if answered else math.inf
        )
    bad = [tenth for tenth, waits in tenths.items() if float(np.median(waits)) > limit]
    if max(tenths) in bad:
        return None
    return (max(bad) + 1) / 10 if bad else 0.0


# --- the process


def main() -> None:
    """Answer commands in JSON lines: `pool` (a system's requests and their pictures), `closed`, `open`, `abandon`."""
    with suppress(ImportError):  # only slower without
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    run = asyncio.run
    pool: list[bytes] = []
    port, gate = 0, Gate(np.zeros((0, 0, 0, 3), np.uint8), 0)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "pool":
            pool = [base64.b64decode(request) for request in command["requests"]]
            expected = np.load(Path(command["expected"]))
            port, gate = command["port"], Gate(expected, command["tolerance"], UNWRAP[command["answer"]])
        elif command["do"] == "closed":
            requests, start = run(closed_loop(port, pool, command["callers"], command["seconds"], command["warm_s"]))
            answer = summarise(requests, command["seconds"], gate, start)
        elif command["do"] == "abandon":
            run(abandon_requests(port, pool, command["callers"]))
        else:
            times = arrivals(command["phases"], command["seed"])
            requests = run(open_loop(port, pool, times))
            answer = summarise(requests, sum(seconds for _, seconds in command["phases"]), gate)
            if len(command["phases"]) == 3:
                before, burst, _ = (seconds for _, seconds in command["phases"])
                answer["recovery_s"] = recovery(requests, before, before + burst)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
