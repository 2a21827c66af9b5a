"""OpenTelemetry, for who has it: a span per request, and below it the stages that the answer's Server-Timing tells.

On only with the extra `otel` and OTEL_EXPORTER_OTLP_ENDPOINT in the environment. Spans are written when all is over, so
that a request carries nothing on its way; where the caller sent a `traceparent`, they belong to its trace.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("fewstep.tracing")
STAGE = re.compile(r"(\w+);dur=([\d.]+)")


class Tracing:
    """Writes what has happened into a provider's exporters."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self._tracer = provider, provider.get_tracer("fewstep")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls) -> "Tracing | None":
        """As OTEL_* variables say; None where they say nothing or the extra is not installed."""
        if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            log.warning("no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, but fewstep[otel] is not installed")
            return None
        name = os.environ.get("OTEL_SERVICE_NAME", "fewstep")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def record(
        self,
        facts: Mapping[str, Any],
        asked: Iterable[tuple[bytes, bytes]],
        answered: Mapping[bytes, bytes],
        seconds: float,
    ) -> None:
        """A request that has just ended.

        Args:
            facts: of `Visit.facts`.
            asked: the request's headers.
            answered: the answer's headers.
            seconds: that it took.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in asked}
        attributes = {
            "http.request.method": facts["method"],
            "http.route": facts["route"],
            "http.response.status_code": facts["status"],
            "http.response.body.size": facts["bytes"],
            "fewstep.request_id": facts["id"],
        }
        if facts["model"]:
            attributes["gen_ai.request.model"] = facts["model"]
        span = self._tracer.start_span(
            f"{facts['method']} {facts['route']}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            attributes,
            start_time=end - int(1e9 * seconds),
        )
        if facts["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
        inside, stage_end = set_span_in_context(span), end
        for stage, ms in reversed(STAGE.findall(answered.get(b"server-timing", b"").decode("latin-1"))):
            start = stage_end - int(1e6 * float(ms))  # the last stage ends with the request, each other before the next
            self._tracer.start_span(stage, inside, start_time=start).end(stage_end)
            stage_end = start
        span.end(end)

    def close(self) -> None:
        """Sends what was not sent yet."""
        self.provider.shutdown()
