"""/v1/jobs translates whole scenes, up to gigabytes: POST the scene, GET its job until it is done, then its files."""

import asyncio
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from app.engine.engine import engine_of
from app.engine.scene_jobs import SceneJob, SceneJobs
from app.engine.scenes import SceneOrder, scene_name
from app.errors import ApiError, ErrorAnswer, caller_left
from app.media.geotiff import KINDS, check, import_rasterio
from app.requests.answers import ERRORS, SCENE_ERRORS
from app.requests.bodies import BINARY, FORM, check_kind, describe_upload, read_form
from app.requests.orders import check_task, scene_options
from app.schemas import JobAnswer, JobRequest
from distillers.errors import BadInput

PATH = "/v1/jobs/translations"
RAW_KINDS = ("image/tiff",)
ABSENT: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "No such job, or forgotten."}}
router = APIRouter(tags=["jobs"])


@router.post(
    PATH,
    status_code=202,
    response_model=JobAnswer,
    responses=ERRORS | SCENE_ERRORS,
    openapi_extra=describe_upload(JobRequest, RAW_KINDS),
    summary="Translate a whole scene",
)
async def post(request: Request) -> JSONResponse:
    """Translate a GeoTIFF of any size up to the server's limit in bytes; the answer's id says where to find the result.

    The body goes to disk as it arrives (with a raw one, Content-Disposition may give the file's name, which may say a
    lone band's polarisation). One scene is translated at a time; other requests go on meanwhile.
    """
    kind = check_kind(request, RAW_KINDS)
    import_rasterio()
    order = None if kind == FORM else await _order(request, request.query_params)
    jobs = jobs_of(request)
    job = jobs.open()
    try:
        if order is None:
            scene, order = await _receive_form(request, job.folder)
        else:
            scene = job.folder / scene_name(request.headers.get("content-disposition", ""))
            await _receive(request, scene)
        await asyncio.to_thread(check, scene)
        jobs.submit(job, SceneOrder(*order, scene, job.cancelled))
    except BaseException as error:
        jobs.forget(job)
        if isinstance(error, ClientDisconnect):
            raise caller_left() from None
        raise
    return JSONResponse(_answer(job, request).model_dump(), 202, {"Location": _path_of(job, request)})


@router.get("/v1/jobs/{id}", responses=ABSENT, summary="How far a job is")
async def get(id: str, request: Request) -> JobAnswer:
    """Return status, progress and speed; facts and files when it is done, the error object when it failed."""
    return _answer(jobs_of(request).find(id), request)


@router.delete("/v1/jobs/{id}", responses=ABSENT, summary="Cancel or forget a job")
async def delete(id: str, request: Request) -> JobAnswer:
    """Cancel a running job at its next tile and remove its files, or forget a job that has ended."""
    jobs = jobs_of(request)
    job = jobs.find(id)
    jobs.cancel(job)
    return _answer(job, request)


@router.get(
    "/v1/jobs/{id}/{name}",
    response_class=FileResponse,
    responses={
        200: {"content": {kind: {"schema": BINARY} for kind in ("image/tiff", "image/png")}},
        400: {"model": ErrorAnswer, "description": "No job has a file of such a name."},
        409: {"model": ErrorAnswer, "description": "Not done, or done without such a file."},
        **ABSENT,
    },
    summary="A file of a finished job",
)
async def file(
    id: str, name: Literal["optical.tif", "uncertainty.tif", "preview.png", "sar.png"], request: Request
) -> FileResponse:
    """Return the Cloud-Optimised GeoTIFF, its statistics over samples, or a small picture of it or of the SAR."""
    job = jobs_of(request).find(id)
    if name not in job.files:
        there = ", ".join(job.files) or f"none, the job is {job.status}"
        raise ApiError(409, f"name: got {name!r}; allowed: {there}", param="name", code="file_not_ready")
    return FileResponse(job.files[name], media_type=f"image/{'tiff' if name.endswith('.tif') else 'png'}")


async def _order(request: Request, parameters: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return (model, options) from a request's parameters. BadInput for wrong ones."""
    body = JobRequest.model_validate(dict(parameters))
    model = check_task(await engine_of(request).open_for(body.model, lambda model: model.translates), translates=True)
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return model, scene_options(body, model.check_steps(body.steps), seed)


async def _receive(request: Request, scene: Path) -> None:
    with scene.open("wb") as target:
        async for chunk in request.stream():
            await asyncio.to_thread(target.write, chunk)


async def _receive_form(request: Request, folder: Path) -> tuple[Path, tuple[Any, Any]]:
    """Read a form, whose file may come before its fields: the parser spools it to disk, and it is moved afterwards."""
    async with read_form(request, max_files=1, max_fields=20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise BadInput("image", image, f"a file: {KINDS}")
        order = await _order(request, {name: value for name, value in form.multi_items() if name != "image"})
        scene = folder / scene_name(image.filename or "")
        with scene.open("wb") as target:
            await asyncio.to_thread(shutil.copyfileobj, image.file, target, 1 << 20)
        return scene, order


def _path_of(job: SceneJob, request: Request) -> str:
    """Return where a job is found, below the path at which a proxy serves the application."""
    return f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"


def _answer(job: SceneJob, request: Request) -> JobAnswer:
    return JobAnswer(
        id=job.id,
        status=job.status,
        progress=round(job.progress, 4),
        megapixels_per_second=job.megapixels_per_second,
        created=int(job.created),
        expires=int(job.expires) if job.expires else None,
        facts=job.facts,
        error=job.error,
        files={name: f"{_path_of(job, request)}/{name}" for name in job.files},
    )


def jobs_of(request: Request) -> SceneJobs:
    """Return the application's jobs."""
    return cast(SceneJobs, request.app.state.jobs)
