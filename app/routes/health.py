"""/livez: is the process able to work at all? /readyz: is every model open and warm?"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from app.routes.answers import engine_of

router = APIRouter(tags=["health"])


@router.get("/livez", responses={503: {"description": "The engine is dead."}}, summary="Alive")
async def livez(request: Request) -> JSONResponse:
    """503 when the engine's thread has died; a supervisor should start the process anew."""
    alive = engine_of(request).alive
    return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)


@router.get("/readyz", responses={503: {"description": "Still opening, or nothing to serve."}}, summary="Ready")
async def readyz(request: Request) -> JSONResponse:
    """503 until every model was opened and drew its first picture. Folders that could not be opened are named."""
    engine = engine_of(request)
    status = "ready" if engine.ready else "empty" if engine.opened else "opening"
    content = {"status": status, "device": engine.device, "models": list(engine.models), "failed": engine.failed}
    return JSONResponse(content, 200 if engine.ready else 503, None if engine.ready else {"Retry-After": "2"})
