"""Weights folders that are half copied, or made by somebody hostile: refused by reason, while others are served."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from service import GENERATE, engine_of, publish, until, until_ready
from starlette.testclient import TestClient

from app.engine import folders
from app.engine.profile import Profile
from app.main import create_app
from app.settings import Settings
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.weights.manifest import LARGEST_JSON, Info, load_json, sha256_of

SECRET = {"auths": {"registry": {"auth": "TOPSECRET"}}}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    return root / "plain"


@pytest.fixture(scope="module")
def client(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server beside whose good folder others come and go."""
    root = tmp_path_factory.mktemp("weights")
    shutil.copytree(published, root / "plain")
    settings = Settings(weights=root, device="cpu", tune_seconds=0, rescan_seconds=0.05)
    with TestClient(create_app(settings)) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def root_of(client: TestClient) -> Path:
    return engine_of(client).settings.weights


def change(folder: Path, **fields: object) -> None:
    """Write other fields into a manifest."""
    file = folder / "fewstep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def configure(folder: Path, **fields: object) -> None:
    """Write other fields into a network's configuration, and its digest into the manifest."""
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    change(folder, sha256=Info.read(folder).sha256 | {"unet/config.json": sha256_of(file)})


def link(folder: Path, name: str, target: Path | str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def secret_of(folder: Path) -> Path:
    """A file of the server's, beside its weights."""
    file = folder.parents[1] / "secret.json"
    row = {"role": "student", "steps": 1, "frechet": 1.0}
    file.write_text(json.dumps(SECRET | {"rows": [row]}))
    return file


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a file": (lambda folder: link(folder, "golden.json", secret_of(folder)), "golden.json: got 'a link"),
    "its weights are a link": (
        lambda folder: link(folder, "unet/diffusion_pytorch_model.safetensors", secret_of(folder)),
        "a link that leaves",
    ),
    "a link to a folder": (lambda folder: link(folder, "examples", folder.parents[1]), "examples: got 'a link"),
    "its manifest is a link": (lambda folder: link(folder, "fewstep.json", secret_of(folder)), "a link that leaves"),
    "a pipe": (lambda folder: os.mkfifo(folder / "golden.json"), "neither a file nor a folder"),
    "a path upwards": (lambda folder: change(folder, sha256={"../../secret.json": "0" * 64}), "paths of files in this"),
    "a path of the system": (lambda folder: change(folder, sha256={"/etc/passwd": "0" * 64}), "paths of files in this"),
    "deep": (lambda folder: (folder / "fewstep.json").write_text("[" * 100_000), "64 levels"),
    "deep, as an object": (
        lambda folder: (folder / "fewstep.json").write_text('{"a":' * 70 + "1" + "}" * 70),
        "64 levels",
    ),
    "enormous": (lambda folder: (folder / "fewstep.json").write_text(" " * (LARGEST_JSON + 1)), "bytes"),
    "no number": (lambda folder: change(folder, guidance_scale=float("nan")), "NaN is no finite number"),
    "beyond all numbers": (
        lambda folder: (folder / "fewstep.json").write_text(
            (folder / "fewstep.json").read_text().replace("999.0", "1e999")
        ),
        "1e999 is no finite number",
    ),
    "a size": (lambda folder: change(folder, size=[100_000, 100_000]), "pixels or fewer"),
    "steps": (lambda folder: change(folder, step_times={"1": [999.0], "251": [1.0] * 251}), "250 steps or fewer"),
    "names of classes": (lambda folder: change(folder, labels=["x" * (1 << 20) + "y"]), "letters"),
    "a network of many parameters": (
        lambda folder: configure(folder, block_out_channels=[80_000, 160_000], norm_num_groups=8),
        "parameters'; allowed: those of its weights",
    ),
    "a network of many layers": (lambda folder: configure(folder, layers_per_block=10**9), "layers_per_block: got 10"),
    "a network of many blocks": (
        lambda folder: configure(folder, down_block_types=["DownBlock2D"] * 100_000),
        "a list of 100000",
    ),
    "no text": (lambda folder: (folder / "fewstep.json").write_bytes(b"\xff\xfe{}\x00"), "a readable fewstep.json"),
    "a golden picture of many steps": (
        lambda folder: (folder / "golden.json").write_text('{"steps": 1000000000, "levels": []}'),
        "golden.json",
    ),
    "a golden picture of no numbers": (
        lambda folder: (folder / "golden.json").write_text('{"steps": 1, "levels": NaN}'),
        "golden.json",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_with_the_reason(
    published: Path, client: TestClient, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    spoil, reason = HOSTILE[kind]
    root, beside = root_of(client), root_of(client).parent / "beside" / "hostile"
    shutil.copytree(published, beside)
    try:
        spoil(beside)
        beside.rename(root / "hostile")
        told = until(lambda: client.get("/readyz").json()["reasons"].get("hostile"))
        assert reason in told and len(told) < 1000 and str(root) not in told and "TOPSECRET" not in told
        ready = client.get("/readyz").json()
        assert ready["status"] == "ready" and ready["models"] == ["plain"] and ready["failed"] == ["hostile"]
        assert f"hostile is not served: {told}" in caplog.text and "TOPSECRET" not in caplog.text
        assert client.post(GENERATE, json={"model": "plain"}).status_code == 200
        with pytest.raises(BadInput) as refused:  # what a caller with the scope admin is told
            engine_of(client).store.load("hostile").result()
        assert str(root) not in str(refused.value)
    finally:
        shutil.rmtree(beside.parent, ignore_errors=True)
        shutil.rmtree(root / "hostile", ignore_errors=True)
        until(lambda: "hostile" not in engine_of(client).store.slots)


def test_names_that_cannot_be_shown_are_refused_and_named(published: Path, client: TestClient) -> None:
    root = root_of(client)
    names = {os.fsencode(root) + b"/s\xe9same": "s\\udce9same", os.fsencode(root / "a\nb"): "a\\nb"}
    for place in names:
        shutil.copytree(os.fsencode(published), place)
    try:
        ready = until(
            lambda: (
                (told := client.get("/readyz")).status_code == 200
                and set(told.json()["failed"]) == set(names.values())
                and told.json()
            )
        )
        assert all("printable text in UTF-8" in ready["reasons"][name] for name in names.values())
        for path in ("/livez", "/health", "/v1/models", "/metrics"):
            assert client.get(path).status_code == 200
    finally:
        for place in names:
            shutil.rmtree(place)
        until(lambda: len(engine_of(client).store.slots) == 1)


def test_a_half_copied_folder_is_served_when_its_last_file_has_come(published: Path, client: TestClient) -> None:
    """Whatever file comes last, weights or configuration, and nothing else is touched; a mended one, too."""
    root = root_of(client)
    files = ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert set(Info.read(published).sha256) == {*files, "model_index.json"}
    for last in files:
        shutil.copytree(published, root.parent / "copied")
        (root.parent / "copied" / last).unlink()
        (root.parent / "copied").rename(root / "copied")
        assert last in until(lambda: engine_of(client).store.reasons.get("copied"))
        (root / "copied" / last).write_text("{")  # it has begun to arrive
        until(lambda: "missing" not in engine_of(client).store.reasons.get("copied", "missing"))
        shutil.copy(published / last, root / "copied" / last)
        until(lambda: "copied" in client.get("/readyz").json()["models"])
        assert engine_of(client).store.reasons == {} and engine_of(client).failed == []
        shutil.rmtree(root / "copied")
        until(lambda: "copied" not in engine_of(client).store.slots)


def test_nothing_but_a_change_makes_a_folder_another(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "own"))
    before = folders.version(folder)
    (folder / "profile.json").write_text("{}")  # the server's own
    (folder / "training").mkdir()
    (folder / "training" / "cost.json").write_text("{}")
    assert folders.version(folder) == before is not None
    for name in ("golden.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (folder / name).write_text("{}")
        assert folders.version(folder) != before
        before = folders.version(folder)
    assert folders.version(tmp_path / "absent") is None


@pytest.mark.parametrize("kind", ["link", "pipe", "circle"])
def test_a_folder_is_served_without_a_report_that_leads_out_of_it(
    published: Path, client: TestClient, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    root = root_of(client)
    beside = Path(shutil.copytree(published, root.parent / "beside" / "linked"))
    if kind == "pipe":
        os.mkfifo(beside / "report.json")
    else:
        link(beside, "report.json", secret_of(root / "linked") if kind == "link" else "report.json")
    beside.rename(root / "linked")
    try:
        told = until(lambda: client.get("/readyz").json()["reasons"].get("linked"))
        assert told.startswith("served without its report: linked/report.json: got ") and told in caplog.text
        ready = client.get("/readyz").json()
        assert (ready["models"], ready["failed"]) == (["linked", "plain"], [])
        answer = client.get("/v1/models/linked")
        assert answer.status_code == 200 and answer.json()["report"] is None
        chosen = client.post(GENERATE, json={"model": "linked", "latency_budget_ms": 1e6})
        assert chosen.status_code == 200 and chosen.json()["chosen"]["quality"] is None
        assert "TOPSECRET" not in answer.text + caplog.text
    finally:
        shutil.rmtree(root / "linked")
        until(lambda: "linked" not in engine_of(client).store.slots)


def test_a_report_that_becomes_a_link_or_no_json_is_not_served(client: TestClient) -> None:
    """Also after the folder was opened."""
    report = root_of(client) / "plain" / "report.json"
    for text in ('{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, None, '{"rows": [1]}'):
        report.write_text(text) if text else link(report.parent, report.name, secret_of(report.parent))
        answer = client.get("/v1/models/plain")
        assert answer.status_code == 200 and answer.json()["report"] in (None, {"rows": [1]})
        chosen = client.post(GENERATE, json={"model": "plain", "latency_budget_ms": 1e6})
        assert chosen.status_code == 200 and chosen.json()["chosen"]["quality"] is None
        report.unlink()
    report.write_text('{"frechet": 12.5}')
    assert client.get("/v1/models/plain").json()["report"] == {"frechet": 12.5}
    report.unlink()


def test_links_within_a_folder_and_to_it_are_as_good_as_files(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "store" / "own"))
    (folder / "unet" / "config.json").rename(folder / "kept.json")
    link(folder, "unet/config.json", "../kept.json")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "own").symlink_to(folder)
    folders.check(tmp_path / "weights" / "own", Settings(weights=tmp_path))
    assert Generator.from_pretrained(folder, "cpu").info.name == "plain"


PROFILES: list[dict[str, Any]] = [
    {"buckets": {"1": "soon"}},
    {"buckets": {"2": 0.1}},
    {"buckets": {"0": 0.1, "1": 0.1}},
    {"buckets": {"1": 0.1, "2": -1}},
    {"buckets": {"one": 0.1}},
    {"buckets": [0.1]},
    {"threads": 1_000_000},
    {"threads": -1},
    {"steps": 0},
    {"backend": None},
]


@pytest.mark.parametrize("fields", PROFILES, ids=str)
def test_a_profile_that_was_never_measured_is_not_believed(fields: dict[str, Any]) -> None:
    """It comes with the folder, and decides how many threads run and how long others are told to wait."""
    honest = Profile(backend="channels-last", threads=1, buckets={1: 0.1, 4: 0.2}, against_one={4: 1}, spread=0.1)
    stored = json.loads(json.dumps(asdict(honest)))
    assert Profile.from_json(stored) == honest and Profile.from_json({}) == Profile()
    with pytest.raises(ValueError):
        Profile.from_json(stored | fields)


def test_json_that_is_honest_is_read_as_it_is(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, 1e-300, None, True, "é"], "b": json.loads("[" * 62 + "]" * 62)}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert load_json(tmp_path / "a.json") == value
    with pytest.raises(FileNotFoundError):
        load_json(tmp_path)


@pytest.mark.parametrize("base", ["../other", "/etc", ".", "..", ""])
def test_the_base_of_an_adapter_is_named_and_no_path(published: Path, tmp_path: Path, base: str) -> None:
    from distillers.weights.manifest import base_beside

    folder = Path(shutil.copytree(published, tmp_path / "weights" / "own"))
    shutil.copytree(published, tmp_path / "other")
    change(folder, lora={"rank": 1, "base": base, "sha256": "0" * 64})
    assert base_beside(folder) is None
