"""POST /v1/benchmarks measures a student against its teacher on the same noises, now and on the device that serves."""

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from app.engine.engine import Engine, engine_of
from app.engine.lanes import Lane, TooLong
from app.engine.model import Model
from app.engine.passes import Pass, sliced
from app.errors import ApiError, ErrorAnswer, caller_left, overloaded
from app.media.image_files import decode_sar, pad
from app.requests.answers import ERRORS, cancel_on_disconnect
from app.schemas import SEEDS, BenchmarkRequest
from distillers.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

router = APIRouter(tags=["benchmarks"])
ALL_ERRORS = ERRORS | {504: {"model": ErrorAnswer, "description": "It took longer than FEWSTEP_BENCHMARK_SECONDS."}}


@router.post("/v1/benchmarks", responses=ALL_ERRORS, summary="Measure a model now")
async def benchmark(body: BenchmarkRequest, request: Request) -> dict[str, Any]:
    """Measure latency percentiles and the distance from the teacher's pictures, on few pictures.

    Other requests go first, and the time that they take is left out. One at a time; a second one is answered with 503.
    It ends with 504 when it has had the device for FEWSTEP_BENCHMARK_SECONDS. Keys need the scope benchmark.
    """
    engine = engine_of(request)
    student = await engine.open_for(body.model, lambda model: model.info.role == "student")
    steps = student.check_steps(body.steps)
    if body.seed + body.n > SEEDS:
        raise BadInput("seed", body.seed, f"0..{SEEDS - body.n}")
    teacher = _teacher(engine, student)
    one_at_a_time = request.app.state.benchmarking
    if one_at_a_time.locked():
        raise overloaded("a benchmark is running", 10)
    left, limit_s = threading.Event(), engine.settings.benchmark_seconds

    def check() -> None:
        if left.is_set():
            raise caller_left()

    lane = engine.lane(check, limit_s)
    async with one_at_a_time:
        work = asyncio.to_thread(_measure, engine, lane, student, teacher, steps, body.n, body.seed)
        try:
            return {"object": "benchmark", **await cancel_on_disconnect(request, work)}
        except TooLong:
            message = f"{body.n} pictures take longer than the {limit_s:g} s that a benchmark may have here"
            raise ApiError(504, message, param="n", code="benchmark_too_long") from None
        finally:
            left.set()


def _teacher(engine: Engine, student: Model) -> Model:
    """Return the served model that a student names as its teacher."""
    name = student.info.teacher
    if name is None:
        raise BadInput("model", student.name, "a student whose fewstep.json names its teacher")
    if name not in engine.models:
        message = f"the teacher of {student.name}, {name}, is not served here, so there is nothing to compare with"
        raise ApiError(404, message, param="model", code="teacher_not_found")
    return engine.models[name]


def _measure(
    engine: Engine, lane: Lane, student: Model, teacher: Model, steps: int, n: int, seed: int
) -> dict[str, Any]:
    """Measure a student beside its teacher, slice by slice."""
    from distillers.evaluation.features import load_features
    from distillers.evaluation.quick_benchmark import quick_benchmark

    try:
        space = "shapes" if student.info.data == "shapes" else "eurosat-landcover"
        features = load_features(space, engine.settings.weights, engine.device)
        features.forward = sliced(features.forward)  # type: ignore[method-assign]
    except BadInput:  # not published here: pixels and latency are measured all the same
        features = None
    # On a CPU as many pictures at a time as of a scene, so that other requests wait for a short slice.
    batch = 2 if engine.device == "cpu" else min(16, engine.settings.max_batch)
    with Pass(turn=lane.turn):
        return quick_benchmark(
            student.generator,
            teacher.generator,
            steps=steps,
            n=n,
            seed=seed,
            features=features,
            teacher_steps=teacher.default_steps,
            batch=batch,
            sar=_examples(engine, student) if student.translates else None,
            clock=lane.clock,
        )


def _examples(engine: Engine, model: Model) -> "Tensor":
    """Read the SAR tiles published with a translator, (B, channels, H, W) in [-1, 1]: `examples/*.png` of one size."""
    import numpy as np
    import torch

    files = sorted((model.folder / "examples").glob("*.png"))
    generator, limit, tiles = model.generator, engine.settings.max_pixels, []
    for file in files:
        sar = pad(decode_sar(file.read_bytes(), limit), generator.size_multiple)
        tiles.append(generator.condition.of_picture((sar + 1) / 2, file=file.name))
    if len({tile.shape for tile in tiles}) != 1:
        raise BadInput("model", model.name, "a translator with SAR tiles of one size in its examples/*.png")
    return torch.from_numpy(np.stack(tiles)).to(engine.device)
