"""What /metrics says after real requests: true, bounded, in Prometheus' conventions; and what a request pays for it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service import (
    GENERATE,
    TRANSLATE,
    engine_held,
    engine_of,
    file_of,
    grey,
    publish,
    until,
    until_ready,
    wait_until_waiting,
)
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from app.telemetry.metrics import SECONDS, Metrics

DRAW = {"model": "plain", "seed": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "plain", "image", teacher="not-here", step_times={1: [999.0]})
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture
def client(weights: Path) -> Iterator[TestClient]:
    """Its own application: numbers begin at zero, whatever other applications of this process have counted."""
    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0, queue_limit=16))
    with TestClient(app, raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def scraped(client: TestClient) -> dict[tuple[str, ...], float]:
    """(name, label values ...) -> value; route before model before code."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    samples = [sample for family in families for sample in family.samples]
    order = ("route", "model", "code")
    by_order = [sorted(one.labels, key=lambda name: order.index(name) if name in order else 9) for one in samples]
    return {
        (one.name, *(one.labels[name] for name in names)): one.value
        for one, names in zip(samples, by_order, strict=True)
    }


def test_requests_are_counted_by_template_model_and_code_and_timed_to_the_last_byte(client: TestClient) -> None:
    for _ in range(3):
        assert client.post(GENERATE, json=DRAW).status_code == 200
    client.post(TRANSLATE, files={"image": file_of(grey(16, 16))})
    client.post(GENERATE, json={"sede": 1})
    for i in range(50):
        client.get(f"/v1/models/absent-{i}")
        client.get(f"/nowhere/{i}")
        client.post(GENERATE, json={"model": f"absent-{i}"})
    values = scraped(client)
    assert values["fewstep_requests_total", GENERATE, "plain", "200"] == 3
    assert values["fewstep_requests_total", TRANSLATE, "sar", "200"] == 1
    assert values["fewstep_requests_total", GENERATE, "", "400"] == 1
    assert values["fewstep_requests_total", GENERATE, "", "404"] == 50
    assert values["fewstep_requests_total", "/v1/models/{name}", "", "404"] == 50
    assert values["fewstep_requests_total", "none", "", "404"] == 50
    assert not [key for key in values if "absent" in str(key) or "nowhere" in str(key)]  # no series by callers
    assert values["fewstep_request_duration_seconds_count", GENERATE, "plain"] == 3
    assert 0 < values["fewstep_request_duration_seconds_sum", GENERATE, "plain"] < 30


def test_buckets_begin_at_a_tenth_of_a_millisecond_and_names_keep_the_conventions(client: TestClient) -> None:
    client.post(GENERATE, json=DRAW)
    text = client.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    bounds = [
        float(sample.labels["le"])
        for family in families
        if family.name == "fewstep_request_duration_seconds"
        for sample in family.samples
        if sample.name.endswith("_bucket") and sample.labels["model"] == "plain"
    ]
    assert bounds == [*SECONDS, float("inf")] and bounds[0] == 1e-4
    ours = [family for family in families if family.name.startswith("fewstep_")]
    assert len(ours) >= 14 and all(family.documentation for family in ours)
    for family in ours:
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb")) and "_created" not in family.name
    names = {sample.name for family in families for sample in family.samples}
    assert {"fewstep_build_info", "process_resident_memory_bytes", "fewstep_device_memory_bytes"} - names <= {
        "fewstep_device_memory_bytes"  # only where there is such a device
    }


def test_the_gauges_tell_what_waits_while_it_waits_and_nothing_afterwards(client: TestClient) -> None:
    with ThreadPoolExecutor(2) as pool, engine_held(client):
        asked = [pool.submit(client.post, GENERATE, json=DRAW | {"n": n}) for n in (3, 4)]
        wait_until_waiting(client, 7)
        busy = scraped(client)
        refused = client.post(GENERATE, json=DRAW | {"n": 15})
        assert refused.status_code == 503
    assert [answer.result().status_code for answer in asked] == [200, 200]
    assert busy["fewstep_queue_images", "plain"] == 7
    assert busy["fewstep_queue_cost_seconds",] > 0
    assert busy["fewstep_inflight_requests",] == 2 and busy["fewstep_inflight_images",] >= 7
    idle = scraped(client)
    assert sum(value for key, value in idle.items() if key[0] == "fewstep_queue_images") == 0
    assert idle["fewstep_queue_cost_seconds",] == idle["fewstep_inflight_requests",] == 0
    assert idle["fewstep_inflight_images",] == 0
    assert idle["fewstep_rejected_total", "server_overloaded"] == 1


def test_the_engine_counts_images_batches_stages_and_models(client: TestClient) -> None:
    with ThreadPoolExecutor(2) as pool, engine_held(client):
        asked = [pool.submit(client.post, GENERATE, json=DRAW | {"n": n}) for n in (3, 4)]
        wait_until_waiting(client, 7)
    assert [answer.result().status_code for answer in asked] == [200, 200]
    client.post(TRANSLATE, files={"image": file_of(grey(16, 16))})
    counted = ("fewstep_images_total", "sar"), ("fewstep_stage_duration_seconds_count", "queue")
    until(lambda: [scraped(client).get(key) for key in counted] == [1, 8])  # after the pictures were handed over
    values = scraped(client)
    assert values["fewstep_images_total", "plain"] == 7
    assert values["fewstep_batch_size_sum", "plain"] == 7 and values["fewstep_batch_size_count", "plain"] <= 7
    assert values["fewstep_stage_duration_seconds_count", "encode"] >= 3
    assert values["fewstep_stage_duration_seconds_count", "forward"] >= 2
    assert values["fewstep_stage_duration_seconds_count", "decode"] == 1
    loaded = {key[1] for key, value in values.items() if key[0] == "fewstep_model_loaded" and value == 1}
    assert loaded == {"plain", "sar"} == set(engine_of(client).models)


def test_who_leaves_is_499_and_the_images_of_a_queue_cost_nothing(weights: Path) -> None:
    import asyncio

    app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0))
    body = json.dumps(DRAW | {"n": 5}).encode()

    async def leave_while_waiting() -> None:
        left, messages = asyncio.Event(), iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": GENERATE,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        asking = asyncio.ensure_future(app(scope, receive, send))
        while engine_of(client).inflight < 5:
            await asyncio.sleep(0.01)
        left.set()
        await asking

    with TestClient(app) as client:
        until_ready(lambda: client.get("/readyz"))
        assert client.portal is not None
        with engine_held(client):
            client.portal.call(leave_while_waiting)
        values = scraped(client)
    assert values["fewstep_requests_total", GENERATE, "", "499"] == 1
    assert values["fewstep_cancelled_total", "queue"] == 5 and values["fewstep_cancelled_total", "forward"] == 0
    assert ("fewstep_images_total", "plain") not in values or values["fewstep_images_total", "plain"] == 0


def test_two_applications_of_a_process_count_apart(weights: Path) -> None:
    with (
        TestClient(create_app(Settings(weights=weights, tune_seconds=0))) as one,
        TestClient(create_app(Settings(weights=weights, tune_seconds=0))) as two,
    ):
        one.get("/v1/models")
        key = ("fewstep_requests_total", "/v1/models", "", "200")
        assert scraped(one)[key] == 1 and key not in scraped(two)


def test_counting_a_request_and_its_batch_takes_microseconds() -> None:
    metrics = Metrics()

    def once() -> float:
        started = time.process_time()
        for _ in range(1000):
            metrics.answered(GENERATE, "plain", 200, 0.002)
            metrics.batch("plain", 1, 1, [0.0001], 0.002)
            metrics.stage("encode", 0.0003)
        return (time.process_time() - started) / 1000

    assert min(once() for _ in range(20)) < 1e-4  # 20 microseconds of a quiet processor


def test_counts_of_many_threads_add_up() -> None:
    metrics = Metrics()

    def count(_: int) -> None:
        for _ in range(2000):
            metrics.answered(GENERATE, "plain", 200, 0.002)
            metrics.batch("plain", 3, 4, [0.0001] * 3, 0.002)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    value = metrics.registry.get_sample_value
    assert value("fewstep_requests_total", {"route": GENERATE, "model": "plain", "code": "200"}) == 8000
    assert value("fewstep_images_total", {"model": "plain"}) == 24_000
    assert value("fewstep_padding_images_total", {"model": "plain"}) == 8000


# --- OpenTelemetry


def test_a_request_becomes_a_span_with_its_stages(weights: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from app.telemetry.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracing, "from_environment", classmethod(lambda cls: cls(provider)))
        app = create_app(Settings(weights=weights, device="cpu", tune_seconds=0))
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with TestClient(app) as client:
        until_ready(lambda: client.get("/readyz"))
        exporter.clear()
        answer = client.post(GENERATE, json=DRAW, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
        client.get("/livez")
    assert answer.status_code == 200
    spans = {span.name: span for span in exporter.get_finished_spans()}
    stages = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert set(spans) == {f"POST {GENERATE}", *stages} and {"queue", "forward", "encode"} <= set(stages)
    whole = spans[f"POST {GENERATE}"]
    assert whole.attributes is not None and whole.context is not None and whole.end_time is not None
    assert whole.attributes["http.response.status_code"] == 200 and whole.attributes["gen_ai.request.model"] == "plain"
    assert whole.attributes["fewstep.request_id"] == answer.headers["x-request-id"]
    assert f"{whole.context.trace_id:032x}" == trace and whole.parent is not None
    for stage in stages:
        span = spans[stage]
        assert span.parent is not None and span.parent.span_id == whole.context.span_id
        assert span.start_time is not None and span.end_time is not None and whole.start_time is not None
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    assert spans["queue"].end_time <= spans["forward"].end_time <= spans["encode"].end_time  # type: ignore[operator]


WITHOUT = """
import sys
from pathlib import Path
from app.main import create_app
from app.settings import Settings
create_app(Settings(weights=Path(".")))
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""


@pytest.mark.process
def test_without_an_endpoint_nothing_of_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
