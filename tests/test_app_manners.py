"""Manners of HTTP and of its clients: HEAD, Accept, text that is none, edits in JSON, aliases, prefixes, settings."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from service import GENERATE, LABELS, SIDE, TRANSLATE, error_of, file_of, grey, pixels_of, publish, until_ready
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.main import create_app
from app.middleware.connections import GuardedProtocol
from app.requests.answers import RAW, accepted_format
from app.settings import Settings, read_settings
from distillers import cli
from distillers.errors import BadInput

EDIT = "/v1/images/edits"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "classes", "class-to-image", labels=LABELS, teacher="not-here", step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[TestClient]:
    aliases = {"gpt-image-1": "classes", "dall-e-3": "gone"}
    settings = Settings(weights=weights, device="cpu", tune_seconds=0, model_aliases=aliases)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def test_head_is_answered_as_get_without_a_body(client: TestClient) -> None:
    paths = [path for path, verbs in client.get("/openapi.json").json()["paths"].items() if "get" in verbs]
    paths = [path.replace("{name}", "classes").replace("{id}", "x") for path in paths]
    for path in ["/", "/docs", "/static/app.js", "/openapi.json", *paths]:
        got, head = client.get(path), client.head(path)
        assert (got.status_code, got.headers["content-type"]) == (head.status_code, head.headers["content-type"]), path
        assert got.status_code == {"/v1/jobs/x": 404, "/v1/jobs/x/classes": 400, "/v1/realtime": 426}.get(path, 200), (
            path
        )
    assert client.head(GENERATE).status_code == 405
    assert not any("head" in verbs for verbs in client.get("/openapi.json").json()["paths"].values())


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", None),
        ("application/json", None),
        ("image/png", "png"),
        ("IMAGE/PNG", "png"),
        ("application/octet-stream", "raw"),
        ("text/html", None),
        ("", None),
        ("image/png, application/json", "png"),
        ("application/json, image/png", None),
        ("image/png, */*", "png"),
        ("*/*, image/webp", "webp"),
        ("image/*", "png"),
        ("image/*;q=0.5, image/webp", "webp"),
        ("image/*, image/png;q=0", "jpeg"),
        ("image/png;q=0, application/json", None),
        ("image/png;q=0", None),
        ("image/webp;q=0.1, application/json", None),
        ("application/json;q=0.1, image/png", "png"),
        ("application/json ; q=0.2 , image/jpeg ; q=0.3", "jpeg"),
        ("*/*;q=0.1, image/jpeg;q=0.05", None),
        ("image/png;q=2, application/json", None),
        ("image/png;q=high, application/json", None),
        (",;,;q=1,image/jpeg", "jpeg"),
    ],
)
def test_the_type_that_is_wanted_most_is_answered(accept: str, kind: str | None) -> None:
    request = Request({"type": "http", "headers": [(b"accept", accept.encode())]})
    assert accepted_format(request) == kind
    assert accepted_format(Request({"type": "http", "headers": []})) is None


def test_weights_of_accept_decide_over_http(client: TestClient) -> None:
    for accept, kind in [
        ("image/webp;q=0.1, application/json", "application/json"),
        ("*/*;q=0.1, image/*", "image/png"),
    ]:
        answer = client.post(GENERATE, json={"prompt": "Forest", "model": "classes"}, headers={"Accept": accept})
        assert answer.status_code == 200 and answer.headers["content-type"] == kind
    assert set(RAW) == {"image/png", "image/jpeg", "image/webp", "application/octet-stream"}


# --- text that is none


def test_lone_surrogates_are_wrong_input(client: TestClient) -> None:
    json_kind = {"Content-Type": "application/json"}
    for path in (GENERATE, EDIT, "/v1/benchmarks"):
        for body in (b'{"\\ud800": 1}', b'{"model": "\\ud800"}', b'{"prompt": "\\udfff"}', b"\xff\xfe", b"[" * 100_000):
            answer = client.post(path, content=body, headers=json_kind)
            assert answer.status_code in (400, 404), (path, body[:20], answer.text)
    for path in ("/v1/models/%ed%a0%80", "/%ed%a0%80", "/v1/jobs/%ff", "/v1/jobs/x/%ff"):
        assert client.get(path).status_code in (400, 404)
    answer = client.post(TRANSLATE + "?%ed%a0%80=1", content=b"x", headers={"Content-Type": "image/png"})
    error_of(answer, 400)


@pytest.mark.parametrize(
    "charset", ["utf-7", "utf-16", "idna", "undefined", "unicode_escape", "rot13", "none", '"utf-7"']
)
@pytest.mark.parametrize("path", [EDIT, TRANSLATE, "/v1/jobs/translations"])
def test_forms_are_utf_8(client: TestClient, path: str, charset: str) -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="+2AA-"\r\n\r\n1\r\n--B--\r\n'
    kind = {"Content-Type": f"multipart/form-data; boundary=B; charset={charset}"}
    assert error_of(client.post(path, content=form, headers=kind), 400)["param"] == "charset"
    for good in ("utf-8", "UTF-8", '"utf-8"'):
        kind = {"Content-Type": f"multipart/form-data; charset={good}; boundary=B"}
        assert error_of(client.post(path, content=form, headers=kind), 400)["param"] != "charset"


def test_forms_with_any_bytes_are_wrong_input(client: TestClient) -> None:
    for name, value in [(b"prompt", b"\xff\xfe"), (b"\xed\xa0\x80", b"1"), (b"model", b"\xed\xa0\x80")]:
        picture = b'--B\r\nContent-Disposition: form-data; name="image"; filename="\xff"\r\n\r\nx\r\n'
        field = b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n--B--\r\n' % (name, value)
        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        for path in (EDIT, TRANSLATE):
            assert client.post(path, content=picture + field, headers=kind).status_code in (400, 404)


# --- what OpenAI's clients send


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_an_edit_as_json_is_the_same_as_the_form(client: TestClient) -> None:
    """OpenAI's newer form, where the picture is an address."""
    picture = file_of(grey(SIDE, SIDE))
    fields = {"model": "classes", "prompt": "Forest", "seed": 7, "output_format": "png", "n": 1}
    form = client.post(EDIT, data=fields, files={"image": ("a.png", picture)}, headers={"Accept": "image/png"})
    body = fields | {"images": [{"image_url": data_url(picture)}], "input_fidelity": "high", "quality": "auto"}
    answer = client.post(EDIT, json=body, headers={"Accept": "image/png"})
    assert answer.status_code == form.status_code == 200, answer.text
    assert (pixels_of(answer.content) == pixels_of(form.content)).all()


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"images": [{"image_url": "https://elsewhere.example/a.png"}]}, "no address is fetched"),
        ({"images": [{"image_url": "file:///etc/passwd"}]}, "no address is fetched"),
        ({"images": [{"image_url": "data:image/png,abc"}]}, "no address is fetched"),
        ({"images": [{"image_url": "data:image/png;base64,%%%"}]}, "no address is fetched"),
        ({"images": [{"image_url": ""}]}, "no address is fetched"),
        ({"images": [{"image_url": 1}]}, "image_url"),
        ({"images": [{"file_id": "file-1"}]}, "image_url"),
        ({"images": [{}]}, "image_url"),
        ({"images": []}, "images"),
        ({"images": [{"image_url": data_url(b"x")}] * 2}, "images"),
        ({"images": "a"}, "images"),
        ({}, "images"),
        ({"images": [{"image_url": data_url(b"x")}]}, "image"),
        ({"images": [{"image_url": data_url(b"x")}], "n": "1"}, "n"),
        ({"images": [{"image_url": data_url(b"x")}], "mask": {"image_url": data_url(b"x")}}, "mask"),
    ],
    ids=str,
)
def test_bad_edits_as_json(client: TestClient, fields: dict[str, Any], allowed: str) -> None:
    assert allowed in error_of(client.post(EDIT, json={"model": "classes"} | fields), 400)["message"]


def test_names_that_clients_insist_on_are_aliases(client: TestClient) -> None:
    answer = client.post(GENERATE, json={"model": "gpt-image-1", "prompt": "Forest"})
    assert answer.status_code == 200 and answer.json()["model"] == "classes"
    assert client.get("/v1/models/gpt-image-1").json()["id"] == "classes"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["classes", "sar"]
    assert "'gone'" in error_of(client.post(GENERATE, json={"model": "dall-e-3"}), 404)["message"]
    error_of(client.post(GENERATE, json={"model": "dall-e-2"}), 404)
    with client.websocket_connect("/v1/realtime") as socket:
        socket.send_text(json.dumps({"seq": 1, "model": "gpt-image-1"}))
        assert b'"model":"classes"' in socket.receive_bytes()


# --- behind a proxy


def test_everything_is_found_below_a_prefix(weights: Path) -> None:
    """The proxy takes the prefix off, and uvicorn puts it before the path again, as ASGI wants."""
    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0))
    with TestClient(app, root_path="/fewstep", base_url="http://host/fewstep/") as client:
        until_ready(lambda: client.get("readyz"))
        for page in ("", "docs"):
            text = client.get(page).text
            addresses = re.findall(r'(?:src|href)="([^"#]+)"', text)
            assert len(addresses) > 3
            for address in addresses:
                if not address.startswith("data:"):
                    assert not address.startswith("/")
                    assert client.get(client.base_url.join(address)).status_code == 200, address
        assert client.post("v1/images/generations", json={"model": "classes"}).status_code == 200
        assert client.get("openapi.json").json()["servers"] == [{"url": "/fewstep"}]
        sent = client.post("v1/jobs/translations", content=b"no scene", headers={"Content-Type": "image/tiff"})
        assert sent.status_code in (400, 501)
    for script in (Path(__file__).parents[1] / "app" / "static").glob("*.js"):
        assert not re.search(r"[\"'`]/[a-z]", script.read_text()), script


# --- the document


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from (value for name, value in part.items() if name == "$ref")
        part = list(part.values())
    for inner in part if isinstance(part, list) else ():
        yield from references(inner)


def test_the_document_tells_the_realtime_route_and_who_needs_a_key(
    client: TestClient, weights: Path, tmp_path: Path
) -> None:
    open_one = client.get("/openapi.json").json()
    (tmp_path / "keys.toml").write_text("")
    with_keys = create_app(Settings(weights=weights, keys=tmp_path / "keys.toml")).openapi()
    for described in (open_one, with_keys):
        assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        realtime = described["paths"]["/v1/realtime"]["get"]
        assert {"101", "426", "429"} <= set(realtime["responses"]) and "seq" in realtime["x-messages"]["properties"]
        for reference in references(described["paths"]):
            assert reference.removeprefix("#/components/schemas/") in described["components"]["schemas"], reference
        security = {path: next(iter(verbs.values()))["security"] for path, verbs in described["paths"].items()}
        assert security["/livez"] == [] and security["/v1/models/{name}/load"] == [{"key": ["admin"]}]
        optional = [] if described is with_keys else [{}]
        assert security[GENERATE] == [*optional, {"key": ["infer"]}]
        assert security["/metrics"] == [*optional, {"key": ["metrics"]}]
    assert error_of(client.get("/v1/realtime"), 426)["code"] == "upgrade_required"
    assert client.get("/v1/realtime").headers["upgrade"] == "websocket"


# --- settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command writes into the environment is taken out again."""
    for name in ("WEIGHTS", "DEVICE"):
        monkeypatch.setenv(f"FEWSTEP_{name}", "")


WRONG = {
    "MAX_BATCH": "0",
    "DEVICE": "mps",
    "LOG_LEVEL": "loud",
    "TUNE_SECONDS": "nan",
    "SCRATCH": "/nope",
    "LORAS": "/nope",
    "ORIGINS": "elsewhere.example",
    "MODEL_ALIASES": "gpt-image-1",
    "MAX_N": "many",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_one_line_and_exit_2(weights: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"FEWSTEP_{name}", WRONG[name])
    with pytest.raises(BadInput, match=f"FEWSTEP_{name}: got '{WRONG[name]}'; allowed: ."):
        create_app()
    ran = CliRunner().invoke(cli.app, ["serve", "--weights", str(weights)])
    assert isinstance(ran.exception, BadInput) and "\n" not in str(
        ran.exception
    )  # which `main` prints and exits with 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "99999"],
        ["--device", "mps"],
        ["--device", "cuda:99"],
        ["--root-path", "fewstep/"],
        ["--root-path", "/"],
    ],
    ids=" ".join,
)
def test_a_wrong_argument_is_refused_before_anything_starts(weights: Path, arguments: list[str]) -> None:
    ran = CliRunner().invoke(cli.app, ["serve", "--weights", str(weights), *arguments])
    assert isinstance(ran.exception, BadInput) and arguments[1] in str(ran.exception)


def test_settings_with_commas_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_ORIGINS", "https://A.example, http://localhost:3000")
    monkeypatch.setenv("FEWSTEP_MODEL_ALIASES", "gpt-image-1=avatars-dmd2, dall-e-3 = x=y")
    monkeypatch.setenv("FEWSTEP_SCRATCH", str(tmp_path))
    found = read_settings()
    assert found.origins == ("https://a.example", "http://localhost:3000") and found.scratch == tmp_path
    assert found.model_aliases == {"gpt-image-1": "avatars-dmd2", "dall-e-3": "x=y"}
    for empty in ("ORIGINS", "MODEL_ALIASES"):
        monkeypatch.setenv(f"FEWSTEP_{empty}", "")
    assert (read_settings().origins, read_settings().model_aliases) == ((), {})


def test_what_is_asked_of_uvicorn(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has it guard its connections and know the prefix."""
    import uvicorn

    asked: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: asked.update(options, app=app))
    ran = CliRunner().invoke(cli.app, ["serve", "--weights", str(weights), "--device", "cpu", "--root-path", "/a/b"])
    assert ran.exit_code == 0 and asked["root_path"] == "/a/b"
    config = uvicorn.Config(asked.pop("app"), **asked | {"log_config": None})
    config.load()
    assert issubclass(config.http_protocol_class, GuardedProtocol)
