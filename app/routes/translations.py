"""POST /v1/images/translations translates SAR to optical, from a form with a file or from a file's raw bytes.

A plain picture is drawn in a batch, as all pictures are. A scene, a raster with a georeference or physical units, comes
back as a GeoTIFF on its own grid.
"""

import base64
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from app.engine.engine import engine_of, in_time
from app.engine.scenes import Scenes
from app.media.geotiff import BIG, CLASSIC, is_scene
from app.media.image_files import KINDS as PICTURES
from app.requests.answers import (
    CONTENT_TYPES,
    RAW,
    SCENE_ERRORS,
    accepted_format,
    cancel_on_disconnect,
    choice_of,
    describe_answer,
    headers_of,
    respond,
)
from app.requests.bodies import BINARY, FORM, check_kind, describe_upload, read_form
from app.requests.fast_path import FastRoute
from app.requests.orders import Plan, check_task, from_sar, make_plan, scene_options
from app.schemas import (
    Chosen,
    ImageData,
    ImagesAnswer,
    SceneData,
    SceneFields,
    SceneFormat,
    Timings,
    TranslationRequest,
)
from distillers.errors import BadInput

if TYPE_CHECKING:
    from distillers.sar.options import SceneFacts, SceneOptions

router = APIRouter(tags=["images"], route_class=FastRoute)
PIXELS = "application/octet-stream"
RAW_KINDS = ("image/png", "image/tiff", PIXELS)
RAW_ANSWERS: dict[str, SceneFormat] = {**RAW, "image/tiff": "geotiff"}


@router.post(
    "/v1/images/translations",
    responses={
        **describe_answer("image/tiff", BINARY, "Of a scene also Accept: image/tiff: the GeoTIFF's bytes."),
        **SCENE_ERRORS,
    },
    response_class=Response,
    openapi_extra=describe_upload(TranslationRequest, RAW_KINDS),
    summary="Translate SAR to optical",
)
async def translate(request: Request) -> Response:
    """Translate a plain picture, or a GeoTIFF scene of backscatter up to a pixel limit; for larger ones see the jobs.

    A plain picture is a PNG, or a TIFF without georeference: one band of 8 or 16 bit or float32 in 0..1, at the model's
    own stretch (sar in /v1/models/{id}); or, with their width, the bytes 0..255 themselves, the fastest way. Its
    polarisation, VV or VH, is that of `bands`, else of the file's name (in a form, or in Content-Disposition), else the
    model's if it has one band; a model of several bands refuses a picture without. Every other TIFF is a scene (BigTIFF
    always), and so is one that comes with units, bands, nodata, samples or output_format=geotiff. A scene keeps its
    CRS, transform and holes; the answer's `scene` says how its numbers were read. Colours are inferred, not measured.
    """
    engine, kind = engine_of(request), check_kind(request, RAW_KINDS)
    data, name, parameters = await _read_body(request, kind)
    body = TranslationRequest.model_validate(parameters)
    raw = accepted_format(request, RAW_ANSWERS)
    plan = await make_plan(engine, body, fits=lambda model: model.translates, n=body.n, raw=raw)
    check_task(plan.model, translates=True)
    given_fields = [field for field in SceneFields.model_fields if getattr(body, field) is not None]
    given_fields += ["output_format"] if plan.output_format == "geotiff" else []
    if (kind == PIXELS) != (body.width is not None):
        raise BadInput("width", body.width, f"pixels in a line with Content-Type: {PIXELS}, else nothing")
    if kind != PIXELS and data[:4] in CLASSIC + BIG:
        if given_fields or is_scene(data):
            return await _translate_scene(request, plan, data, name, scene_options(body, plan.steps, plan.seed))
    elif own := [field for field in given_fields if field != "bands"]:
        given = getattr(body, own[0]) if own[0] != "output_format" else "geotiff"
        raise BadInput(own[0], given, "nothing with this file: it is for GeoTIFF scenes, and this is no TIFF")
    work = await in_time(from_sar(engine, plan, data, body.bands, name, body.width), plan.deadline)
    return await respond(request, engine, work)


async def _translate_scene(request: Request, plan: Plan, data: bytes, name: str, options: "SceneOptions") -> Response:
    if plan.n > 1:
        raise BadInput("n", plan.n, "1 for a scene; samples=N gives statistics over N seeds")
    started = time.perf_counter()
    scenes: Scenes = request.app.state.scenes
    work = scenes.at_once(data, name, plan.model, options, plan.output_format, plan.quality)
    done = await in_time(cancel_on_disconnect(request, work), plan.deadline)
    facts, forward_ms = done.facts, 1e3 * done.forward_s
    timings = Timings(
        queue_ms=0,
        forward_ms=round(forward_ms, 3),
        encode_ms=round(1e3 * (time.perf_counter() - started) - forward_ms, 3),
        batch=1,
        bucket=0,
    )
    headers = {
        **{name.decode(): value.decode() for name, value in headers_of(plan)},
        "server-timing": f"forward;dur={timings.forward_ms}, encode;dur={timings.encode_ms}",
        **_headers(facts),
    }
    if plan.raw:
        kind = "image/tiff" if plan.output_format == "geotiff" else CONTENT_TYPES[plan.output_format].decode()
        return Response(done.optical, media_type=kind, headers=headers)

    def text(file: bytes) -> str:
        return base64.b64encode(file).decode()

    content = ImagesAnswer(
        created=int(time.time()),
        data=[ImageData(b64_json=text(done.optical), seed=plan.seed, label=None)],
        model=plan.model.name,
        steps=plan.steps,
        nfe=plan.model.nfe(plan.steps),
        seed=plan.seed,
        output_format=plan.output_format,
        size=f"{facts.width}x{facts.height}",
        timings=timings,
        chosen=Chosen(**choice) if (choice := choice_of(plan)) else None,
        scene=SceneData(
            facts=facts,
            sar_png=text(done.sar_png),
            optical_png=text(done.optical_png),
            uncertainty_geotiff=text(done.uncertainty) if done.uncertainty else None,
        ),
        unread=None,
    )
    return JSONResponse(content.model_dump(), headers=headers)


def _headers(facts: "SceneFacts") -> dict[str, str]:
    """Return the facts of a scene as headers, percent-encoded where a header must be."""
    values = {
        "Model": facts.model,
        "Model-Sha256": facts.model_sha256,
        "Steps": facts.steps,
        "Seed": facts.seed,
        "Samples": facts.samples,
        "Units": facts.units,
        "Units-Why": facts.units_why,
        "Bands": ",".join(f"{band}={index}" for band, index in facts.bands.items()),
        "Bands-How": facts.bands_how,
        "Tiles": facts.tiles,
        "Tiles-Skipped": facts.skipped,
        "Megapixels-Per-Second": f"{facts.megapixels_per_second:.4g}",
        "Warnings": " | ".join(facts.warnings),
        "Width": facts.width,
        "Height": facts.height,
    }
    return {f"x-fewstep-{name.lower()}": quote(str(value), safe=" ,;:=()/|") for name, value in values.items()}


async def _read_body(request: Request, kind: str) -> tuple[bytes, str, dict[str, Any]]:
    """Return the picture's bytes, its file's name, and the parameters: the form's other fields, or the query."""
    if kind != FORM:
        name = request.headers.get("content-disposition", "")
        return await request.body(), name, dict(request.query_params)
    async with read_form(request, max_files=1, max_fields=20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise BadInput("image", image, f"a file: {PICTURES}")
        fields = {name: value for name, value in form.multi_items() if name != "image"}
        return await image.read(), image.filename or "", fields
