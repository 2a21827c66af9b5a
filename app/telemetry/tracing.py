"""Write OpenTelemetry traces: a span for each request, and below it the stages of its Server-Timing header.

They need the extra `otel` and OTEL_EXPORTER_OTLP_ENDPOINT in the environment. Spans are written after the answer, so
that they do not delay it; where the caller sent a `traceparent`, they belong to its trace.
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
    """Writes finished requests as spans to a provider's exporters."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self._tracer = provider, provider.get_tracer("fewstep")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls) -> "Tracing | None":
        """Set up tracing by the OTEL_* variables; None without an endpoint or without the extra."""
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
        request_headers: Iterable[tuple[bytes, bytes]],
        answer_headers: Mapping[bytes, bytes],
        seconds: float,
    ) -> None:
        """Write the span of a request that has just ended, and those of its stages.

        Args:
            facts: what `RequestRecord.facts` returns.
            seconds: from the request's first byte to the last of its answer.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in request_headers}
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
        for stage, ms in reversed(STAGE.findall(answer_headers.get(b"server-timing", b"").decode("latin-1"))):
            start = stage_end - int(1e6 * float(ms))  # the last stage ends with the request, each other before the next
            self._tracer.start_span(stage, inside, start_time=start).end(stage_end)
            stage_end = start
        span.end(end)

    def close(self) -> None:
        """Send the spans that were not sent yet."""
        self.provider.shutdown()
