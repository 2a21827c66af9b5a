"""The life of the process: alive, ready, hung, asked to end under load, told so twice; and callers that dawdle."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import Popen
from service import GENERATE, PATIENT, engine_held, engine_of, http_get, http_post, publish, until, until_ready
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings

SLOW = {"model": "teacher", "steps": 100}
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "--factory", "app.main:create_app"],
    "fewstep serve": ["-m", "distillers.cli", "serve"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "teacher", "image", default_steps=4)
    return root


@dataclass
class Server:
    """A real process."""

    process: subprocess.Popen[str]
    port: int

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def metric(self, name: str) -> float:
        lines = http_get(self.url("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def end(self) -> str:
        """Its output, after it has ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate()[0]


@contextmanager
def running(weights: Path, server: str = "uvicorn", **more: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"FEWSTEP_WEIGHTS": str(weights), **PATIENT} | more
    command = [sys.executable, *SERVERS[server], "--port", str(port)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with Popen(command, env=environment, **pipes) as process:
        try:
            until_ready(lambda: http_get(f"http://127.0.0.1:{port}/readyz"), process)
            yield Server(process, port)
        finally:
            process.kill()


@pytest.mark.process
@pytest.mark.parametrize("server", SERVERS)
def test_sigterm_under_load_loses_nobody_who_was_let_in(weights: Path, server: str) -> None:
    """Thirty wait. The signal comes. All thirty are answered, nobody else is let in, and the process ends with 0."""
    with (
        running(weights, server, FEWSTEP_MAX_BATCH="4", FEWSTEP_DRAIN_SECONDS="400") as one,
        ThreadPoolExecutor(30) as pool,
    ):
        asked = [pool.submit(http_post, one.url(GENERATE), json=SLOW | {"seed": seed}) for seed in range(30)]
        until(lambda: one.metric("fewstep_inflight_requests") == 30)
        one.process.send_signal(signal.SIGTERM)
        until(lambda: http_get(one.url("/readyz")).status_code == 503)
        assert not all(answer.done() for answer in asked)
        ready, live = http_get(one.url("/readyz")), http_get(one.url("/livez"))
        late = http_post(one.url(GENERATE), json=SLOW)
        assert ready.json()["status"] == "draining" and live.status_code == 200
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
        assert late.headers["connection"] == "close" and 1 <= int(late.headers["retry-after"]) <= 400
        assert late.headers["x-request-id"]
        answers = [answer.result() for answer in asked]
        assert [answer.status_code for answer in answers] == [200] * 30
        assert {answer.json()["seed"] for answer in answers} == set(range(30))
        output = one.process.communicate()[0]
    assert one.process.returncode == 0 and "Traceback" not in output, output


@pytest.mark.process
def test_an_idle_server_ends_at_once_with_0_also_by_ctrl_c(weights: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(weights, FEWSTEP_DRAIN_SECONDS="300") as one, httpx.Client(timeout=None) as client:
            client.get(one.url("/livez"))  # a connection that is kept alive holds nobody up
            started = time.monotonic()
            one.process.send_signal(number)
            output = one.process.communicate()[0]
        assert one.process.returncode == 0 and time.monotonic() - started < 250
        assert "Application shutdown complete" in output and "Traceback" not in output


@pytest.mark.process
def test_a_connection_that_idles_is_kept(weights: Path) -> None:
    """A proxy sends its next request over it; uvicorn by itself would have hung up after five seconds."""
    with running(weights, "fewstep serve") as one, closing(HTTPConnection("127.0.0.1", one.port, 30)) as kept:
        for pause in (0, 5.5):
            time.sleep(pause)
            kept.request("GET", "/livez")  # over the same connection: it is opened again only after a told end
            assert kept.getresponse().read() == b'{"status":"ok"}'


@pytest.mark.process
def test_a_second_signal_ends_it_at_once(weights: Path) -> None:
    with running(weights, FEWSTEP_MAX_BATCH="1", FEWSTEP_DRAIN_SECONDS="300") as one, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http_post, one.url(GENERATE), json=SLOW) for _ in range(8)]
        until(lambda: one.metric("fewstep_inflight_requests") == 8)
        started = time.monotonic()
        one.process.send_signal(signal.SIGTERM)
        until(lambda: http_get(one.url("/readyz")).status_code == 503)
        one.end()
        assert one.process.returncode == 128 + signal.SIGTERM and time.monotonic() - started < 250
        assert any(isinstance(answer.exception(), httpx.TransportError) for answer in asked)


@pytest.mark.process
def test_who_takes_longer_than_the_drain_is_given_up(weights: Path) -> None:
    """Passes of minutes, one at work and many waiting: all are answered, and the process has ended in time, with 0."""
    with running(weights, FEWSTEP_MAX_STEPS="1000", FEWSTEP_DRAIN_SECONDS="8") as one, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http_post, one.url(GENERATE), json=SLOW | {"steps": 1000, "n": 16}) for _ in range(8)]
        until(lambda: one.metric("fewstep_inflight_requests") == 8)
        started = time.monotonic()
        output = one.end()
        assert one.process.returncode == 0 and time.monotonic() - started < 20, output
    assert "requests are given up" in output and "Traceback" not in output, output
    assert {answer.result().status_code for answer in asked} == {503}


@pytest.mark.process
def test_a_body_that_does_not_arrive_is_given_up(weights: Path) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with running(weights, FEWSTEP_BODY_SECONDS="0.5") as one:
        with socket.create_connection(("127.0.0.1", one.port), timeout=300) as slow:
            slow.sendall(head.encode() + b'{"model": ')
            started, heard = time.monotonic(), b""
            while part := slow.recv(4096):  # until the server hangs up
                heard += part
        assert heard.startswith(b"HTTP/1.1 408 ") and b'"request_timeout"' in heard
        assert 0.4 < time.monotonic() - started < 30
        assert one.metric("fewstep_rejected_total") == 1 and one.metric("fewstep_inflight_requests") == 0
        assert "Traceback" not in one.end()


def test_a_device_that_hangs_is_not_alive(weights: Path) -> None:
    """A call on the device that takes longer than is said to be sane: the supervisor is told while it lasts."""
    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0, hang_seconds=1))
    with TestClient(app) as client:
        until_ready(lambda: client.get("/readyz"))
        with engine_held(client):
            until(lambda: client.get("/livez").status_code == 503)
            assert client.get("/livez").json() == {"status": "stuck"}
            assert client.get("/v2/health/live").json() == {"live": False}
            assert client.get("/readyz").status_code == client.get("/v2/health/ready").status_code == 503
        assert client.get("/livez").json() == {"status": "ok"}


def test_a_device_that_waits_is_alive_and_one_that_died_is_not(weights: Path) -> None:
    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0))
    with TestClient(app) as client:
        until_ready(lambda: client.get("/readyz"))
        with engine_held(client):
            assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        assert client.get("/health").json() == client.get("/readyz").json()
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/health/ready").json() == {"ready": True}
        for worker in engine_of(client).workers:
            worker.batcher.close()
            worker.thread.join(60)
        assert client.get("/livez").json() == {"status": "dead"} and client.get("/livez").status_code == 503
        assert client.get("/readyz").status_code == 503
