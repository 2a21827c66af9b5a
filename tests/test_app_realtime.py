"""The WebSocket: a real client against a real server; the latest wins, errors are survived, who goes leaves nothing."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service import (
    GENERATE,
    LABELS,
    SIDE,
    file_of,
    grey,
    http_get,
    http_post,
    pictures,
    pixels_of,
    publish,
    serving,
    until,
    until_ready,
)
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from test_app_routes import EDIT, MANY, rgb
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from app.main import create_app
from app.routes import realtime
from app.settings import Settings

PATH = "/v1/realtime"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, MANY, "class-to-image", labels=LABELS, default_steps=4)
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture(scope="module")
def port(weights: Path) -> Iterator[int]:
    with serving(weights, FEWSTEP_MAX_STEPS="1000") as port:
        yield port


@pytest.fixture
def socket_(port: int) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{port}{PATH}", max_size=None) as websocket:
        yield websocket


def ask(websocket: ClientConnection, **fields: Any) -> None:
    websocket.send(json.dumps(fields))


def answer(websocket: ClientConnection) -> tuple[dict[str, Any], bytes]:
    """Header and picture of a binary message; ({"seq", "error"}, b"") of a text message."""
    message = websocket.recv(60)
    if isinstance(message, str):
        told = json.loads(message)
        assert set(told) == {"seq", "error"} and set(told["error"]) == {"message", "type", "param", "code"}
        return told, b""
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def at_work(port: int) -> bool:
    """Whether pictures are being drawn, none waiting."""
    lines = http_get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    figures = {line.split(" ")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    waiting = sum(value for name, value in figures.items() if name.startswith("fewstep_queue_images"))
    return figures["fewstep_inflight_images"] > waiting


def drawn_by(port: int, model: str) -> float:
    lines = http_get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("fewstep_images_total") and model in line)


@pytest.mark.process
def test_a_frame_is_the_picture_of_the_other_routes(socket_: ClientConnection, port: int) -> None:
    ask(socket_, seq=1, model=MANY, prompt="forest", seed=5, steps=3, output_format="raw")
    header, pixels = answer(socket_)
    body = {"model": MANY, "label": 1, "seed": 5, "steps": 3}
    same = pictures(http_post(f"http://127.0.0.1:{port}{GENERATE}", json=body))[0]
    assert (np.frombuffer(pixels, np.uint8).reshape(header["height"], header["width"], 3) == same).all()
    assert (header["seq"], header["seed"], header["model"], header["steps"]) == (1, 5, MANY, 3)
    assert header["label"] == "Forest" and header["dropped"] == 0 and header["timings"]["forward_ms"] > 0
    for seq, kind in enumerate(("jpeg", "webp", "png"), 2):
        ask(socket_, seq=seq, model="plain", output_format=kind)
        header, picture = answer(socket_)
        assert header["output_format"] == kind and pixels_of(picture).shape == (SIDE, SIDE, 3)
    ask(socket_, seq=9, model=MANY, latency_budget_ms=60_000)
    assert answer(socket_)[0]["chosen"]["model"] == MANY


@pytest.mark.process
def test_a_picture_belongs_to_the_message_before_it(socket_: ClientConnection, port: int) -> None:
    ask(socket_, seq=1, model="sar", image=True, seed=2, output_format="png")
    socket_.send(file_of(grey(20, 24)))
    header, picture = answer(socket_)
    native = http_post(
        f"http://127.0.0.1:{port}/v1/images/translations", files={"image": file_of(grey(20, 24))}, data={"seed": "2"}
    )
    assert (pixels_of(picture) == pictures(native)[0]).all() and (header["width"], header["height"]) == (24, 20)
    ask(socket_, seq=2, model=MANY, image=True, seed=2, label=0, steps=4, strength=0.5, output_format="png")
    socket_.send(rgb())
    edited = http_post(
        f"http://127.0.0.1:{port}{EDIT}",
        files={"image": rgb()},
        data={"model": MANY, "seed": "2", "label": "0", "steps": "4", "strength": "0.5"},
    )
    assert (pixels_of(answer(socket_)[1]) == pictures(edited)[0]).all()


@pytest.mark.process
def test_the_latest_wins_and_what_it_replaced_is_never_drawn(socket_: ClientConnection, port: int) -> None:
    before = drawn_by(port, MANY) + drawn_by(port, "plain")
    ask(socket_, seq=0, model=MANY, label=0, steps=1000)
    until(lambda: at_work(port))
    for seq in range(1, 51):
        ask(socket_, seq=seq, model="plain", seed=seq)
    headers = [answer(socket_)[0] for _ in range(2)]
    assert [header["seq"] for header in headers] == [0, 50]
    assert headers[1]["dropped"] == 49 and headers[1]["seed"] == 50
    assert drawn_by(port, MANY) + drawn_by(port, "plain") == before + 2
    ask(socket_, seq=51, model="plain")
    assert answer(socket_)[0]["dropped"] == 49


@pytest.mark.process
@pytest.mark.parametrize(
    ("message", "seq", "param"),
    [
        ("{", None, None),
        ("[]", None, None),
        ('{"model": "plain"}', None, "seq"),
        ('{"seq": "1"}', None, "seq"),
        ('{"seq": -1}', -1, "seq"),
        ('{"seq": 7, "sead": 1}', 7, "sead"),
        ('{"seq": 7, "model": "absent"}', 7, "model"),
        ('{"seq": 7, "model": "plain", "steps": 9}', 7, "steps"),
        ('{"seq": 7, "model": "sar"}', 7, "image"),
        ('{"seq": 7, "model": "plain", "output_format": "geotiff"}', 7, "output_format"),
        ('{"seq": 7, "model": "plain", "timeout_ms": 0}', 7, "timeout_ms"),
        ("x" * 70_000, None, "message"),
        (b"a picture that nobody announced", None, "message"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_told_and_the_connection_goes_on(
    socket_: ClientConnection, message: str | bytes, seq: int | None, param: str | None
) -> None:
    socket_.send(message)
    told, _ = answer(socket_)
    assert told["seq"] == seq and told["error"]["param"] == param and told["error"]["message"]
    ask(socket_, seq=8, model="plain")
    assert answer(socket_)[0]["seq"] == 8


@pytest.mark.process
def test_seq_grows_and_an_announced_picture_that_does_not_come_is_dropped(socket_: ClientConnection) -> None:
    ask(socket_, seq=5, model="plain")
    assert answer(socket_)[0]["seq"] == 5
    ask(socket_, seq=5, model="plain")
    told, _ = answer(socket_)
    assert told["seq"] == 5 and "above 5" in told["error"]["message"]
    ask(socket_, seq=6, model="sar", image=True)
    ask(socket_, seq=7, model="plain")
    assert answer(socket_)[0]["dropped"] == 1
    ask(socket_, seq=8, model="sar", image=True)
    socket_.send(b"no picture")
    assert answer(socket_)[0]["error"]["param"] == "image"
    ask(socket_, seq=9, model="sar", image=True)
    socket_.send(bytes(16 << 20))  # at the server's limit: the message passes, its header does not
    assert answer(socket_)[0]["error"]["param"] == "image"


@pytest.mark.process
def test_a_frame_over_the_servers_limit_ends_the_connection(port: int) -> None:
    with connect(f"ws://127.0.0.1:{port}{PATH}") as websocket:
        websocket.send(bytes((16 << 20) + 1))
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(60)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


@pytest.mark.process
def test_a_storm_of_abrupt_ends_leaves_no_work_and_a_server_that_answers(port: int) -> None:
    before = drawn_by(port, "plain")
    with connect(f"ws://127.0.0.1:{port}{PATH}") as busy:
        ask(busy, seq=0, model=MANY, label=0, steps=1000)  # at work until the storm is over
        until(lambda: at_work(port))
        for _ in range(30):
            websocket = connect(f"ws://127.0.0.1:{port}{PATH}")
            for seq in range(3):
                ask(websocket, seq=seq, model="plain")
            time.sleep(0.005)
            # no closing handshake: the connection breaks
            websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            websocket.socket.close()
        assert answer(busy)[0]["seq"] == 0
        ask(busy, seq=1, model="plain")
        assert answer(busy)[0]["timings"]["batch"] == 1
    until(lambda: not at_work(port))
    # between the steps of the long one each connection's first and last request at most, none of the rest
    assert before + 1 <= drawn_by(port, "plain") <= before + 1 + 30 * 2


@pytest.mark.process
def test_a_subprotocol_of_ours_is_accepted(port: int) -> None:
    with connect(f"ws://127.0.0.1:{port}{PATH}", subprotocols=["other", "fewstep"]) as websocket:  # type: ignore[list-item]
        assert websocket.subprotocol == "fewstep"


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(weights=weights, device="cpu", tune_seconds=0))) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def test_too_many_connections_are_503(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "CONNECTIONS", 1)
    with client.websocket_connect(PATH):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(PATH):
            pass
        assert refused.value.status_code == 503 and refused.value.json()["error"]["code"] == "server_overloaded"
    with client.websocket_connect(PATH) as again:
        again.send_text('{"seq": 1, "model": "plain"}')
        assert again.receive_bytes()


def test_an_idle_connection_is_closed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "IDLE", 0.05)
    with client.websocket_connect(PATH) as websocket, pytest.raises(WebSocketDisconnect) as closed:
        websocket.receive_text()
    assert closed.value.code == 1000 and "no message" in (closed.value.reason or "")
