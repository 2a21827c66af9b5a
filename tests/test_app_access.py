"""Keys, scopes and limits over the real service; request ids, logs; and what no request can make the server do."""

import hashlib
import json
import logging
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from openai import AuthenticationError, OpenAI, PermissionDeniedError, RateLimitError
from processes import run
from service import GENERATE, TRANSLATE, engine_held, engine_of, file_of, grey, publish, until, until_ready
from starlette.testclient import TestClient, WebSocketDenialResponse
from test_app_drain import running
from typer.testing import CliRunner

from app.main import create_app
from app.middleware import access
from app.middleware.access import Keys
from app.routes import realtime
from app.settings import Settings
from distillers import cli
from distillers.errors import BadInput

DRAW = {"model": "plain", "seed": 1}
INFER, ADMIN, METRICS, FEW, ONE = (f"fewstep-{name}-{'x' * 30}" for name in ("infer", "admin", "metrics", "few", "one"))
KEYS = {
    INFER: {"scopes": ["infer"]},
    ADMIN: {"scopes": ["infer", "admin"]},
    METRICS: {"scopes": ["metrics"]},
    FEW: {"scopes": ["infer"], "requests_per_minute": 2},
    ONE: {"scopes": ["infer"], "concurrent": 1},
}
PROBES = ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready")


def entry(key: str, **facts: Any) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    lines = {"name": key.split("-")[1], "sha256": digest} | facts
    return "[[keys]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refused(answer: Any, status: int, kind: str, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, code) and answer.headers["x-request-id"]
    return error


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text("\n".join(entry(key, **facts) for key, facts in KEYS.items()))
    return file


@contextmanager
def serving(weights: Path, **more: Any) -> Iterator[TestClient]:
    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0, **more))
    _mirror(app)
    with TestClient(app, raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def _mirror(app: FastAPI) -> None:
    """A WebSocket that says back what it hears."""

    @app.websocket("/mirror")
    async def mirror(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)


@pytest.fixture(scope="module")
def client(weights: Path, file: Path) -> Iterator[TestClient]:
    with serving(weights, keys=file) as client:
        yield client


@pytest.fixture(scope="module")
def keyless(weights: Path) -> Iterator[TestClient]:
    with serving(weights) as client:
        yield client


def until_waiting(client: TestClient) -> None:
    until(lambda: any(engine_of(client).waiting().values()))


# --- who is let in


def test_a_key_opens_what_its_scopes_say(client: TestClient) -> None:
    assert client.post(GENERATE, json=DRAW, headers=bearer(INFER)).status_code == 200
    assert client.get("/v1/models", headers=bearer(INFER)).status_code == 200
    assert client.get("/metrics", headers=bearer(METRICS)).status_code == 200
    for path, key, needed in [
        ("/metrics", INFER, "metrics"),
        ("/v1/models", METRICS, "infer"),
        ("/v1/benchmarks", ADMIN, "benchmark"),
        ("/v1/models/plain/unload", INFER, "admin"),
        ("/v1/models/plain/load", INFER, "admin"),
    ]:
        verb = "GET" if path in ("/metrics", "/v1/models") else "POST"
        error = refused(client.request(verb, path, headers=bearer(key)), 403, "permission_error", "missing_scope")
        assert f"not for {needed}" in error["message"] and key not in error["message"]
    for act in ("unload", "load"):
        assert client.post(f"/v1/models/sar/{act}", headers=bearer(ADMIN)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer none"},
        {"Authorization": INFER},
        {"Authorization": f"Basic {INFER}"},
        bearer(INFER + "x"),
        bearer(hashlib.sha256(INFER.encode()).hexdigest()),
        {"X-Api-Key": INFER},
    ],
    ids=str,
)
def test_all_else_is_401_before_the_body_is_looked_at(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post(GENERATE, content=b"no json", headers=headers)
    refused(answer, 401, "authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_in_the_url_is_no_key(client: TestClient) -> None:
    for name in ("key", "api_key", "access_token", "token", "Authorization"):
        answer = client.get("/v1/models", params={name: INFER})
        refused(answer, 401, "authentication_error", "invalid_api_key")


def test_probes_and_the_page_need_no_key_and_whatever_is_added_does(client: TestClient) -> None:
    for path in (*PROBES, "/", "/docs", "/openapi.json", "/static/app.js"):
        assert client.get(path).status_code == 200, path
    paths = client.get("/openapi.json").json()["paths"]
    asked = {(verb, path) for path, verbs in paths.items() for verb in verbs if path not in PROBES}
    assert len(asked) > 8
    for verb, path in asked | {("get", "/never-heard-of"), ("get", "/livez/"), ("get", "/static")}:
        answer = client.request(verb, path.replace("{name}", "plain").replace("{id}", "x"), follow_redirects=False)
        assert answer.status_code == 401, (verb, path, answer.status_code)


def test_every_digest_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    constant_time = access.hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(constant_time(one, other))
        return compared[-1]

    keys = Keys(file)
    monkeypatch.setattr(access.hmac, "compare_digest", counting)
    found = [keys.find(key.encode()) for key in (*KEYS, "none")]
    assert [one.key.name if one else None for one in found] == ["infer", "admin", "metrics", "few", "one", None]
    assert len(compared) == len(KEYS) * (len(KEYS) + 1) and sum(compared) == len(KEYS)


def test_without_a_file_all_is_open_but_loading(keyless: TestClient) -> None:
    assert keyless.post(GENERATE, json=DRAW).status_code == 200 and keyless.get("/metrics").status_code == 200
    assert keyless.get("/v1/models", headers=bearer("none")).status_code == 200  # OpenAI's clients insist on a key
    for act in ("load", "unload"):
        answer = keyless.post(f"/v1/models/plain/{act}")
        assert "FEWSTEP_KEYS" in refused(answer, 403, "permission_error", "admin_disabled")["message"]


# --- how much


def test_a_key_has_a_rate_of_its_own_and_is_told_when_to_come_back(client: TestClient) -> None:
    answers = [client.post(GENERATE, json=DRAW, headers=bearer(FEW)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = refused(answers[2], 429, "rate_limit_error", "rate_limit_exceeded")
    assert "2 requests per minute" in error["message"] and 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert client.get("/v1/models", headers=bearer(FEW)).status_code == 200  # reading is free
    assert client.post(GENERATE, json=DRAW, headers=bearer(INFER)).status_code == 200  # others are not slowed


def test_a_token_comes_back_when_it_was_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    key = access.Key(name="a", sha256="0" * 64, scopes=frozenset({"infer"}), requests_per_minute=6)
    allowance = access.Allowance(key)

    def wait() -> int:
        with pytest.raises(access.ApiError) as refusal:
            allowance.enter()
        assert refusal.value.headers is not None
        return int(refusal.value.headers["Retry-After"])

    for _ in range(6):
        allowance.enter()
    assert wait() == 10
    now[0] += 9.5
    assert wait() == 1
    now[0] += 0.5
    allowance.enter()
    assert wait() == 10
    now[0] += 3600  # not more than a minute's worth is saved up
    for _ in range(6):
        allowance.enter()
    assert wait() == 10


def test_a_key_has_its_own_concurrency(client: TestClient) -> None:
    with ThreadPoolExecutor(1) as pool, engine_held(client):
        first = pool.submit(client.post, GENERATE, json=DRAW, headers=bearer(ONE))
        until_waiting(client)
        second = client.post(GENERATE, json=DRAW, headers=bearer(ONE))
        error = refused(second, 429, "rate_limit_error", "rate_limit_exceeded")
        assert "1 requests at the same time" in error["message"] and int(second.headers["retry-after"]) >= 1
    assert first.result().status_code == 200
    for _ in range(3):  # a place is given back, also after a mistake
        assert client.post(GENERATE, json={"sede": 1}, headers=bearer(ONE)).status_code == 400
    assert client.post(GENERATE, json=DRAW, headers=bearer(ONE)).status_code == 200


@pytest.mark.process
def test_openais_client_understands_its_refusals(weights: Path, file: Path) -> None:
    """Over a real server: the kinds of error that its users catch, and the id they are asked for."""

    def ask(key: str) -> Any:
        with OpenAI(base_url=server.url("/v1"), api_key=key, max_retries=0, timeout=None) as client:
            return client.images.with_raw_response.generate(model="plain", prompt="", n=1)

    with running(weights, FEWSTEP_KEYS=str(file)) as server:
        assert (
            ask(INFER).headers["x-request-id"].startswith("req-")
            and ask(FEW).status_code == ask(FEW).status_code == 200
        )
        for key, kind, code in [
            ("none", AuthenticationError, "invalid_api_key"),
            (METRICS, PermissionDeniedError, "missing_scope"),
            (FEW, RateLimitError, "rate_limit_exceeded"),
        ]:
            with pytest.raises(kind) as error:
                ask(key)
            assert error.value.code == code and error.value.request_id.startswith("req-")


# --- WebSockets


def test_a_browsers_websocket_brings_its_key_as_a_subprotocol(client: TestClient) -> None:
    offered = ["fewstep", f"fewstep-key.{INFER}"]
    with client.websocket_connect("/mirror", subprotocols=offered) as socket:
        assert socket.accepted_subprotocol == "fewstep"  # some, or a browser breaks off; never the one with the key
        socket.send_text("hello")
        assert socket.receive_text() == "hello"
    with client.websocket_connect("/mirror", headers=bearer(INFER)) as socket:
        assert socket.accepted_subprotocol is None
    for wrong in ({}, {"subprotocols": ["fewstep", "fewstep-key.none"]}, {"headers": bearer(METRICS)}):
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/mirror", **wrong):
            pass
        assert denied.value.status_code == (403 if "headers" in wrong else 401)


def test_messages_of_a_websocket_count_as_requests_and_wait(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(entry("a-fast-key", scopes=["infer"], requests_per_minute=600))
    with (
        serving(weights, keys=tmp_path / "keys.toml") as client,
        client.websocket_connect("/mirror", headers=bearer("a-fast-key")) as socket,
    ):
        started = time.monotonic()
        for i in range(605):
            socket.send_text(str(i))
        assert [socket.receive_text() for _ in range(605)] == [str(i) for i in range(605)]
        assert time.monotonic() - started > 0.55  # six more than a minute's worth, a tenth of a second each


# --- the file


def test_the_command_makes_what_the_service_reads(tmp_path: Path) -> None:
    made = CliRunner().invoke(cli.app, ["key", "web.page-1", "--scopes", "infer,admin"])
    key = made.stderr.split(": ")[1].strip()
    assert made.exit_code == 0 and key not in made.stdout and len(key) > 40
    (tmp_path / "keys.toml").write_text(made.stdout)
    found = Keys(tmp_path / "keys.toml").find(key.encode())
    assert found is not None and (found.key.name, found.key.scopes) == ("web.page-1", {"infer", "admin"})
    again = CliRunner().invoke(cli.app, ["key", "web.page-1"])
    assert again.stderr != made.stderr
    for wrong in (["key", "a b"], ["key", "a", "--scopes", "all"], ["key", "a", "--scopes", ""]):
        assert isinstance(CliRunner().invoke(cli.app, wrong).exception, BadInput)


GOOD = entry("a-good-key", scopes=["infer"])
BROKEN = {
    "no TOML": ("[[keys", "FEWSTEP_KEYS"),
    "another table": (GOOD + "[other]\n", "FEWSTEP_KEYS"),
    "no list": ("keys = 1", "FEWSTEP_KEYS"),
    "no name": (GOOD.replace("name", "nom"), "keys.0.name"),
    "a name with spaces": (GOOD.replace('"good"', '"a b"'), "keys.0.name"),
    "a key instead of its hash": (
        entry("b-x", scopes=["infer"]) + GOOD.replace("sha256 = ", "sha256 = 'sec' #"),
        "keys.1.sha256",
    ),
    "no scope": (GOOD.replace('["infer"]', "[]"), "keys.0.scopes"),
    "an unknown scope": (GOOD.replace("infer", "all"), "keys.0.scopes"),
    "an unknown field": (GOOD + "rate = 1\n", "keys.0.rate"),
    "no rate": (GOOD + "requests_per_minute = 0\n", "keys.0.requests_per_minute"),
    "half a request": (GOOD + "concurrent = 0.5\n", "keys.0.concurrent"),
    "a name twice": (GOOD + entry("c-good", scopes=["infer"]), "keys.1.name"),
    "a key twice": (GOOD + GOOD.replace('"good"', '"other"'), "keys.1.sha256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_at_the_start_by_entry_and_field(weights: Path, tmp_path: Path, name: str) -> None:
    text, field = BROKEN[name]
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(BadInput) as error:
        create_app(Settings(weights=weights, keys=tmp_path / "keys.toml"))
    assert error.value.field.startswith(field) and "sec'" not in str(error.value)


def test_a_file_that_is_not_there(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="FEWSTEP_KEYS"):
        create_app(Settings(weights=weights, keys=tmp_path / "absent.toml"))


def test_the_file_is_read_again_when_it_changes_and_a_broken_one_keeps_the_old_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "RECHECK", 0.0)
    file, (old, new) = tmp_path / "keys.toml", ("an-old-key", "a-new-key")
    limited = entry(old, scopes=["infer"], requests_per_minute=1)
    file.write_text(limited)
    keys = Keys(file)
    before = keys.find(old.encode())
    assert before is not None and keys.find(new.encode()) is None
    before.enter()
    file.write_text(limited + entry(new, scopes=["infer"]))
    assert keys.find(new.encode()) is not None
    assert keys.find(old.encode()) is before  # a new file is no new allowance
    for broken in ("[[keys", None):
        file.write_text(broken) if broken else file.unlink()
        caplog.clear()
        assert keys.find(new.encode()) is not None and keys.find(old.encode()) is not None
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not at every request
    file.write_text(entry(new, scopes=["infer"]))
    assert keys.find(old.encode()) is None and keys.find(new.encode()) is not None
    file.write_text("")  # the last key is taken back
    assert keys.find(new.encode()) is None


# --- request ids and the log


def test_every_answer_has_a_request_id_and_a_sane_one_is_kept(keyless: TestClient) -> None:
    ids = set()
    for path in ("/livez", "/v1/models", "/absent", "/static/app.js"):
        ids.add(keyless.get(path).headers["x-request-id"])
    assert len(ids) == 4
    assert keyless.get("/livez", headers={"X-Request-Id": "mine.1-a_B"}).headers["x-request-id"] == "mine.1-a_B"
    for insane in ("", "a b", "x" * 65, "é", 'a"b', "a\tb"):
        answer = keyless.get("/livez", headers={"X-Request-Id": insane.encode("latin-1")})
        assert answer.headers["x-request-id"].startswith("req-")
    error = keyless.post(GENERATE, json={"sede": 1}, headers={"X-Request-Id": "mine"})
    assert error.status_code == 400 and error.headers["x-request-id"] == "mine"


def test_what_is_logged_is_one_line_of_facts_and_no_secret(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fewstep.request"):
        body, headers = DRAW | {"user": "a-secret-user"}, bearer(INFER) | {"X-Request-Id": "mine"}
        client.post(GENERATE, json=body, headers=headers)
        client.post(GENERATE + "?secret=1", json={"prompt": "a-secret-prompt"}, headers=headers)
        client.get(f"/v1/models/secret-{INFER}", headers=headers)
        client.get("/livez")
    lines = [record.msg for record in caplog.records if record.name == "fewstep.request"]
    assert len(lines) == 3  # probes are no news
    first = lines[0]
    assert (first["id"], first["key"], first["route"], first["status"]) == ("mine", "infer", GENERATE, 200)
    assert (first["model"], first["seed"], first["method"]) == ("plain", "1", "POST")
    assert first["ms"] > 0 and first["bytes"] > 100
    assert lines[2]["route"] == "/v1/models/{name}" and lines[2]["status"] == 404
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "secret" not in text and INFER not in text and "plain" in text


def test_an_unexpected_error_is_logged_with_the_id_that_the_caller_sees(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(weights=weights, tune_seconds=0))

    @app.get("/boom")
    async def boom() -> None:
        raise ArithmeticError("a secret of the server")

    with TestClient(app) as client:  # raises what the application raises: nothing
        answer = client.get("/boom")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert any(answer.headers["x-request-id"] in record.getMessage() and record.exc_info for record in caplog.records)


# --- what no request can do


def test_cross_origin_requests_are_not_invited(keyless: TestClient) -> None:
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        keyless.options(GENERATE, headers=headers),
        keyless.post(GENERATE, json=DRAW, headers=headers),
        keyless.get("/v1/models", headers=headers),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert keyless.options(GENERATE, headers=headers).status_code == 405


def test_no_request_makes_the_server_fetch_a_url(keyless: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as an image, not as a model, not as a name: a listening socket hears nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for fields in ({"model": url}, {"prompt": url}, {"image": url}, {"response_format": url}, {"user": url}):
            keyless.post(GENERATE, json=DRAW | fields)
        for data in ({"image": url}, {"model": url}, {"image_url": url}, {"bands": url}):
            keyless.post(TRANSLATE, data=data)
            keyless.post(TRANSLATE, data=data, files={"image": (url, url.encode())})
        keyless.post(TRANSLATE, content=url.encode(), headers={"Content-Type": "image/tiff"})
        keyless.get("/v1/models/" + url.replace("/", "%2f"))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_no_field_is_a_path_on_the_server(keyless: TestClient, weights: Path) -> None:
    """A folder that is there and could be served is not, and nothing tells where anything lies."""
    publish(weights.parent / f"{weights.name}-beside", "other", "image", teacher="not-here", step_times={1: [999.0]})
    beside = f"../{weights.name}-beside/other"
    names = (
        beside,
        f"{weights}-beside/other",
        "./plain",
        "plain/../plain",
        str(weights / "plain"),
        "~",
        "\x00",
    )
    for name in names:
        answer = keyless.post(GENERATE, json={"model": name})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        for verb, path in [("GET", ""), ("POST", "/load"), ("POST", "/unload")]:
            quoted = name.replace("/", "%2f").replace("\x00", "%00")
            assert keyless.request(verb, f"/v1/models/{quoted}{path}").status_code in (403, 404)
    answers = [
        keyless.get(path) for path in ("/", "/readyz", "/v1/models", "/v1/models/plain", "/openapi.json", "/metrics")
    ]
    answers += [keyless.post(GENERATE, json=DRAW), keyless.post(GENERATE, json={"model": beside})]
    answers += [keyless.post(TRANSLATE, files={"image": ("/etc/passwd", file_of(grey(16, 16)))})]
    for answer in answers:
        assert str(weights) not in answer.text and "site-packages" not in answer.text and "/etc/" not in answer.text


LOG = """
from pathlib import Path
from starlette.testclient import TestClient
from app.main import create_app
from app.settings import Settings
with TestClient(create_app(Settings(weights=Path("."), log_format="json"))) as client:
    client.get("/absent?secret")
"""


@pytest.mark.process
def test_the_log_is_one_object_per_line_when_machines_read_it(tmp_path: Path) -> None:
    ran = run([sys.executable, "-c", LOG], cwd=tmp_path)
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    asked = [line for line in lines if line["logger"] == "fewstep.request"]
    assert len(asked) == 1 and asked[0]["status"] == 404 and asked[0]["level"] == "info" and asked[0]["time"][-1] == "Z"


def test_every_promise_names_a_test_that_is_there() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (root / "SECURITY.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (root / file).read_text(), f"{file}::{test}"


# --- pages of other sites


@pytest.fixture(scope="module")
def inviting(weights: Path) -> Iterator[TestClient]:
    """A server that lets the pages of one other site ask, behind keys or not."""
    with serving(weights, origins=("https://friend.example",)) as client:
        yield client


HOME, FRIEND, FOREIGN = "http://testserver", "https://friend.example", "https://elsewhere.example"


@pytest.mark.parametrize("path", ["/v1/realtime", "/mirror"])
def test_a_page_of_another_site_opens_no_websocket(keyless: TestClient, inviting: TestClient, path: str) -> None:
    for origin in (FOREIGN, "null", "http://testserver.elsewhere.example", "http://testserver:81", "testserver"):
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            keyless.websocket_connect(path, headers={"Origin": origin}),
        ):
            pass
        assert denied.value.status_code == 403 and denied.value.json()["error"]["code"] == "foreign_origin"
    for client, headers in [
        (keyless, {}),  # no browser
        (keyless, {"Origin": HOME}),
        (keyless, {"Origin": FOREIGN, "Sec-Fetch-Site": "same-origin"}),  # behind a proxy that changes Host
        (inviting, {"Origin": FRIEND}),
    ]:
        with client.websocket_connect(path, headers=headers):
            pass


def test_a_page_of_another_site_makes_nobody_draw(keyless: TestClient, inviting: TestClient) -> None:
    """A form needs no preflight: the browser would send it, and only keep the answer from the page."""
    form = {"files": {"image": ("a.png", file_of(grey(16, 16)))}}
    for path, body in [(GENERATE, {"json": DRAW}), (TRANSLATE, form), ("/v1/images/edits", form)]:
        answer = keyless.post(path, headers={"Origin": FOREIGN, "Sec-Fetch-Site": "cross-site"}, **body)
        refused(answer, 403, "permission_error", "foreign_origin")
    for client, origin in [(keyless, HOME), (inviting, FRIEND)]:
        assert client.post(GENERATE, json=DRAW, headers={"Origin": origin}).status_code == 200
    assert keyless.get("/v1/models", headers={"Origin": FOREIGN}).status_code == 200  # which the page may not read


def test_named_sites_are_invited_and_no_others(inviting: TestClient) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = inviting.options(GENERATE, headers=asked | {"Origin": FRIEND})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == FRIEND
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for answer in (
        inviting.post(GENERATE, json=DRAW, headers={"Origin": FRIEND}),
        inviting.post(GENERATE, json={"sede": 1}, headers={"Origin": FRIEND}),
    ):
        assert answer.headers["access-control-allow-origin"] == FRIEND
        assert answer.headers["access-control-expose-headers"] == "*"
    for answer in (
        inviting.options(GENERATE, headers=asked | {"Origin": FOREIGN}),
        inviting.get("/v1/models", headers={"Origin": FOREIGN}),
    ):
        assert "access-control-allow-origin" not in answer.headers
    assert preflight.headers["x-request-id"]


def test_one_caller_does_not_hold_all_connections(keyless: TestClient) -> None:
    with ExitStack() as held:
        for _ in range(realtime.EACH):
            held.enter_context(keyless.websocket_connect("/v1/realtime"))
        with pytest.raises(WebSocketDenialResponse) as denied, keyless.websocket_connect("/v1/realtime"):
            pass
        assert denied.value.status_code == 429 and denied.value.headers["retry-after"] == "5"
        assert denied.value.json()["error"]["code"] == "too_many_connections"
        with TestClient(keyless.app, client=("10.0.0.9", 1)) as other, other.websocket_connect("/v1/realtime"):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        GOOD + "requests_per_minute = 1" + "0" * 400,
        GOOD + "concurrent = 1" + "0" * 400,
        "\udcff",
    ],
    ids=["deep", "a rate beyond all numbers", "a count beyond all numbers", "no UTF-8"],
)
def test_no_file_of_keys_makes_requests_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(access, "RECHECK", 0.0)
    file = tmp_path / "keys.toml"
    file.write_text(entry("an-old-key", scopes=["infer"]))
    keys = Keys(file)
    file.write_text(text, errors="surrogateescape")
    assert keys.find(b"an-old-key") is not None
    with pytest.raises(BadInput):
        Keys(file)
