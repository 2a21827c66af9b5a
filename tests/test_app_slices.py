"""Work that takes long runs in slices: others are served in between, it ends where nobody waits, and draws the same."""

import asyncio
import fcntl
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from service import GENERATE, LABELS, SIDE, engine_of, error_of, file_of, grey, publish, until, until_ready
from starlette.requests import Request
from starlette.testclient import TestClient

from app.engine.engine import Engine
from app.engine.lanes import TooLong
from app.engine.model import Order
from app.engine.passes import Pass
from app.engine.scenes import PREFIX, Scenes
from app.engine.tuning import probe
from app.main import create_app
from app.requests.bodies import read_form
from app.settings import Settings

FOR_EVER = 1000  # steps: more than any of these tests waits for


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "teacher", "class-to-image", labels=LABELS, default_steps=6)
    publish(root, "student", "class-to-image", labels=LABELS, teacher="teacher", step_times={1: [999.0]})
    return root


@pytest.fixture
def client(weights: Path) -> Iterator[TestClient]:
    with serve(weights) as client:
        yield client


@contextmanager
def serve(weights: Path, **more: Any) -> Iterator[TestClient]:
    settings = {"device": "cpu", "tune_seconds": 0, "max_wait_seconds": 10_000, "max_steps": 1000, **more}
    with TestClient(create_app(Settings(weights=weights, **settings))) as client:
        until_ready(lambda: client.get("/readyz"))
        engine_of(client).models["teacher"].step_s = 10.0  # on a machine where it takes long
        yield client


def calls_of(engine: Engine, name: str) -> list[None]:
    """What grows with every call of a model's network."""
    calls = list[None]()
    engine.models[name].networks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def pixels(engine: Engine, name: str, steps: int, strict: bool = False) -> Any:
    drawing = engine.draw(engine.models[name], steps, [Order(3, 1)], SIDE, SIDE, strict=strict)
    return asyncio.run(drawing)[0].pixels.astype(int)


def test_a_long_pass_lets_others_pass_and_draws_what_it_draws_alone(client: TestClient) -> None:
    """Three passes of one network side by side, two of the teacher's, one of them strict, and many of the student's."""
    engine = engine_of(client)
    asked = [(400, False), (401, True)]
    alone = [pixels(engine, "teacher", *one) for one in asked]
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(pixels, engine, "teacher", *one) for one in asked]
        until(lambda: engine.inflight == 2)
        served = 0
        while not any(one.done() for one in long):
            assert client.post(GENERATE, json={"model": "student"}).status_code == 200
            served += 1
        together = [one.result() for one in long]
    assert served > 2  # at least one between any two steps, had it asked at once
    assert np.abs(together[0] - alone[0]).max() <= 1 and (together[1] == alone[1]).all()


@pytest.mark.parametrize("work", ["a long pass", "a benchmark", "a first look", "tuning"])
def test_who_comes_during_a_slice_is_next(client: TestClient, work: str) -> None:
    """While the teacher's network runs, a picture by the student is asked for: it is drawn before the next call."""
    engine = engine_of(client)
    worker, teacher = engine.workers[0], engine.models["teacher"]
    calls, drawn = list[int](), list[Any]()
    lane = worker.lane()
    works: dict[str, Callable[[], Any]] = {
        "a long pass": lambda: pixels(engine, "teacher", 6),
        "a benchmark": lambda: client.post("/v1/benchmarks", json={"model": "student", "n": 2}),
        "a first look": lambda: engine.store._look(teacher, worker),
        "tuning": lambda: probe(teacher, 2),
    }
    with ThreadPoolExecutor(1) as pool:

        def called(*_: Any) -> None:
            if not calls:
                drawn.append(pool.submit(pixels, engine, "student", 1))
                until(lambda: engine.waiting()["student"])
            calls.append(worker.turns)

        hook = teacher.networks[0].register_forward_pre_hook(called)
        if work == "tuning":
            with Pass(turn=lane.turn):
                works[work]()
        else:
            works[work]()
        hook.remove()
        assert calls[1] == calls[0] + 1 and drawn[0].result().shape == (SIDE, SIDE, 3)


def test_a_batch_at_work_counts_where_a_device_is_chosen(client: TestClient) -> None:
    worker = engine_of(client).workers[0]
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, GENERATE, json={"model": "teacher", "steps": FOR_EVER, "timeout_ms": 1000})
        until(lambda: engine_of(client).inflight)
        assert worker.load_s() > 9000 and worker.backlog_s() < 9000  # 1,000 steps of 10 s, but others begin at once
        error_of(long.result(), 504)
    until(lambda: engine_of(client).inflight == 0)
    assert worker.load_s() < 1


@pytest.mark.parametrize("step_s", [1e-6, 10.0], ids=["short", "in slices"])
def test_a_deadline_counts_the_pass_and_ends_it_between_two_steps(client: TestClient, step_s: float) -> None:
    engine = engine_of(client)
    engine.models["teacher"].step_s = step_s  # as it is believed
    calls = calls_of(engine, "teacher")
    late = client.post(GENERATE, json={"model": "teacher", "steps": FOR_EVER, "timeout_ms": 300})
    assert error_of(late, 504)["code"] == "deadline_exceeded"
    until(lambda: engine.inflight == 0)
    assert 0 < len(calls) < FOR_EVER
    assert client.post(GENERATE, json={"model": "teacher", "steps": 2, "timeout_ms": 600_000}).status_code == 200


def test_who_waits_for_a_long_pass_hears_of_his_deadline_in_time(client: TestClient) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, GENERATE, json={"model": "teacher", "steps": FOR_EVER, "timeout_ms": 1000})
        until(lambda: engine_of(client).inflight)
        waiting = client.post(GENERATE, json={"model": "teacher", "steps": FOR_EVER, "timeout_ms": 50})
        assert error_of(waiting, 504) and not long.done()
        assert client.post(GENERATE, json={"model": "student", "timeout_ms": 60_000}).status_code == 200
        error_of(long.result(), 504)


def test_a_pass_that_nobody_waits_for_any_more_ends(client: TestClient) -> None:
    engine = engine_of(client)
    calls = calls_of(engine, "teacher")

    async def leave() -> None:
        orders = [Order(seed, 0) for seed in range(2)]
        drawing = asyncio.ensure_future(engine.draw(engine.models["teacher"], FOR_EVER, orders, SIDE, SIDE))
        while not calls:
            await asyncio.sleep(0.001)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: engine.inflight == 0)
    assert len(calls) < FOR_EVER


def test_a_long_pass_is_given_up_when_the_server_ends(weights: Path) -> None:
    with serve(weights) as client, ThreadPoolExecutor(1) as pool:
        engine = engine_of(client)
        calls = calls_of(engine, "teacher")
        long = pool.submit(client.post, GENERATE, json={"model": "teacher", "steps": FOR_EVER})
        until(lambda: calls)
        engine.close()
        assert error_of(long.result(), 503)["code"] == "shutting_down"
    assert len(calls) < FOR_EVER and engine.inflight == 0


def test_a_benchmark_lets_others_pass_and_leaves_their_time_out(client: TestClient) -> None:
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(client.post, "/v1/benchmarks", json={"model": "student", "n": 2})
        until(lambda: engine_of(client).backlog_s() > 0 or measuring.done())
        served = 0
        while not measuring.done():
            assert client.post(GENERATE, json={"model": "student"}).status_code == 200
            served += 1
        result = measuring.result()
    assert result.status_code == 200 and result.json()["against_teacher"]["rmse"] > 0 and served > 2


def test_a_benchmark_has_a_budget(weights: Path) -> None:
    with serve(weights, benchmark_seconds=1e-3) as client:
        answer = client.post("/v1/benchmarks", json={"model": "student", "n": 2})
        assert error_of(answer, 504)["code"] == "benchmark_too_long"
        assert client.post(GENERATE, json={"model": "student"}).status_code == 200


def test_a_lane_measures_its_slices_which_stand_in_the_prediction(client: TestClient) -> None:
    worker = engine_of(client).workers[0]
    lane, begun, go = worker.lane(limit_s=0.2), threading.Event(), threading.Event()
    lane.slice_s = 50.0
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lane.turn, lambda: (begun.set(), go.wait(300)))
        begun.wait()
        assert 40 < worker.backlog_s() <= 50
        started = lane.clock()
        time.sleep(0.3)
        go.set()
        held.result()
    assert lane.busy_s >= 0.3 and lane.clock() >= started
    assert lane.slice_s < 50 and worker.backlog_s() == 0
    with pytest.raises(TooLong, match="allowed"):
        lane.turn(lambda: None)


# --- what lies on disk


def test_the_scratch_of_a_killed_server_is_removed_and_that_of_a_living_one_stays(
    weights: Path, tmp_path: Path
) -> None:
    dead, living = tmp_path / f"{PREFIX}dead", tmp_path / f"{PREFIX}living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "scene.tif").write_bytes(b"x")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    settings = Settings(weights=weights, device="cpu", scratch=tmp_path)
    with Scenes(Engine(settings), settings) as own, Scenes(Engine(settings), settings) as other:
        assert own.scratch.is_dir() and other.scratch.is_dir()
        assert not dead.exists() and (living / "scene.tif").exists() and (tmp_path / "other").is_dir()
    os.close(held)
    assert not own.scratch.exists() and not other.scratch.exists()


def test_an_upload_lies_in_the_scratch_folder(weights: Path, tmp_path: Path) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n--B--\r\n' % bytes(2 << 20)
    settings = Settings(weights=weights, device="cpu", scratch=tmp_path)
    scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=B")]}
    scope |= {"app": SimpleNamespace(state=SimpleNamespace(engine=SimpleNamespace(settings=settings)))}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def place() -> str:
        async with read_form(Request(scope, receive), max_files=1, max_fields=1) as form:
            upload: Any = form["image"]
            assert len(await upload.read()) == 2 << 20
            return os.readlink(f"/proc/self/fd/{upload.file.fileno()}")

    assert asyncio.run(place()).startswith(f"{tmp_path}/")


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/translations", "/v1/jobs/translations"])
def test_a_full_disk_is_507_on_every_route(weights: Path, tmp_path: Path, path: str) -> None:
    pytest.importorskip("rasterio")
    with serve(weights, scratch=tmp_path) as client:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))  # no file may be larger: a disk that is full
        try:
            answer = client.post(path, files={"image": ("a.tif", bytes(2 << 20))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error_of(answer, 507)["code"] == "no_room"
        assert client.post("/v1/images/edits", files={"image": file_of(grey(SIDE, SIDE))}).status_code in (200, 400)
