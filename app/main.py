"""The service: `uvicorn --factory app.main:create_app`. Nothing happens at import, and torch is not imported by it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from app import errors
from app.engine.engine import Engine
from app.engine.jobs import Jobs
from app.engine.scenes import Scenes
from app.middleware.access import Access, Keys
from app.middleware.drain import Drain
from app.middleware.limits import BodyLimit
from app.middleware.request_log import Visits
from app.requests.fast_path import FastPath
from app.routes import benchmarks, demonstration, edits, health, images, jobs, metrics, models, realtime, translations
from app.settings import Settings
from app.telemetry import logs
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing
from distillers.errors import BadInput
from distillers.runtime import prepare_process

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = "default-src 'self'; img-src 'self' blob: data:"
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; settings come from FEWSTEP_* variables unless given.

    Raises:
        BadInput: without a weights folder, or for a file of keys that cannot be used.
    """
    prepare_process()  # before the engine's thread imports torch
    settings = settings or Settings()
    if not settings.weights.is_dir():
        raise BadInput("weights", str(settings.weights), "an existing folder (FEWSTEP_WEIGHTS)")
    logs.configure(settings.log_level, settings.log_format)
    keys = Keys(settings.keys) if settings.keys else None
    told, drain, tracing = Metrics(), Drain(settings.drain_seconds), Tracing.from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = Engine(settings, told)
        with (
            drain.on_signals(),
            Scenes(engine, settings) as app.state.scenes,
            Jobs(app.state.scenes, settings) as app.state.jobs,
        ):
            app.state.engine = engine
            app.state.benchmarking = asyncio.Lock()
            app.state.realtime = set()  # open connections
            told.watch(engine, drain)
            engine.start()
            yield
            app.state.jobs.cancel_all()
            engine.stop()
            if tracing is not None:
                tracing.close()

    app = FastAPI(
        title="Fewstep",
        summary="One-step and few-step image generators, and their teachers.",
        description="Every error is OpenAI's error object. The same seed gives the same picture, whatever the load.",
        lifespan=lifespan,
        docs_url=None,  # the stock page loads its scripts from elsewhere; ours is in static/
        redoc_url=None,
    )
    app.state.metrics, app.state.drain = told, drain
    rooms = (images, edits, translations, realtime, jobs, demonstration, models, benchmarks, health, metrics)
    app.add_middleware(FastPath, [route for room in rooms for route in room.router.routes])
    others = {jobs.PATH: settings.max_scene_bytes}
    app.add_middleware(BodyLimit, settings.max_body_bytes, settings.body_seconds, told, others)
    app.add_middleware(Access, keys, told)
    app.add_middleware(Visits, told, drain, tracing)  # the last one added is the first one entered
    errors.install(app)
    for room in rooms:
        app.include_router(room.router)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers=PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
