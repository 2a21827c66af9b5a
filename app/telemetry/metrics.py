"""Collect metrics for Prometheus. Every application has its own registry, so that several may live in one process.

Counters and histograms are updated while the work is done; gauges are read from the engine when they are scraped, so
they are never out of date. Label values come from the server alone: routes as templates, models that are served,
reasons from the code. Time is in seconds; buckets begin at 0.1 ms, which is enough for the fastest answers.
"""

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
STAGES = ("decode", "queue", "forward", "encode")


class EngineState(Protocol):
    """Gives the state of the engine that gauges read."""

    @property
    def inflight(self) -> int:
        """Count images accepted and not answered yet."""

    def waiting(self) -> dict[str, int]:
        """Count the queued images by model."""

    def backlog_s(self) -> float:
        """Predict the seconds of the queued work."""


class RequestCount(Protocol):
    """Gives the state of the server's requests that gauges read."""

    @property
    def inflight(self) -> int:
        """Count requests accepted and not answered yet."""


class Registry(CollectorRegistry):
    """Omits the series `_created` that prometheus_client adds to every counter."""

    def collect(self) -> Iterator[Metric]:
        """Yield every metric at its present value."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """Updates the application's metrics, from any thread. No method waits longer than for an increment."""

    def __init__(self) -> None:
        self.registry = registry = Registry()
        ProcessCollector(registry=registry)
        build = Gauge("fewstep_build_info", "Always 1.", ["version", "python"], registry=registry)
        build.labels(version("fewstep"), platform.python_version()).set(1)
        self._requests = Counter(
            "fewstep_requests_total",
            "Requests answered; 499: the caller left before.",
            ["route", "model", "code"],
            registry=registry,
        )
        self._durations = Histogram(
            "fewstep_request_duration_seconds",
            "From a request's first byte to the last of its answer.",
            ["route", "model"],
            buckets=SECONDS,
            registry=registry,
        )
        stages = Histogram(
            "fewstep_stage_duration_seconds",
            "Stages of a request: queue of every image, forward of every batch.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._images = Counter("fewstep_images_total", "Images drawn.", ["model"], registry=registry)
        self._padding = Counter(
            "fewstep_padding_images_total",
            "Images computed only to fill a batch up to a size that was prepared.",
            ["model"],
            registry=registry,
        )
        self._batches = Histogram(
            "fewstep_batch_size", "Images of one forward pass.", ["model"], buckets=IMAGES, registry=registry
        )
        self._cancelled = Counter(
            "fewstep_cancelled_total",
            "Images nobody waited for any more; those of stage queue cost nothing.",
            ["stage"],
            registry=registry,
        )
        self._rejected = Counter("fewstep_rejected_total", "Requests turned away.", ["reason"], registry=registry)
        self._out_of_memory = Counter(
            "fewstep_oom_total", "Forward passes that ran out of memory.", ["model"], registry=registry
        )
        self._loaded: Mapping[str, str] = {}
        self._gauges = _Gauges(self)
        registry.register(self._gauges)
        self._stages = {name: stages.labels(name) for name in STAGES}
        for name in ("queue", "forward"):
            self._cancelled.labels(name)  # alarms need a series that exists from the start
        self._answers: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._turns: dict[str, tuple[Counter, Counter, Histogram]] = {}

    def watch(self, engine: EngineState, requests: RequestCount) -> None:
        """Read the gauges from these two from now on."""
        self._gauges.watched = engine, requests

    def answered(self, route: str, model: str, code: int, seconds: float | None) -> None:
        """Count a request that has ended; seconds are None for a WebSocket, which lasts as long as its caller likes."""
        key = (route, model, code)
        if (bound := self._answers.get(key)) is None:
            bound = self._answers[key] = (self._requests.labels(*key), self._durations.labels(route, model))
        bound[0].inc()
        if seconds is not None:
            bound[1].observe(seconds)

    def batch(self, model: str, images: int, bucket: int, waits_s: Sequence[float], forward_s: float) -> None:
        """Count a forward pass of `images` padded to `bucket` >= images, and the seconds that each had waited."""
        if (bound := self._turns.get(model)) is None:
            bound = self._turns[model] = (
                self._images.labels(model),
                self._padding.labels(model),
                self._batches.labels(model),
            )
        bound[0].inc(images)
        bound[1].inc(bucket - images)
        bound[2].observe(images)
        self._stages["forward"].observe(forward_s)
        queue = self._stages["queue"]
        for seconds in waits_s:
            queue.observe(seconds)

    def stage(self, name: Literal["decode", "encode"], seconds: float) -> None:
        """Observe the seconds of an image's decoding or encoding."""
        self._stages[name].observe(seconds)

    def cancelled(self, stage: Literal["queue", "forward"], images: int) -> None:
        """Count images whose caller left while they waited, or while they were drawn, which is wasted work."""
        self._cancelled.labels(stage).inc(images)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused; the reason is the error's code."""
        self._rejected.labels(reason).inc()

    def out_of_memory(self, model: str) -> None:
        """Count a forward pass that did not fit into the device's memory."""
        self._out_of_memory.labels(model).inc()

    def loaded(self, model: str, revision: str, yes: bool) -> None:
        """Note that a model is served from now on, or no longer."""
        others = {name: other for name, other in self._loaded.items() if name != model}
        self._loaded = others | {model: revision} if yes else others

    @property
    def models(self) -> Mapping[str, str]:
        """Return the revisions of the served models by name."""
        return self._loaded


class _Gauges:
    """Reads the gauges when they are scraped."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.watched: tuple[EngineState, RequestCount] | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; the registry calls it in the thread that scrapes."""
        if self.watched is None:
            return
        engine, requests = self.watched
        queued = GaugeMetricFamily("fewstep_queue_images", "Images waiting.", labels=["model"])
        for model, images in engine.waiting().items():
            queued.add_metric([model], images)
        yield queued
        for name, meaning, value in (
            ("queue_cost_seconds", "Predicted time until what comes now begins.", engine.backlog_s()),
            ("inflight_images", "Images waiting or being drawn.", engine.inflight),
            ("inflight_requests", "Requests not answered yet.", requests.inflight),
        ):
            yield GaugeMetricFamily(f"fewstep_{name}", meaning, value=value)
        loaded = GaugeMetricFamily("fewstep_model_loaded", "1 for what is served.", labels=["model", "revision"])
        for model, revision in self.metrics.models.items():
            loaded.add_metric([model, revision], 1)
        yield loaded
        memory = GaugeMetricFamily("fewstep_device_memory_bytes", "Held by this process.", labels=["device"])
        for device, held in _device_memory():
            memory.add_metric([device], held)
        yield memory


def _device_memory() -> Iterator[tuple[str, int]]:
    """Yield the memory reserved on each CUDA device in use, in bytes, without importing torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            yield f"cuda:{index}", torch.cuda.memory_reserved(index)
