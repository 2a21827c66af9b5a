"""The service over real, small, untrained weights folders: every route, every bad input, load, and a real process."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from openai import BadRequestError, OpenAI
from PIL import Image
from processes import Popen
from service import (
    GENERATE,
    LABELS,
    SIDE,
    TRANSLATE,
    engine_held,
    engine_of,
    error_of,
    file_of,
    grey,
    http_get,
    pictures,
    pixels_of,
    publish,
    until,
    until_ready,
    wait_until_waiting,
)
from starlette.testclient import TestClient

from app.engine.engine import Engine, Order
from app.errors import ApiError
from app.main import create_app
from app.requests.orders import class_of_seed
from app.settings import Settings
from distillers.errors import BadInput
from distillers.generator import Generator

QUEUE = 24


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    once, twice = {1: [999.0]}, {1: [999.0], 2: [999.0, 499.0]}
    publish(root, "classes-teacher", "class-to-image", labels=LABELS, default_steps=4)
    publish(root, "classes", "class-to-image", labels=LABELS, teacher="classes-teacher", step_times=twice)
    publish(root, "plain", "image", teacher="not-here", step_times=once)
    publish(root, "sar-teacher", "sar-to-optical", default_steps=2, patch=2)
    publish(root, "sar", "sar-to-optical", teacher="sar-teacher", step_times=once, patch=2)
    (root / "sar" / "examples").mkdir()
    for i in range(3):
        Image.fromarray(grey(SIDE, SIDE, seed=i)).save(root / "sar" / "examples" / f"{i}.png")
    (root / "classes" / "report.json").write_text('{"frechet": 12.5}')
    publish(root, "corrupt", "image", teacher="not-here", step_times=once)
    tensors = next((root / "corrupt").rglob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[TestClient]:
    app = create_app(
        Settings(
            weights=weights,
            device="cpu",
            queue_limit=QUEUE,
            max_body_bytes=200_000,
            max_pixels=10_000,
            tune_seconds=0,
        )
    )

    @app.get("/boom")
    async def boom() -> None:
        raise ArithmeticError("a secret of the server")

    with TestClient(app, raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def levels(images: torch.Tensor) -> NDArray[np.int64]:
    """What a picture in [-1, 1] is in 0..255, (B, H, W, 3)."""
    return ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.int64)


# --- generations


def test_an_image_is_what_the_generator_draws(client: TestClient, weights: Path) -> None:
    body = {"model": "classes", "prompt": "forest", "n": 3, "seed": 40, "steps": 2, "size": f"{SIDE}x{SIDE}"}
    answer = client.post(GENERATE, json=body)
    drawn = Generator.from_pretrained(weights / "classes").sample([40, 41, 42], labels=[1] * 3, steps=2)
    assert abs(np.stack(pictures(answer)) - levels(drawn)).max() <= 1
    facts = answer.json()
    assert (facts["seed"], facts["steps"], facts["nfe"], facts["size"]) == (40, 2, 2, "16x16")
    assert [(item["seed"], item["label"]) for item in facts["data"]] == [(s, "Forest") for s in (40, 41, 42)]
    assert facts["timings"]["forward_ms"] > 0 and facts["timings"]["batch"] == 3


def test_image_i_of_a_seed_is_image_0_of_seed_plus_i_also_where_the_class_is_drawn(client: TestClient) -> None:
    together = client.post(GENERATE, json={"model": "classes", "n": 4, "seed": 100})
    for i, picture in enumerate(pictures(together)):
        alone = client.post(GENERATE, json={"model": "classes", "seed": 100 + i, "prompt": ""})
        assert alone.json()["data"][0]["label"] == together.json()["data"][i]["label"]
        assert abs(pictures(alone)[0] - picture).max() <= 1
    assert {class_of_seed(seed, 3) for seed in range(20)} == {0, 1, 2}
    assert [class_of_seed(seed, 10) for seed in (0, 1, 7, 2**63 - 1)] == [0, 3, 0, 9]  # for ever


def test_the_same_seed_is_the_same_picture_whatever_else_is_in_the_batch(client: TestClient) -> None:
    bodies = [{"model": "classes", "seed": seed, "label": seed % 3, "steps": 1 + seed % 2} for seed in range(12)]
    bodies += [{"model": "plain", "seed": seed} for seed in range(6)]
    alone = [client.post(GENERATE, json=body) for body in bodies]
    assert {answer.json()["timings"]["batch"] for answer in alone} == {1}
    with ThreadPoolExecutor(len(bodies)) as pool, engine_held(client):
        asked = [pool.submit(client.post, GENERATE, json=body) for body in bodies]
        wait_until_waiting(client, len(bodies))
    together = [future.result() for future in asked]
    assert sorted({answer.json()["timings"]["batch"] for answer in together}) == [6]
    for one, other in zip(alone, together, strict=True):
        assert abs(pictures(one)[0] - pictures(other)[0]).max() <= 1


def test_a_seed_that_was_not_given_is_told_and_draws_the_same_again(client: TestClient) -> None:
    first, second = (client.post(GENERATE, json={"model": "plain"}) for _ in range(2))
    assert first.json()["seed"] != second.json()["seed"]
    again = client.post(GENERATE, json={"model": "plain", "seed": first.json()["seed"]})
    assert (pictures(first)[0] == pictures(again)[0]).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_raw_bytes_and_json_hold_the_same_picture(client: TestClient, kind: str) -> None:
    body = {"model": "classes", "label": 2, "seed": 2**63 - 1, "output_format": kind, "output_compression": 70}
    raw = client.post(GENERATE, json=body, headers={"Accept": f"image/{kind}"})
    assert raw.status_code == 200 and raw.headers["content-type"] == f"image/{kind}"
    assert raw.headers["x-fewstep-seed"] == str(2**63 - 1) and raw.headers["x-fewstep-label"] == "Sea%20Lake"
    assert {part.split(";")[0] for part in raw.headers["server-timing"].split(", ")} == {"queue", "forward", "encode"}
    assert (pixels_of(raw.content) == pictures(client.post(GENERATE, json=body))[0]).all()


def test_openais_fields_without_effect_are_accepted(client: TestClient) -> None:
    ignored: dict[str, Any] = {
        "user": "me",
        "quality": "hd",
        "style": "vivid",
        "background": "auto",
        "moderation": "low",
        "stream": False,
    }
    body = {"model": "plain", "seed": 1, "size": "auto", "n": None, "response_format": "b64_json"}
    assert (
        pictures(client.post(GENERATE, json=body | ignored))[0] == pictures(client.post(GENERATE, json=body))[0]
    ).all()


def test_a_teacher_is_served_by_the_same_call(client: TestClient) -> None:
    assert client.post(GENERATE, json={"model": "classes-teacher", "label": 0}).json()["nfe"] == 4
    assert client.post(GENERATE, json={"model": "classes-teacher", "label": 0, "steps": 3}).json()["nfe"] == 3


BAD_BODIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "seed below zero": ({"seed": -1}, "seed", "0"),
    "seed too large": ({"seed": 2**63}, "seed", ""),
    "last seed too large": ({"seed": 2**63 - 1, "n": 2}, "seed", ""),
    "seed no integer": ({"seed": 1.5}, "seed", ""),
    "n too large": ({"n": 17}, "n", "1..16"),
    "n zero": ({"n": 0}, "n", "1"),
    "n true": ({"n": True}, "n", "integer"),
    "label below zero": ({"label": -1}, "label", "0"),
    "label out of range": ({"label": 3}, "label", "0 to 2: Red circle, Forest, Sea Lake"),
    "unknown class": ({"prompt": "a cat"}, "prompt", "Red circle, Forest, Sea Lake"),
    "prompt against label": ({"prompt": "Forest", "label": 0}, "label", "1, which is Forest"),
    "unpublished steps": ({"steps": 3}, "steps", "1, 2"),
    "a teacher's limit": ({"steps": 251, "model": "classes-teacher"}, "steps", "1..250"),
    "another size": ({"size": "64x64"}, "size", "16x16, auto"),
    "prompt without classes": ({"prompt": "Forest", "model": "plain"}, "prompt", "nothing"),
    "label without classes": ({"label": 0, "model": "plain"}, "label", "nothing"),
    "a translator": ({"model": "sar"}, "model", TRANSLATE),
    "url": ({"response_format": "url"}, "response_format", "b64_json"),
    "gif": ({"output_format": "gif"}, "output_format", "png"),
    "compression": ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "100"),
    "views without a stream": ({"partial_images": 2}, "partial_images", "0 without stream"),
    "many views": ({"partial_images": 4, "stream": True}, "partial_images", "3"),
    "steps and a budget": ({"steps": 1, "latency_budget_ms": 5}, "steps", "latency_budget_ms"),
    "no budget": ({"latency_budget_ms": 0}, "latency_budget_ms", "0"),
    "no time": ({"timeout_ms": 0}, "timeout_ms", "1"),
    "determinism": ({"determinism": "very"}, "determinism", "strict"),
    "unknown field": ({"sede": 1}, "sede", "seed"),
    "a long prompt": ({"prompt": "x" * 100_000}, "prompt", "Forest"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_input_is_named_with_what_is_allowed(client: TestClient, name: str) -> None:
    body, param, allowed = BAD_BODIES[name]
    error = error_of(client.post(GENERATE, json={"model": "classes"} | body), 400)
    assert error["param"] == param and error["message"].startswith(f"{param}: got ") and len(error["message"]) < 500
    assert allowed in error["message"].split("; allowed: ")[1]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a":' * 5000], ids=repr)
def test_a_body_that_is_no_json_object(client: TestClient, body: bytes) -> None:
    error_of(client.post(GENERATE, content=body, headers={"Content-Type": "application/json"}), 400)


def test_json_without_its_content_type(client: TestClient) -> None:
    assert "application/json" in error_of(client.post(GENERATE, content=b"{}"), 400)["message"]


def test_unknown_model_and_the_choice_without_one(client: TestClient) -> None:
    error = error_of(client.post(GENERATE, json={"model": "gpt-image"}), 404)
    assert error["code"] == "model_not_found" and "classes, classes-teacher, plain" in error["message"]
    # two students draw images, so the choice is not clear; one translates, so there it is
    assert error_of(client.post(GENERATE, json={}), 400)["param"] == "model"
    assert client.post(TRANSLATE, files={"image": file_of(grey(SIDE, SIDE))}).json()["model"] == "sar"


def test_the_configured_model_is_the_choice(weights: Path) -> None:
    with TestClient(create_app(Settings(weights=weights, default_model="plain"))) as client:
        until_ready(lambda: client.get("/readyz"))
        assert client.post(GENERATE, json={}).json()["model"] == "plain"


def test_several_pictures_are_not_raw_bytes(client: TestClient) -> None:
    answer = client.post(GENERATE, json={"model": "plain", "n": 2}, headers={"Accept": "image/png"})
    assert error_of(answer, 400)["param"] == "n"
    several = {"Accept": "application/json, image/png"}
    assert len(pictures(client.post(GENERATE, json={"model": "plain", "n": 2}, headers=several))) == 2


# --- translations


@pytest.mark.parametrize(("height", "width"), [(16, 16), (21, 34), (8, 9)])
def test_any_size_is_padded_and_cropped_back(client: TestClient, weights: Path, height: int, width: int) -> None:
    tile = grey(height, width)
    answer = client.post(
        TRANSLATE, files={"image": ("a.png", file_of(tile))}, data={"model": "sar", "seed": "5", "n": "2"}
    )
    assert answer.json()["size"] == f"{width}x{height}" and answer.json()["seed"] == 5
    generator = Generator.from_pretrained(weights / "sar")
    multiple = generator.size_multiple
    sar = np.pad(tile / 127.5 - 1, ((0, -height % multiple), (0, -width % multiple)), mode="reflect")
    both = torch.tensor(np.stack([sar, sar])[:, None], dtype=torch.float32)
    drawn = levels(generator.sample([5, 6], sar=both))[:, :height, :width]
    assert abs(np.stack(pictures(answer)) - drawn).max() <= 1


@pytest.mark.parametrize(("kind", "name"), [("PNG", "image/png"), ("TIFF", "image/tiff")])
def test_a_raw_body_with_its_parameters_in_the_query(client: TestClient, kind: str, name: str) -> None:
    tile = grey(20, 20).astype(np.uint16) * 257
    query = {"model": "sar", "seed": "5", "output_format": "jpeg"}
    headers = {"Content-Type": name, "Accept": "image/png"}
    raw = client.post(TRANSLATE, params=query, content=file_of(tile, kind), headers=headers)
    form = client.post(TRANSLATE, files={"image": file_of((tile // 257).astype(np.uint8))}, data={"seed": "5"})
    assert raw.headers["content-type"] == "image/png"  # Accept decides
    assert abs(pixels_of(raw.content) - pictures(form)[0]).max() <= 1


def test_translations_under_load_do_not_depend_on_their_batch_mates(client: TestClient) -> None:
    files = [file_of(grey(16, 16 + 4 * (i % 2), seed=i)) for i in range(8)]

    def ask(i: int) -> Any:
        return client.post(TRANSLATE, files={"image": files[i]}, data={"seed": str(i)})

    alone = [pictures(ask(i))[0] for i in range(8)]
    with ThreadPoolExecutor(8) as pool, engine_held(client):
        asked = [pool.submit(ask, i) for i in range(8)]
        wait_until_waiting(client, 8)
    for one, other in zip(alone, asked, strict=True):
        assert abs(one - pictures(other.result())[0]).max() <= 1
        assert other.result().json()["timings"]["batch"] == 4


BAD_IMAGES = {
    "empty": (b"", 400, "no bytes"),
    "truncated": (file_of(grey(64, 64))[:-1500], 400, "breaks off"),
    "1 pixel": (file_of(grey(1, 1)), 400, "1x1 pixels"),
    "wrong band count": (file_of(np.stack([grey(16, 16, seed=i) for i in range(3)], -1)), 400, "3 bands"),
    "four bands": (file_of(np.zeros((16, 16, 4), np.uint8)), 400, "4 band"),
    "text": (b"hello", 400, "no such image"),
    "too many pixels": (file_of(np.zeros((101, 100), np.uint8)), 413, "100x101"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("form", [True, False], ids=["form", "raw"])
def test_bad_pictures(client: TestClient, name: str, form: bool) -> None:
    data, status, message = BAD_IMAGES[name]
    if form:
        answer = client.post(TRANSLATE, files={"image": ("a.png", data)})
    else:
        answer = client.post(TRANSLATE, content=data, headers={"Content-Type": "image/png"})
    error = error_of(answer, status)
    assert error["param"] == "image" and message in error["message"]


def test_bad_forms(client: TestClient) -> None:
    image = {"image": ("a.png", file_of(grey(16, 16)))}
    for data, param in [
        ({"seed": "-1"}, "seed"),
        ({"sead": "1"}, "sead"),
        ({"n": "17"}, "n"),
        ({"steps": "x"}, "steps"),
    ]:
        assert error_of(client.post(TRANSLATE, files=image, data=data), 400)["param"] == param
    assert error_of(client.post(TRANSLATE, files={"picture": b"x"}), 400)["param"] == "image"
    assert error_of(client.post(TRANSLATE, files=image, data={"model": "plain"}), 400)["param"] == "model"
    assert error_of(client.post(TRANSLATE, files=image, params={"seed": "1"}), 400)["param"] == "seed"
    assert error_of(client.post(TRANSLATE, files=[("image", b"x"), ("image", b"y")]), 400)["code"] == "bad_request"
    error_of(client.post(TRANSLATE, content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=x"}), 400)
    error_of(client.post(TRANSLATE, content=b"junk", headers={"Content-Type": "multipart/form-data"}), 400)
    error_of(client.post(TRANSLATE, content=b"junk"), 415)
    error_of(client.post(TRANSLATE, json={}), 415)


# --- models, health, pages, everything else that can be asked


def test_models_are_listed_in_openais_form_and_a_corrupt_folder_is_not(client: TestClient) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    models = {model["id"]: model for model in answer["data"]}
    assert list(models) == ["classes", "classes-teacher", "plain", "sar", "sar-teacher"]
    student, teacher = models["classes"], models["classes-teacher"]
    assert (student["steps"], student["teacher"], student["labels"]) == ([1, 2], "classes-teacher", LABELS)
    assert (teacher["steps"], teacher["max_steps"], teacher["default_steps"]) == (None, 250, 4)
    told = client.get("/v1/models/classes").json()
    backend = told.pop("backend")
    assert told == student | {"report": {"frechet": 12.5}}
    assert (backend["name"], backend["device"], backend["measured"], backend["tuning"]) == (
        "eager",
        "cpu",
        False,
        False,
    )
    assert client.get("/v1/models/plain").json()["report"] is None
    for absent in ("corrupt", "..%2fsecret", "%00"):
        assert error_of(client.get(f"/v1/models/{absent}"), 404)["code"] in ("model_not_found", "not_found")
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["device"], ready["failed"]) == ("ready", "cpu", ["corrupt"])
    assert client.get("/livez").json() == {"status": "ok"}


def test_wrong_paths_and_verbs(client: TestClient) -> None:
    assert "/v2" in error_of(client.get("/v2"), 404)["message"]
    answer = client.get(GENERATE)
    assert error_of(answer, 405)["code"] == "method_not_allowed" and answer.headers["allow"] == "POST"
    error_of(client.get("/static/absent.js"), 404)
    error_of(client.get("/static/..%2f..%2fsettings.py"), 404)


def test_an_unhandled_error_is_told_without_its_insides(client: TestClient) -> None:
    assert "secret" not in json.dumps(error_of(client.get("/boom"), 500))


def test_bodies_over_the_limit_are_refused_declared_or_not(client: TestClient) -> None:
    image = {"Content-Type": "image/png"}
    for path, headers in [(GENERATE, {"Content-Type": "application/json"}), (TRANSLATE, image)]:
        assert "200000" in error_of(client.post(path, content=b"x" * 200_001, headers=headers), 413)["message"]
        chunks = (b"x" * 50_000 for _ in range(5))
        assert "200000" in error_of(client.post(path, content=chunks, headers=headers), 413)["message"]


def test_the_pages_ask_nothing_of_other_servers(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert (
            page.headers["content-type"].startswith("text/html")
            and "default-src 'self'" in page.headers["content-security-policy"]
        )
        assert "://" not in page.text
        for name in ("app.js", "docs.js", "live.js", "style.css"):
            assert client.get(f"/static/{name}").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {GENERATE, TRANSLATE, "/v1/models", "/v1/benchmarks", "/livez", "/readyz"} <= set(paths)
    statuses = {"200", "400", "401", "403", "404", "408", "413", "429", "503", "504"}
    assert set(paths[GENERATE]["post"]["responses"]) == statuses


# --- benchmarks


@pytest.mark.parametrize(("model", "teacher_steps"), [("classes", 4), ("sar", 2)])
def test_a_benchmark_compares_with_the_teacher_on_the_same_noises(
    client: TestClient, model: str, teacher_steps: int
) -> None:
    answer = client.post("/v1/benchmarks", json={"model": model, "n": 5, "seed": 3})
    assert answer.status_code == 200, answer.text
    result = answer.json()
    assert (result["model"], result["steps"], result["n"], result["seeds"]) == (model, 1, 5, [3, 7])
    assert result["teacher"]["model"] == f"{model}-teacher" and result["teacher"]["steps"] == teacher_steps
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"] and "5 pictures" in result["note"]
    assert result["against_teacher"]["rmse"] > 0


def test_bad_benchmarks(client: TestClient) -> None:
    assert error_of(client.post("/v1/benchmarks", json={"model": "plain"}), 404)["code"] == "teacher_not_found"
    wrong = [({"model": "classes-teacher"}, "model"), ({"model": "classes", "n": 257}, "n"), ({"n": 1}, "n")]
    wrong += [
        ({"model": "classes", "steps": 5}, "steps"),
        ({"model": "classes", "seed": 2**63 - 1}, "seed"),
        ({"x": 1}, "x"),
    ]
    for body, param in wrong:
        assert error_of(client.post("/v1/benchmarks", json=body), 400)["param"] == param
    error_of(client.post("/v1/benchmarks", json={"model": "absent"}), 404)


# --- the engine: full, failing, left, closed


def test_a_full_queue_is_503_at_once_with_a_time_to_come_back(client: TestClient) -> None:
    with ThreadPoolExecutor(1) as pool, engine_held(client):
        first = pool.submit(client.post, GENERATE, json={"model": "plain", "n": 16})
        wait_until_waiting(client, 16)
        refused = client.post(GENERATE, json={"model": "plain", "n": QUEUE - 15})
        assert error_of(refused, 503)["code"] == "server_overloaded" and int(refused.headers["retry-after"]) >= 1
    assert len(pictures(first.result())) == 16


def test_a_failed_turn_is_an_error_and_the_engine_lives_on(client: TestClient) -> None:
    engine, portal = engine_of(client), client.portal
    assert portal is not None
    with pytest.raises(ZeroDivisionError):
        portal.call(engine.call, lambda: 1 // 0)
    model = engine.models["sar"]
    with pytest.raises(BadInput):  # no SAR: the generator itself refuses the batch
        portal.call(engine.draw, model, 1, [Order(0)], 16, 16)
    assert client.post(GENERATE, json={"model": "plain"}).status_code == 200


def test_who_leaves_while_waiting_costs_no_forward_pass(client: TestClient) -> None:
    engine, portal = engine_of(client), client.portal
    assert portal is not None
    leave = threading.Event()

    async def one_who_leaves() -> list[dict[str, Any]]:
        body, sent = json.dumps({"model": "plain", "n": 8}).encode(), list[dict[str, Any]]()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            while not leave.is_set():
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": GENERATE, "query_string": b"", "headers": headers}
        await client.app(scope, receive, send)
        return sent

    turns = engine.workers[0].turns
    with engine_held(client):
        leaving = portal.start_task_soon(one_who_leaves)
        wait_until_waiting(client, 8)
        leave.set()
        assert leaving.result(60)[0]["status"] == 499
    assert client.post(GENERATE, json={"model": "plain"}).json()["timings"]["batch"] == 1
    assert engine.workers[0].turns == turns + 1


def test_before_it_is_open_and_after_it_is_closed_the_engine_says_so(weights: Path) -> None:
    engine = Engine(Settings(weights=weights))
    with pytest.raises(ApiError) as opening:
        engine.choose("plain", lambda model: True)
    assert opening.value.status == 503 and opening.value.headers == {"Retry-After": "2"}
    engine.start()
    engine.stop()
    with pytest.raises(ApiError) as closed:
        asyncio.run(engine.call(lambda: 1))
    assert closed.value.status == 503 and not engine.alive and not engine.ready


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="FEWSTEP_WEIGHTS"):
        create_app(Settings(weights=tmp_path / "absent"))
    with TestClient(create_app(Settings(weights=tmp_path))) as client:
        until(lambda: client.get("/readyz").json()["status"] != "opening")
        assert client.get("/readyz").status_code == 503 and client.get("/readyz").json()["status"] == "empty"
        assert client.get("/livez").status_code == 200
        error_of(client.post(GENERATE, json={"model": "plain"}), 404)


# --- a real process


@pytest.mark.process
def test_openais_client_draws_from_a_real_process(weights: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"FEWSTEP_WEIGHTS": str(weights), "FEWSTEP_DEVICE": "cpu"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    server = Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until_ready(lambda: http_get(f"http://127.0.0.1:{port}/readyz"), server)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=None)
        answer = client.images.generate(model="classes", prompt="Forest", n=2, size="auto", extra_body={"seed": 7})
        assert answer.data is not None and len(answer.data) == 2
        assert pixels_of(base64.b64decode(answer.data[0].b64_json or "")).shape == (SIDE, SIDE, 3)
        assert next(iter(client.models.list())).id == "classes"
        with pytest.raises(BadRequestError, match="allowed: Red circle, Forest, Sea Lake") as refused:
            client.images.generate(model="classes", prompt="a cat")
        assert refused.value.param == "prompt"
        client.close()
    finally:
        server.send_signal(signal.SIGTERM)
        output = server.communicate()[0]
    assert "Application shutdown complete" in output and "Traceback" not in output


@pytest.mark.process
def test_sigterm_while_the_models_are_being_opened_ends_the_process_soon(weights: Path) -> None:
    code = "import uvicorn; uvicorn.run('app.main:create_app', factory=True, port=0)"
    environment = os.environ | {"FEWSTEP_WEIGHTS": str(weights)}
    server = Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "running on" in line:
            break
    server.send_signal(signal.SIGTERM)
    output = server.communicate()[0]
    assert "Application shutdown complete" in output and "Traceback" not in output
