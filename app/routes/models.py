"""GET /v1/models and /v1/models/{id}: OpenAI's list, with what a caller needs to know to ask well."""

from typing import Any

from fastapi import APIRouter, Request

from app.errors import ErrorAnswer
from app.routes.answers import engine_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the models")
async def models(request: Request) -> dict[str, Any]:
    """Task, labels, steps and size of each; those still being opened are missing until /readyz says ready."""
    return {"object": "list", "data": [model.describe() for model in engine_of(request).models.values()]}


@router.get("/v1/models/{name}", responses={404: {"model": ErrorAnswer}}, summary="One model")
def model(name: str, request: Request) -> dict[str, Any]:
    """The same for one model, with the report that was published with it: quality and latency as they were measured."""
    found = engine_of(request).named(name)
    return {**found.describe(), "report": found.report()}
