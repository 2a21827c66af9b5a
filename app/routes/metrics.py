"""GET /metrics returns the metrics for Prometheus."""

from typing import cast

from fastapi import APIRouter, Request, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from app.telemetry.metrics import Metrics

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics",
)
def metrics(request: Request) -> Response:
    """Return counters, histograms and gauges in Prometheus' text format. With keys it needs the scope metrics."""
    own = cast(Metrics, request.app.state.metrics)
    return Response(generate_latest(own.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
