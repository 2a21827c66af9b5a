"""/v1/models: OpenAI's list, with what a caller needs to know to ask well; and what is loaded, for who may say so."""

from typing import Any

from fastapi import APIRouter, Request

from app.engine.engine import engine_of
from app.errors import ErrorAnswer

router = APIRouter(tags=["models"])
ADMIN: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The folder cannot be opened; what was served before still is."},
    403: {"model": ErrorAnswer, "description": "Needs a key with the scope admin."},
    404: {"model": ErrorAnswer, "description": "No such folder."},
    503: {"model": ErrorAnswer, "description": "Still opening; see Retry-After."},
}


@router.get("/v1/models", summary="List the models")
async def models(request: Request) -> dict[str, Any]:
    """Task, labels, steps and size of each; those still being opened are missing until /readyz says ready."""
    return {"object": "list", "data": [model.describe() for model in engine_of(request).models.values()]}


@router.get("/v1/models/{name}", responses={404: {"model": ErrorAnswer}}, summary="One model")
def model(name: str, request: Request) -> dict[str, Any]:
    """The same for one model; how it is run here and what was measured (`backend`); and the report that was published
    with it: quality and latency as they were measured."""
    found = engine_of(request).named(name)
    return {**found.describe(), "backend": found.how(), "report": found.report()}


@router.post("/v1/models/{name}/load", responses=ADMIN, summary="Load, or read again")
async def load(name: str, request: Request) -> dict[str, Any]:
    """Opens a folder beside what is served under its name, looks at what it draws, and only then exchanges the two."""
    return (await engine_of(request).load(name)).describe()


@router.post("/v1/models/{name}/unload", responses=ADMIN, summary="Unload")
async def unload(name: str, request: Request) -> dict[str, Any]:
    """Frees its memory, until it is loaded again. Who waits for a picture of it still gets it."""
    await engine_of(request).unload(name)
    return {"id": name, "object": "model", "loaded": False}
