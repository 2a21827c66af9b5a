"""Build the application, for `uvicorn --factory app.main:create_app`. Importing this module imports no torch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from app import errors
from app.engine.engine import Engine
from app.engine.scene_jobs import SceneJobs
from app.engine.scenes import Scenes
from app.middleware.access import Access, Keys
from app.middleware.connections import SECONDS
from app.middleware.drain import Drain
from app.middleware.limits import BodyLimit
from app.middleware.request_log import RequestLog
from app.requests.description import complete_description
from app.requests.fast_path import FastPath
from app.routes import benchmarks, edits, example_scene, health, images, jobs, models, realtime, translations
from app.routes import metrics as metrics_route
from app.settings import Settings, read_settings
from app.telemetry import logs
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing
from distillers.errors import BadInput
from distillers.runtime import prepare_process

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = "default-src 'self'; img-src 'self' blob: data:"
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Settings come from FEWSTEP_* variables unless given.

    Raises:
        BadInput: a setting out of its range, no weights folder, or a file of keys that cannot be used.
    """
    prepare_process()  # before the engine's thread imports torch
    settings = settings or read_settings()
    if not settings.weights.is_dir():
        raise BadInput("weights", str(settings.weights), "an existing folder (FEWSTEP_WEIGHTS)")
    logs.configure(settings.log_level, settings.log_format)
    keys = Keys(settings.keys) if settings.keys else None
    metrics, drain, tracing = Metrics(), Drain(settings.drain_seconds), Tracing.from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, float]]:
        engine = Engine(settings, metrics)
        with (
            drain.on_signals(engine.close),
            Scenes(engine, settings) as app.state.scenes,
            SceneJobs(app.state.scenes, settings) as app.state.jobs,
        ):
            app.state.engine = engine
            app.state.benchmarking = asyncio.Lock()
            app.state.realtime = set()  # open connections
            metrics.watch(engine, drain)
            engine.start()
            yield {SECONDS: settings.body_seconds}
            app.state.jobs.cancel_all()
            engine.stop()
            if tracing is not None:
                tracing.close()

    app = FastAPI(
        title="Fewstep",
        summary="One-step and few-step image generators, and their teachers.",
        description="Every error is OpenAI's error object. The same seed gives the same picture, whatever the load.",
        lifespan=lifespan,
        docs_url=None,  # the stock page loads scripts from elsewhere; ours is in static/
        redoc_url=None,
    )
    app.state.metrics, app.state.drain = metrics, drain
    modules = (images, edits, translations, realtime, jobs, example_scene, models, benchmarks, health, metrics_route)
    app.add_middleware(FastPath, [route for module in modules for route in module.router.routes])
    others = {jobs.PATH: settings.max_scene_bytes}
    app.add_middleware(BodyLimit, settings.max_body_bytes, settings.body_seconds, metrics, others)
    app.add_middleware(Access, keys, metrics, settings.origins)
    if settings.origins:  # around the check of keys, which a browser's preflight does not carry
        methods = ("GET", "HEAD", "POST", "DELETE")
        app.add_middleware(CORSMiddleware, settings.origins, methods, ("*",), expose_headers=("*",))
    app.add_middleware(RequestLog, metrics, drain, tracing)  # the last one added is the first one entered
    errors.install(app)
    complete_description(app, with_keys=keys is not None)
    for module in modules:
        app.include_router(module.router)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers=PAGE_HEADERS)

    # Starlette's own routes answer HEAD, FastAPI's do not
    for route in [*app.routes, *(route for module in modules for route in module.router.routes)]:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
