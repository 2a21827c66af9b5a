"""The service as its tests run it: tiny published folders, an application or a process, and the waiting for it."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from processes import Popen
from starlette.testclient import TestClient

from app.engine.engine import Engine
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.teacher import Teacher
from distillers.weights.manifest import Info

# However busy the machine is: what never comes is ended by the test's own time limit.
http_get, http_post = partial(httpx.get, timeout=None), partial(httpx.post, timeout=None)
# a process that measures no backend and refuses nobody because others would take long
PATIENT = {"FEWSTEP_DEVICE": "cpu", "FEWSTEP_TUNE_SECONDS": "0", "FEWSTEP_MAX_WAIT_SECONDS": "10000"}
LABELS = ["Red circle", "Forest", "Sea Lake"]
SIDE = 16
GENERATE, TRANSLATE = "/v1/images/generations", "/v1/images/translations"
NETWORK = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def publish(root: Path, name: str, task: str, *, teacher: str | None = None, **more: Any) -> None:
    """A real weights folder: a student when it has a teacher."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"method": "consistency", "role": "student", "sampler": "consistency"}
    if teacher is None:
        kind = {"method": "diffusion", "role": "teacher", "sampler": "ddim"}
    sar = {"channels": 1, "range": [-1, 1]} if task == "sar-to-optical" else None
    info = Info(name=name, task=task, data="shapes", size=(SIDE, SIDE), teacher=teacher, sar=sar, **kind, **more)
    codec = PixelUnshuffle(info.patch)
    denoiser = Teacher.random(info, NETWORK, {"name": "vp"}, "eps", codec).denoiser
    Generator(denoiser, codec, info).save_pretrained(root / name)


def grey(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def file_of(values: NDArray, kind: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.fromarray(values).save(target, kind)
    return target.getvalue()


def pixels_of(data: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def pictures(answer: Any) -> list[NDArray[np.int64]]:
    assert answer.status_code == 200, answer.text
    return [pixels_of(base64.b64decode(item["b64_json"])) for item in answer.json()["data"]]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error object, checked for its form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return body["error"]


def until(true: Callable[[], Any]) -> Any:
    """Wait until it is true, and return what it gave."""
    while not (found := true()):
        time.sleep(0.01)
    return found


def until_ready(get: Callable[[], Any], server: subprocess.Popen[str] | None = None) -> None:
    """Poll /readyz; a refused connection counts as not ready."""

    def ready() -> bool:
        assert server is None or server.poll() is None, "the server has ended"
        try:
            return bool(get().status_code == 200)
        except httpx.TransportError:
            return False

    until(ready)


def engine_of(client: TestClient) -> Engine:
    return cast(Any, client.app).state.engine


@contextmanager
def engine_held(client: TestClient) -> Iterator[None]:
    """The engine's thread stands still, so that what is asked meanwhile waits together."""
    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(300)

    assert client.portal is not None
    holding = client.portal.start_task_soon(engine_of(client).call, hold)
    held.wait()
    try:
        yield
    finally:
        release.set()
        holding.result()


def wait_until_waiting(client: TestClient, orders: int) -> None:
    until(lambda: sum(engine_of(client).waiting().values()) == orders)


@contextmanager
def serving(weights: Path, **more: str) -> Iterator[int]:
    """A real server in a process of its own; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"FEWSTEP_WEIGHTS": str(weights), **PATIENT}
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    server = Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert server.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(server.stdout or ()))  # a full pipe would stop the server
    reader.start()
    try:
        until_ready(lambda: http_get(f"http://127.0.0.1:{port}/readyz"), server)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        reader.join()
    assert "Traceback" not in "".join(lines), "".join(lines)
