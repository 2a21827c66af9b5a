"""/v1/models lists the models as OpenAI does, with what a caller needs to use them, and loads and unloads them."""

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
    """List task, labels, steps and size of each model; those being opened are missing until /readyz says ready."""
    return {"object": "list", "data": [model.describe() for model in engine_of(request).models.values()]}


@router.get("/v1/models/{name}", responses={404: {"model": ErrorAnswer}}, summary="One model")
def model(name: str, request: Request) -> dict[str, Any]:
    """Describe one model, how it is run here (`backend`), and the quality and latency published with it (`report`)."""
    found = engine_of(request).named(name)
    return {**found.describe(), "backend": found.backend_info(), "report": found.report()}


@router.post("/v1/models/{name}/load", responses=ADMIN, summary="Load, or read again")
async def load(name: str, request: Request) -> dict[str, Any]:
    """Open a folder beside the version that is served, check what it draws, and then replace that version."""
    return (await engine_of(request).load(name)).describe()


@router.post("/v1/models/{name}/unload", responses=ADMIN, summary="Unload")
async def unload(name: str, request: Request) -> dict[str, Any]:
    """Free a model's memory until it is loaded again. Pictures that wait are still drawn."""
    await engine_of(request).unload(name)
    return {"id": name, "object": "model", "loaded": False}
