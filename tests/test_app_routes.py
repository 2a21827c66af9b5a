"""What the routes add to the engine: raw pixels, budgets, deadlines, strictness, edits, events; by OpenAI's client."""

import base64
import io
import json
import math
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
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
    http_post,
    pictures,
    pixels_of,
    publish,
    serving,
    until_ready,
    wait_until_waiting,
)
from starlette.testclient import TestClient

from app.main import create_app
from app.requests.streams import partial_steps
from app.schemas import ImagesAnswer
from app.settings import Settings

EDIT = "/v1/images/edits"
MANY = "classes-teacher"  # any number of steps


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, MANY, "class-to-image", labels=LABELS, default_steps=4)
    times = {1: [999.0], 2: [999.0, 499.0]}
    publish(root, "classes", "class-to-image", labels=LABELS, teacher=MANY, step_times=times)
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[TestClient]:
    settings = Settings(weights=weights, device="cpu", tune_seconds=0, max_pixels=10_000)
    with TestClient(create_app(settings)) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def rgb(height: int = SIDE, width: int = SIDE, seed: int = 0) -> bytes:
    """A PNG of smooth colours."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3) + 20 * seed
    return file_of((ramp % 256).astype(np.uint8))


def events_of(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block]
    for event, data in blocks:
        assert event.startswith("event: ") and data.startswith("data: ")
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in blocks]


# --- raw pixels, and what is documented


def test_raw_pixels_come_with_their_size_and_are_those_of_the_png(client: TestClient) -> None:
    body = {"model": "classes", "label": 1, "seed": 3}
    raw = client.post(GENERATE, json=body, headers={"Accept": "application/octet-stream"})
    assert raw.headers["content-type"] == "application/octet-stream"
    shape = int(raw.headers["x-fewstep-height"]), int(raw.headers["x-fewstep-width"]), 3
    png = client.post(GENERATE, json=body, headers={"Accept": "image/png"})
    assert (np.frombuffer(raw.content, np.uint8).reshape(shape) == pixels_of(png.content)).all()
    answer = client.post(GENERATE, json=body | {"output_format": "raw"}).json()
    assert base64.b64decode(answer["data"][0]["b64_json"]) == raw.content and answer["output_format"] == "raw"


def test_raw_pixels_of_a_padded_translation_are_cropped(client: TestClient) -> None:
    headers = {"Content-Type": "image/png", "Accept": "application/octet-stream"}
    raw = client.post(TRANSLATE, content=file_of(grey(21, 34)), params={"seed": "1"}, headers=headers)
    assert (raw.headers["x-fewstep-width"], raw.headers["x-fewstep-height"]) == ("34", "21")
    png = client.post(
        TRANSLATE, content=file_of(grey(21, 34)), params={"seed": "1"}, headers={"Content-Type": "image/png"}
    )
    assert (np.frombuffer(raw.content, np.uint8).reshape(21, 34, 3) == pictures(png)[0]).all()


def test_raw_pixels_in_are_those_of_the_png(client: TestClient) -> None:
    tile, pixels = grey(21, 34), {"Content-Type": "application/octet-stream"}
    raw = client.post(TRANSLATE, content=tile.tobytes(), params={"seed": "3", "width": "34"}, headers=pixels)
    png = client.post(TRANSLATE, files={"image": file_of(tile)}, data={"seed": "3"})
    assert raw.json()["data"] == png.json()["data"] and raw.json()["size"] == "34x21"
    looks_like_a_scene = b"II*\0" + bytes(60)
    assert client.post(TRANSLATE, content=looks_like_a_scene, params={"width": "8"}, headers=pixels).status_code == 200
    for data, params, param in [
        (tile.tobytes(), {}, "width"),
        (tile.tobytes(), {"width": "33"}, "image"),
        (tile.tobytes(), {"width": "7"}, "image"),
        (b"", {"width": "16"}, "image"),
        (tile.tobytes(), {"width": "34", "units": "db"}, "units"),
    ]:
        assert error_of(client.post(TRANSLATE, content=data, params=params, headers=pixels), 400)["param"] == param
    error_of(client.post(TRANSLATE, content=bytes(10_001), params={"width": "73"}, headers=pixels), 413)
    png_kind = {"Content-Type": "image/png"}
    answer = client.post(TRANSLATE, content=file_of(tile), params={"width": "34"}, headers=png_kind)
    assert error_of(answer, 400)["param"] == "width"


@pytest.mark.parametrize("more", [{}, {"latency_budget_ms": 60_000}, {"n": 2}], ids=str)
def test_the_answer_put_together_by_hand_is_the_documented_one(client: TestClient, more: dict[str, Any]) -> None:
    answer = client.post(GENERATE, json={"model": "classes", "prompt": "Sea Lake", "seed": 1} | more).json()
    assert json.loads(ImagesAnswer.model_validate(answer).model_dump_json()) == answer


def test_a_png_of_its_own_says_how_to_draw_it_again(client: TestClient) -> None:
    body = {"model": "classes", "prompt": "Sea Lake", "seed": 9, "steps": 2}
    first = client.post(GENERATE, json=body, headers={"Accept": "image/png"}).content
    told = json.loads(Image.open(io.BytesIO(first)).text["parameters"])  # type: ignore[attr-defined]
    again = {name: told[name] for name in ("model", "seed", "steps")} | {"prompt": told["label"]}
    assert again == body and client.post(GENERATE, json=again, headers={"Accept": "image/png"}).content == first
    budget = {"model": "classes", "prompt": "Sea Lake", "seed": 9, "latency_budget_ms": 60_000}
    assert client.post(GENERATE, json=budget, headers={"Accept": "image/png"}).content == first  # the same 2 steps


# --- budget, deadline, strictness


def test_a_budget_chooses_the_steps_and_says_why(client: TestClient) -> None:
    answer = client.post(GENERATE, json={"model": "classes", "label": 0, "latency_budget_ms": 60_000})
    chosen = answer.json()["chosen"]
    assert (chosen["model"], chosen["steps"], answer.json()["steps"]) == ("classes", 2, 2)  # the most it has
    assert 0 < chosen["expected_ms"] <= 60_000 and chosen["why"]
    assert answer.headers["x-fewstep-steps"] == "2" and answer.headers["x-fewstep-why"]
    assert client.post(GENERATE, json={"model": "classes", "label": 0}).json()["chosen"] is None


def test_a_budget_without_a_model_chooses_among_those_that_know_the_class(client: TestClient) -> None:
    asked = {"prompt": "forest", "latency_budget_ms": 60_000, "seed": 2}
    answer = client.post(GENERATE, json=asked).json()
    assert answer["model"] == MANY and answer["steps"] > 2  # its teacher takes the most steps that fit a minute
    assert answer["data"][0]["label"] == "Forest"
    again = {"model": answer["model"], "steps": answer["steps"], "prompt": "forest", "seed": 2}
    assert client.post(GENERATE, json=again).json()["data"] == answer["data"]
    translated = client.post(TRANSLATE, files={"image": file_of(grey(16, 16))}, data={"latency_budget_ms": "60000"})
    assert translated.json()["chosen"]["model"] == "sar"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a cat"}, "model"),
        ({"size": "999x999"}, "model"),
        ({"latency_budget_ms": 1e-6}, "latency_budget_ms"),
        ({"steps": 1}, "steps"),
        ({"latency_budget_ms": "5"}, "latency_budget_ms"),
    ],
    ids=str,
)
def test_a_budget_that_nothing_fits(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert error_of(client.post(GENERATE, json={"latency_budget_ms": 60_000} | body), 400)["param"] == param


def test_a_deadline_that_passes_in_the_queue_is_504_and_draws_nothing(client: TestClient) -> None:
    worker = engine_of(client).workers[0]
    turns = worker.turns
    with ThreadPoolExecutor(1) as pool, engine_held(client):
        for body in ({"model": "plain", "timeout_ms": 50}, {"model": "plain", "timeout_ms": 50, "stream": True}):
            late = client.post(GENERATE, json=body)  # by a timer: the device is still held
            assert error_of(late, 504)["code"] == "deadline_exceeded"
        patient = pool.submit(client.post, GENERATE, json={"model": "plain", "timeout_ms": 60_000})
        wait_until_waiting(client, 1)
    assert patient.result().status_code == 200 and worker.turns == turns + 1


def test_a_deadline_of_a_scene(client: TestClient) -> None:
    pytest.importorskip("rasterio")
    scene = client.get("/v1/demonstration.tif").content
    headers = {"Content-Type": "image/tiff"}
    late = client.post(TRANSLATE, content=scene, params={"timeout_ms": "1"}, headers=headers)
    assert error_of(late, 504)["code"] == "deadline_exceeded"
    in_time = {"timeout_ms": "60000", "output_format": "raw", "latency_budget_ms": "60000"}
    raw = client.post(
        TRANSLATE, content=scene, params=in_time, headers=headers | {"Accept": "application/octet-stream"}
    )
    size = int(raw.headers["x-fewstep-width"]) * int(raw.headers["x-fewstep-height"])
    assert raw.status_code == 200 and len(raw.content) == 3 * size and raw.headers["x-fewstep-why"]


def test_strict_is_the_same_bytes_alone_and_under_load(client: TestClient) -> None:
    bodies = [{"model": "classes", "label": i % 3, "seed": i, "determinism": "strict"} for i in range(5)]
    alone = [client.post(GENERATE, json=body).json()["data"] for body in bodies]
    with ThreadPoolExecutor(10) as pool, engine_held(client):
        asked = [pool.submit(client.post, GENERATE, json=body) for body in bodies]
        crowd = [pool.submit(client.post, GENERATE, json=body | {"determinism": "fast"}) for body in bodies]
        wait_until_waiting(client, 10)
    assert [future.result().json()["data"] for future in asked] == alone
    assert all(future.result().status_code == 200 for future in crowd)


# --- edits


def edited(client: TestClient, picture: bytes | None = None, **fields: Any) -> Any:
    data = {name: str(value) for name, value in fields.items()}
    return client.post(EDIT, files={"image": ("a.png", picture or rgb())}, data=data)


def test_an_edit_begins_from_the_picture(client: TestClient, weights: Path) -> None:
    """Held against the same steps taken by hand: the picture noised to the time of the step, and drawn from there."""
    import torch

    from distillers.generator import Generator, seeded_noise

    generator = Generator.from_pretrained(weights / MANY)
    steps, strength, seed = 5, 0.5, 11
    first = steps - math.ceil(strength * steps)
    start = torch.from_numpy(pixels_of(rgb()).transpose(2, 0, 1) / 127.5 - 1).float()[None]
    stream = seeded_noise([seed], (3, SIDE, SIDE))
    with torch.inference_mode():
        t = torch.tensor(generator.times(steps)[first], dtype=torch.float64)
        x_t = generator.schedule.add_noise(start, next(stream), t)
        for i in range(first, steps):
            now = torch.tensor(generator.times(steps)[i], dtype=torch.float64)
            x0 = generator.denoiser(x_t, now, generator.encode_condition(1, labels=[1]))
            if i + 1 < steps:
                after = torch.tensor(generator.times(steps)[i + 1], dtype=torch.float64)
                x_t = generator.schedule.step(x_t, x0, now, after)
        expected = ((x0.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()
    answer = edited(client, model=MANY, prompt="Forest", steps=steps, strength=strength, seed=seed)
    assert abs(pictures(answer)[0] - expected).max() <= 1
    assert answer.json()["nfe"] == steps - first and answer.json()["data"][0]["label"] == "Forest"


def test_strength_decides_how_much_of_the_picture_stays(client: TestClient) -> None:
    common = {"model": MANY, "steps": 8, "seed": 1, "label": 0}
    light, heavy = (pictures(edited(client, strength=s, **common))[0] for s in (0.125, 1.0))
    other = pictures(edited(client, rgb(seed=3), strength=0.125, **common))[0]
    given = pixels_of(rgb())
    assert abs(light - given).mean() < abs(heavy - given).mean()
    assert abs(light - other).mean() > 1
    assert [edited(client, strength=s, **common).json()["nfe"] for s in (0.01, 0.5, 0.51, 1)] == [1, 4, 5, 8]
    assert edited(client, strength=0.2, model="plain").json()["nfe"] == 1  # of one step there is no smaller share


def test_a_translator_takes_the_picture_as_sar_and_has_no_use_for_the_prompt(client: TestClient) -> None:
    sar = file_of(grey(20, 24))
    answer = edited(client, sar, model="sar", prompt="anything", seed=4, n=2, size="24x20")
    native = client.post(TRANSLATE, files={"image": sar}, data={"seed": "4", "n": "2"})
    assert answer.json()["data"] == native.json()["data"] and answer.json()["size"] == "24x20"
    assert error_of(edited(client, sar, model="sar", size="20x24"), 400)["param"] == "size"


def test_edits_of_a_batch_do_not_depend_on_each_other(client: TestClient) -> None:
    asked = [
        {"model": MANY, "steps": 4, "strength": 0.5, "seed": i, "label": i % 3, "picture": rgb(seed=i)}
        for i in range(4)
    ]
    alone = [pictures(edited(client, **one))[0] for one in asked]
    with ThreadPoolExecutor(4) as pool, engine_held(client):
        together = [pool.submit(lambda one=one: edited(client, **one)) for one in asked]
        wait_until_waiting(client, 4)
    for one, other in zip(alone, together, strict=True):
        assert abs(one - pictures(other.result())[0]).max() <= 1


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"strength": 0}, "strength", "0"),
        ({"strength": 1.1}, "strength", "1"),
        ({"strength": "nan"}, "strength", ""),
        ({"sead": 1}, "sead", "seed"),
        ({"picture": rgb(8, 16)}, "image", f"{SIDE}x{SIDE}"),
        ({"picture": b"GIF89a"}, "image", ""),
        ({"size": "8x8"}, "size", f"{SIDE}x{SIDE}"),
        ({"prompt": "a cat"}, "prompt", "Forest"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"n": 99}, "n", "1..16"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"output_format": "gif"}, "output_format", "png"),
    ],
    ids=str,
)
def test_bad_edits(client: TestClient, fields: dict[str, Any], param: str, allowed: str) -> None:
    error = error_of(edited(client, **{"model": "classes", **fields}), 400)
    assert error["param"] == param and allowed in error["message"]


def test_bad_forms_of_an_edit(client: TestClient) -> None:
    picture = ("a.png", rgb())
    masked = client.post(EDIT, files={"image": picture, "mask": picture}, data={"model": "classes"})
    assert error_of(masked, 400)["param"] == "mask"
    several = client.post(EDIT, files=[("image[]", picture), ("image[]", picture)], data={"model": "classes"})
    assert "2 of them" in error_of(several, 400)["message"]
    assert client.post(EDIT, files=[("image[]", picture)], data={"model": "plain"}).status_code == 200
    assert error_of(client.post(EDIT, files={"picture": picture}), 400)["param"] == "image"
    assert error_of(client.post(EDIT, data={"image": "text"}, files={"x": b""}), 400)["param"] == "image"
    assert error_of(client.post(EDIT, files={"image": picture}, params={"n": "1"}), 400)["param"] == "n"
    error_of(client.post(EDIT, content="x", headers={"Content-Type": "text/plain"}), 415)
    too_large = ("a.png", file_of(np.zeros((101, 100, 3), np.uint8)))
    error_of(client.post(EDIT, files={"image": too_large}, data={"model": "plain"}), 413)


# --- events


def test_views_of_the_unfinished_picture_and_then_the_picture(client: TestClient) -> None:
    body = {"model": MANY, "label": 2, "seed": 5, "steps": 6, "stream": True, "partial_images": 2}
    answer = client.post(GENERATE, json=body)
    events = events_of(answer)
    names = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [name for name, _ in events] == names == [data["type"] for _, data in events]
    assert [data.get("partial_image_index") for _, data in events] == [0, 1, None]
    first, second, last = (pixels_of(base64.b64decode(data["b64_json"])) for _, data in events)
    whole = client.post(GENERATE, json=body | {"stream": False, "partial_images": 0})
    assert (last == pictures(whole)[0]).all()
    assert abs(first - last).mean() > abs(second - last).mean() > 0  # each view is nearer to the end
    facts = events[-1][1]
    assert facts["size"] == "16x16" and facts["seed"] == 5 and facts["timings"]["forward_ms"] > 0
    assert facts["usage"]["total_tokens"] == 0 and answer.headers["x-fewstep-steps"] == "6"


def test_one_step_has_nothing_to_show_before_its_end_and_several_pictures_end_one_by_one(client: TestClient) -> None:
    body = {"model": "plain", "seed": 8, "stream": True, "partial_images": 3}
    assert [name for name, _ in events_of(client.post(GENERATE, json=body))] == ["image_generation.completed"]
    several = events_of(client.post(GENERATE, json=body | {"model": MANY, "n": 2, "steps": 3}))
    partial = [(d["seed"], d["partial_image_index"]) for name, d in several if name.endswith("partial_image")]
    assert sorted(partial) == [(8, 0), (8, 1), (9, 0), (9, 1)]
    assert [(name, d["seed"]) for name, d in several[-2:]] == [("image_generation.completed", s) for s in (8, 9)]


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (0, 2), (0, 4), (0, 5), (3, 9), (0, 250)])
def test_which_steps_are_partial_steps(first: int, steps: int) -> None:
    for wanted in range(4):
        views = partial_steps(first, steps, wanted)
        assert list(views.values()) == list(range(min(wanted, steps - 1 - first)))
        assert list(views) == sorted(set(views)) and all(first <= step < steps - 1 for step in views)
    assert list(partial_steps(0, 250, 3)) == [61, 124, 186]


def test_what_is_wrong_before_the_first_event_is_an_ordinary_error(client: TestClient) -> None:
    body = {"model": "classes", "stream": True}
    assert error_of(client.post(GENERATE, json=body | {"steps": 7}), 400)["param"] == "steps"
    raw = client.post(GENERATE, json=body, headers={"Accept": "image/png"})
    assert error_of(raw, 400)["param"] == "stream"


def test_what_goes_wrong_later_is_an_event(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine_of(client).models[MANY]
    forward = model.generator.forward

    def fails_after_the_first_step(noise: Any, *given: Any, **more: Any) -> Any:
        forward(noise, *given, **more)
        raise ArithmeticError("a secret of the server")

    monkeypatch.setattr(model.generator, "forward", fails_after_the_first_step)
    body = {"model": MANY, "steps": 2, "stream": True, "partial_images": 1}
    (view, _), (name, data) = events_of(client.post(GENERATE, json=body))
    assert (view, name) == ("image_generation.partial_image", "error")
    assert data["error"]["code"] == "internal_error" and "secret" not in data["error"]["message"]


# --- a real process


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    with serving(weights) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def ai(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=None) as ai:
        yield ai


@pytest.mark.process
def test_openais_client_edits(ai: OpenAI) -> None:
    picture = ("a.png", rgb(), "image/png")
    answer = ai.images.edit(image=picture, prompt="Forest", model=MANY, n=2, extra_body={"seed": 7, "strength": 0.5})
    assert answer.data is not None and len(answer.data) == 2 and answer.size == "16x16"
    assert pixels_of(base64.b64decode(answer.data[0].b64_json or "")).shape == (SIDE, SIDE, 3)
    translated = ai.images.edit(image=[("a.png", file_of(grey(24, 16)), "image/png")], prompt="ignored", model="sar")
    assert translated.size == "16x24"
    with pytest.raises(openai.BadRequestError) as masked:
        ai.images.edit(image=picture, mask=picture, prompt="Forest", model=MANY)
    assert masked.value.param == "mask"


@pytest.mark.process
def test_openais_client_streams(ai: OpenAI) -> None:
    more = {"seed": 3, "steps": 5}
    generated = list(ai.images.generate(model=MANY, prompt="Forest", stream=True, partial_images=2, extra_body=more))
    assert [event.type for event in generated] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    last = generated[-1]
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0 and last.size == "16x16"
    whole = ai.images.generate(model=MANY, prompt="Forest", extra_body=more)
    assert whole.data is not None and whole.data[0].b64_json == last.b64_json
    edits = list(
        ai.images.edit(
            image=("a.png", rgb()), model=MANY, prompt="Forest", stream=True, partial_images=1, extra_body=more
        )
    )
    assert [event.type for event in edits] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.process
def test_openais_client_maps_the_errors(ai: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        ai.images.generate(model="gpt-image", prompt="Forest")
    assert absent.value.code == "model_not_found" and absent.value.request_id
    with pytest.raises(openai.BadRequestError, match="Forest") as refused:
        ai.images.generate(model="classes", prompt="a cat")
    assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError):
        ai.images.generate(model="classes", prompt="Forest", stream=True, n=99)
    raw = ai.images.with_raw_response.generate(model="classes", prompt="Forest")
    assert raw.request_id == raw.headers["x-request-id"] and raw.parse().data


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    seen = b""
    while mark not in seen:
        part = connection.recv(1 << 16)
        assert part, seen
        seen += part
    return seen


def sends(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection of our own, with a request on its way."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=300)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def drawn_by(address: str, model: str) -> float:
    lines = http_get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("fewstep_images_total") and model in line)


@pytest.mark.process
@pytest.mark.parametrize("stream", [False, True], ids=["at once", "stream"])
def test_a_storm_of_callers_who_leave_costs_nothing_that_still_waited(address: str, stream: bool) -> None:
    port = int(address.rsplit(":", 1)[1])
    before = drawn_by(address, MANY)
    long = {"model": MANY, "label": 0, "steps": 250}
    first = sends(port, long | {"n": 8, "stream": True, "partial_images": 1})
    read_until(first, b"partial_image")  # it is being drawn, and lets only shorter ones pass
    leaving = [sends(port, long | {"stream": stream, "seed": i}) for i in range(40)]
    time.sleep(0.3)
    for connection in leaving:
        connection.close()
    read_until(first, b"completed")
    first.close()
    answer = http_post(f"{address}{GENERATE}", json={"model": "plain"})
    assert answer.json()["timings"]["batch"] == 1
    assert drawn_by(address, MANY) == before + 8


@pytest.mark.process
def test_who_leaves_in_the_middle_of_a_stream_leaves_a_server_that_answers(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    leaving = sends(port, {"model": MANY, "label": 0, "steps": 40, "stream": True, "partial_images": 3})
    read_until(leaving, b"partial_image")
    leaving.close()
    assert http_post(f"{address}{GENERATE}", json={"model": "plain"}).status_code == 200
