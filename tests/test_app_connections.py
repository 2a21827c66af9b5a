"""What a connection may do before a request reaches the application, over real sockets."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import uvicorn
from service import GENERATE, http_get, publish, until, until_ready
from websockets.sync.client import connect

from app.main import create_app
from app.middleware.connections import MOST_HEAD_BYTES, GuardedProtocol
from app.settings import Settings

SECONDS = 1.0
BODY = b'{"seed": 1}'
ASK = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % GENERATE.encode()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    app = create_app(Settings(weights=root, device="cpu", tune_seconds=0, max_body_bytes=200_000, body_seconds=SECONDS))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=GuardedProtocol, log_level="error", timeout_keep_alive=75))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    found = server.servers[0].sockets[0].getsockname()[1]
    until_ready(lambda: http_get(f"http://127.0.0.1:{found}/readyz"))
    yield found
    server.should_exit = True
    thread.join()


def said(connection: socket.socket) -> bytes:
    """All that the server says until it closes, or nothing more for a while."""
    connection.settimeout(8 * SECONDS)
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except TimeoutError:
        parts.append(b"<open>")
    return b"".join(parts)


def asked(port: int, *parts: bytes) -> bytes:
    """What a server answers to parts that are sent one after another."""
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        for part in parts:
            connection.sendall(part)
        return said(connection)


def error_of(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"connection: close" in head, answer[:300]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", ["X-Big", "line", "many", "upgrade"])
def test_a_head_beyond_the_limit_is_431_and_no_more_of_it_is_kept(port: int, name: str, ended: bool) -> None:
    big = b"a" * (MOST_HEAD_BYTES + 1)
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
    if name == "line":
        parts = [b"GET /livez?%b HTTP/1.1\r\nHost: x\r\n" % big]
    elif name == "many":
        parts = [head + b"X-A: b\r\n" * 20_000]
    else:
        more = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" if name == "upgrade" else b""
        parts = [head + more + b"X-Big: ", big]
    answer = asked(port, *parts, b"\r\n\r\n" if ended else b"")
    assert error_of(answer, 431) == "headers_too_large"


def test_a_head_within_the_limit_is_read_however_it_is_cut(port: int) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Big: %b\r\n\r\n" % (b"a" * 60_000)
    assert asked(port, head).startswith(b"HTTP/1.1 200 ")
    assert asked(port, *(head[i : i + 7_000] for i in range(0, len(head), 7_000))).startswith(b"HTTP/1.1 200 ")


def test_an_endless_header_is_cut_off_and_delays_nobody(port: int) -> None:
    """And an endless trailer, which comes after the body."""
    for begin in (b"GET /livez HTTP/1.1\r\nX-Big: ", ASK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Big: "):
        with closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.sendall(begin)
            with pytest.raises(ConnectionError):
                for _ in range(20):  # megabytes, of which some fit into the buffers of the system
                    connection.sendall(b"a" * (1 << 20))
        assert http_get(f"http://127.0.0.1:{port}/livez").status_code == 200


def test_connections_that_bring_no_request_in_time_are_closed(port: int) -> None:
    for begin in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"G"):
        started = time.monotonic()
        answer = asked(port, begin)
        assert time.monotonic() - started > 0.9 * SECONDS
        assert (error_of(answer, 408) == "request_timeout") if begin else answer == b""
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /livez")  # the next one
        assert b"HTTP/1.1 408 " in (answer := said(connection)) and b"<open>" not in answer


def test_a_connection_that_waits_between_requests_is_kept(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        for _ in range(2):
            connection.sendall(ASK + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(2.5 * SECONDS)
            connection.recv(1 << 20)


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_a_refusal_is_read_by_a_caller_who_sends_all_first(port: int, declared: bool, close: bool) -> None:
    """As ordinary clients do: a connection that is closed with bytes unread is reset, and the answer is lost."""
    body = b"x" * (8 << 20)
    length = b"Content-Length: %d\r\n\r\n" % len(body) if declared else b"Transfer-Encoding: chunked\r\n\r\n800000\r\n"
    parts = [ASK + (b"Connection: close\r\n" if close else b"") + length, body, b"" if declared else b"\r\n0\r\n\r\n"]
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        for part in parts:
            connection.sendall(part)
        assert connection.recv(12) == b"HTTP/1.1 413"
        if not close:  # and the connection is as good as before
            until(lambda: connection.recv(1 << 16, socket.MSG_PEEK))
            connection.recv(1 << 20)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert said(connection).startswith(b"HTTP/1.1 200 ")


def test_the_rest_of_a_refused_body_is_not_waited_for(port: int) -> None:
    answer = asked(port, ASK + b"Content-Length: 300000\r\n\r\nx")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"<open>" not in answer


def test_ordinary_requests_are_answered_as_ever(port: int) -> None:
    """In a row, in pieces, by old clients, and what smuggles is refused."""
    whole = ASK + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = whole.replace(b"Host: x", b"Host: x\r\nConnection: close")
    assert asked(port, whole * 2 + last).count(b"HTTP/1.1 200") == 3
    assert asked(port, whole.replace(b"HTTP/1.1", b"HTTP/1.0")).startswith(b"HTTP/1.1 200 ")
    chunked = ASK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert asked(port, *(chunked[i : i + 1] for i in range(len(chunked)))).startswith(b"HTTP/1.1 200 ")
    expecting = last.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    assert asked(port, expecting).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    both = ASK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    twice = ASK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456"
    assert all(asked(port, smuggled).startswith(b"HTTP/1.1 400 ") for smuggled in (both, twice))


def test_a_websocket_outlives_the_time_for_a_request_and_one_caller_has_not_all(port: int) -> None:
    address = f"ws://127.0.0.1:{port}/v1/realtime"
    with connect(address, proxy=None) as kept:
        time.sleep(1.5 * SECONDS)
        kept.send(json.dumps({"seq": 1}))
        assert isinstance(kept.recv(), bytes)
