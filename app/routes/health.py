"""Say, without a key, whether the process works at all (live) and whether it takes work now (ready)."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from app.engine.engine import Engine, engine_of

router = APIRouter(tags=["health"])
DEAD: dict[int | str, dict[str, Any]] = {503: {"description": "Start the process anew."}}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Opening, nothing to serve, hung, or closing."}}


@router.get("/livez", responses=DEAD, summary="Alive")
async def livez(request: Request) -> JSONResponse:
    """Return 503 when the engine's thread has died or the device hangs: only a new process helps."""
    status = _life(engine_of(request))
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/readyz", responses=NOT_READY, summary="Ready")
@router.get("/health", responses=NOT_READY, summary="The same as /readyz")
async def readyz(request: Request) -> JSONResponse:
    """Return 503 until every model was opened and drew its first picture, and again while the server drains.

    Folders that could not be opened are named, with the reasons; also changed ones whose last version is still served.
    """
    engine, status = engine_of(request), _readiness(request)
    content = {
        "status": status,
        "device": engine.device,
        "models": list(engine.models),
        "failed": engine.failed,
        "reasons": engine.store.reasons,
    }
    return JSONResponse(content, 200 if status == "ready" else 503, None if status == "ready" else {"Retry-After": "2"})


@router.get("/v2/health/live", responses=DEAD, summary="Alive, as KServe asks")
async def live(request: Request) -> JSONResponse:
    """Answer /livez in the words of the Open Inference Protocol."""
    alive = _life(engine_of(request)) == "ok"
    return JSONResponse({"live": alive}, 200 if alive else 503)


@router.get("/v2/health/ready", responses=NOT_READY, summary="Ready, as KServe asks")
async def ready(request: Request) -> JSONResponse:
    """Answer /readyz in the words of the Open Inference Protocol."""
    is_ready = _readiness(request) == "ready"
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


def _life(engine: Engine) -> str:
    return "stuck" if engine.stuck else "ok" if engine.alive else "dead"


def _readiness(request: Request) -> str:
    engine = engine_of(request)
    if request.app.state.drain.draining:
        return "draining"
    if (life := _life(engine)) != "ok":
        return life
    return "ready" if engine.ready else "empty" if engine.opened else "opening"
