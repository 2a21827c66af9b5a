"""POST /v1/images/translations: SAR to optical, from a form with a file or from the raw bytes of a PNG or TIFF.

A plain picture goes the way of all pictures, in a batch. A scene, which is a raster with a place and numbers that mean
something, comes back as a GeoTIFF on its own grid.
"""

import asyncio
import base64
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from app.engine.engine import Engine, Order, late
from app.engine.scenes import Scenes
from app.errors import ApiError, ErrorAnswer
from app.media.images import KINDS as PICTURES
from app.media.images import MIN_SIDE, decode_sar, pad, too_many_pixels
from app.media.rasters import BIG, CLASSIC, is_scene
from app.requests.answers import (
    BINARY,
    KINDS,
    RAW,
    RESPONSES,
    Direct,
    Reading,
    Work,
    accepted,
    chosen,
    engine_of,
    headers_of,
    of_task,
    read,
    respond,
    unless_gone,
)
from app.schemas import (
    Chosen,
    ImageData,
    ImagesAnswer,
    SceneData,
    SceneFacts,
    SceneFields,
    SceneFormat,
    Timings,
    TranslationRequest,
)
from distillers.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distillers.sar.tiles import Options
    from distillers.sar.translate import Facts

router = APIRouter(tags=["images"], route_class=Direct)
PIXELS = "application/octet-stream"
RAW_KINDS = ("image/png", "image/tiff", PIXELS)
RAW_ANSWERS: dict[str, SceneFormat] = {**RAW, "image/tiff": "geotiff"}
SCENE_ERRORS: dict[int | str, dict[str, Any]] = {
    415: {"model": ErrorAnswer, "description": "Neither a form nor such a body."},
    501: {"model": ErrorAnswer, "description": "A GeoTIFF, and rasterio is not installed here."},
    507: {"model": ErrorAnswer, "description": "No room on the server's disk."},
}


def body_of(fields: type[SceneFields], kinds: tuple[str, ...]) -> dict[str, Any]:
    """What OpenAPI is told of a body that is a form with a file, or the file's raw bytes."""
    properties = fields.model_json_schema()["properties"]
    form = {"type": "object", "properties": {"image": BINARY, **properties}, "required": ["image"]}
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": "With a raw body; in a form, a field."}
            for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, **{kind: {"schema": BINARY} for kind in kinds}},
        },
    }


def _responses() -> dict[int | str, dict[str, Any]]:
    both: dict[str, Any] = dict(RESPONSES[200])
    both["content"] = {**both["content"], "image/tiff": {"schema": BINARY}}
    both["description"] += " Of a scene also Accept: image/tiff: the GeoTIFF's bytes."
    return {**RESPONSES, 200: both, **SCENE_ERRORS}


@router.post(
    "/v1/images/translations",
    responses=_responses(),
    response_class=Response,
    openapi_extra=body_of(TranslationRequest, RAW_KINDS),
    summary="Translate SAR to optical",
)
async def translate(request: Request) -> Response:
    """A plain picture, or a GeoTIFF scene of backscatter in any units up to a pixel limit; beyond it, see the jobs.

    A plain picture is a PNG, or a TIFF without georeference: one band of 8 or 16 bit or float32 in 0..1, at the model's
    own stretch (sar in /v1/models/{id}); or, with their width, the bytes 0..255 themselves, the fastest way. Every
    other TIFF is a scene (BigTIFF always), and so is one that comes with units, bands, nodata, samples or
    output_format=geotiff. A scene keeps its CRS, transform and holes; the answer's `scene` says how its numbers were
    read. Colours are inferred, not measured.
    """
    engine, kind = engine_of(request), kind_of(request, RAW_KINDS)
    data, name, parameters = await _read_body(request, kind)
    body = TranslationRequest.model_validate(parameters)
    raw = accepted(request, RAW_ANSWERS)
    reading = await read(engine, body, fits=lambda model: model.translates, n=body.n, raw=raw)
    of_task(reading.model, translates=True)
    said = [field for field in SceneFields.model_fields if getattr(body, field) is not None]
    said += ["output_format"] if reading.output_format == "geotiff" else []
    if (kind == PIXELS) != (body.width is not None):
        raise BadInput("width", body.width, f"pixels in a line with Content-Type: {PIXELS}, else nothing")
    if kind != PIXELS and data[:4] in CLASSIC + BIG:
        if said or is_scene(data):
            return await _translate_scene(
                request, reading, data, name, scene_options(body, reading.steps, reading.seed)
            )
    elif said:
        given = getattr(body, said[0]) if said[0] != "output_format" else "geotiff"
        raise BadInput(said[0], given, "nothing with this file: it is for GeoTIFF scenes, and this is no TIFF")
    return await respond(request, engine, reading, await from_sar(engine, reading, data, body.width))


async def from_sar(engine: Engine, reading: Reading, data: bytes, width: int | None = None) -> Work:
    """Pictures from a plain SAR picture's bytes: a file's, or, of a width, the pixels themselves."""
    limit = engine.settings.max_pixels
    if width is None:
        sar = await engine.decode(decode_sar, data, limit)
    else:
        sar = _unpacked(data, width, limit)
    padded = reading.model.sees(pad(sar, reading.model.generator.size_multiple))
    height, width = sar.shape
    orders = [Order(seed, sar=padded) for seed in reading.seeds]
    return Work(orders, padded.shape[1], padded.shape[2], (height, width), [None for _ in orders])


def _unpacked(data: bytes, width: int, max_pixels: int) -> "NDArray[np.float32]":
    """Bytes 0..255, line by line, to (H, W) in [-1, 1]."""
    height, rest = divmod(len(data), width)
    if len(data) > max_pixels:
        raise too_many_pixels(str(len(data)), max_pixels)
    if rest or min(height, width) < MIN_SIDE:
        raise BadInput("image", f"{len(data)} bytes", f"lines of width {width} each, {MIN_SIDE} or more of both")
    return np.frombuffer(data, np.uint8).reshape(height, width).astype(np.float32) / 127.5 - 1


def scene_options(body: SceneFields, steps: int, seed: int) -> "Options":
    """The fields in the library's words. BadInput for what it refuses."""
    from distillers.sar.tiles import Options

    return Options(
        steps=steps,
        seed=seed,
        samples=body.samples or 1,
        units=body.units or "auto",
        bands=body.bands,
        nodata=body.nodata,
    )


async def _translate_scene(request: Request, reading: Reading, data: bytes, name: str, options: "Options") -> Response:
    if reading.n > 1:
        raise BadInput("n", reading.n, "1 for a scene; samples=N gives statistics over N seeds")
    started = time.perf_counter()
    scenes: Scenes = request.app.state.scenes
    work = scenes.at_once(data, name, reading.model, options, reading.output_format, reading.quality)
    try:
        async with asyncio.timeout(reading.deadline and reading.deadline - started):
            done = await unless_gone(request, work)
    except TimeoutError:
        raise late() from None
    facts, forward_ms = done.facts, 1e3 * done.forward_s
    timings = Timings(
        queue_ms=0,
        forward_ms=round(forward_ms, 3),
        encode_ms=round(1e3 * (time.perf_counter() - started) - forward_ms, 3),
        batch=1,
        bucket=0,
    )
    headers = {
        **{name.decode(): value.decode() for name, value in headers_of(reading)},
        "server-timing": f"forward;dur={timings.forward_ms}, encode;dur={timings.encode_ms}",
        **_headers(facts),
    }
    if reading.raw:
        kind = "image/tiff" if reading.output_format == "geotiff" else KINDS[reading.output_format].decode()
        return Response(done.optical, media_type=kind, headers=headers)

    def text(file: bytes) -> str:
        return base64.b64encode(file).decode()

    content = ImagesAnswer(
        created=int(time.time()),
        data=[ImageData(b64_json=text(done.optical), seed=reading.seed, label=None)],
        model=reading.model.name,
        steps=reading.steps,
        nfe=reading.model.nfe(reading.steps),
        seed=reading.seed,
        output_format=reading.output_format,
        size=f"{facts.width}x{facts.height}",
        timings=timings,
        chosen=Chosen(**choice) if (choice := chosen(reading)) else None,
        scene=SceneData(
            facts=SceneFacts.model_validate(asdict(facts)),
            sar_png=text(done.sar_png),
            optical_png=text(done.optical_png),
            uncertainty_geotiff=text(done.uncertainty) if done.uncertainty else None,
        ),
    )
    return JSONResponse(content.model_dump(), headers=headers)


def _headers(facts: "Facts") -> dict[str, str]:
    """The facts of a scene, for who takes the bytes alone; percent-encoded where a header must be."""
    told = {
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
    return {f"x-fewstep-{name.lower()}": quote(str(value), safe=" ,;:=()/|") for name, value in told.items()}


async def _read_body(request: Request, kind: str) -> tuple[bytes, str, dict[str, Any]]:
    """The picture's bytes, its file's name, and the parameters: the form's other fields, or the query."""
    if kind != "multipart/form-data":
        name = request.headers.get("content-disposition", "")
        return await request.body(), name, dict(request.query_params)
    async with request.form(max_files=1, max_fields=20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise BadInput("image", image, f"a file: {PICTURES}")
        fields = {name: value for name, value in form.multi_items() if name != "image"}
        return await image.read(), image.filename or "", fields


def kind_of(request: Request, raw: tuple[str, ...]) -> str:
    """The body's kind: a form or one of the raw ones. 415 for another, BadInput for a form with a query."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in (*raw, "multipart/form-data"):
        message = f"Content-Type: got {kind!r}; allowed: multipart/form-data, {', '.join(raw)}"
        raise ApiError(415, message, code="unsupported_media_type")
    if kind not in raw and request.query_params:
        raise BadInput(next(iter(request.query_params)), "a query parameter", "form fields, beside the file")
    return kind
