"""The engine on a GPU: recorded graphs, half precision, memory that runs out. Skipped where there is none."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from service import LABELS, NETWORK, SIDE, until
from test_app_engine import levels, running

from app.engine import tuning
from app.engine.engine import Engine, Order
from app.engine.model import Model
from app.errors import ApiError
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.teacher import Teacher
from distillers.weights.manifest import Info

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
STEPS = {1: [999.0], 4: [999.0, 749.0, 499.0, 249.0]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, but of velocity: the noise that one predicts at random, over a small alpha, is rounding errors."""
    root = tmp_path_factory.mktemp("published")
    told: dict[str, Any] = {"method": "consistency", "role": "student", "sampler": "consistency", "data": "shapes"}
    one = Info(name="student", task="class-to-image", labels=LABELS, size=(SIDE, SIDE), step_times=STEPS, **told)
    sar = {"channels": 1, "range": [-1, 1]}
    other = Info(
        name="sar", task="sar-to-optical", sar=sar, size=(SIDE, SIDE), step_times={1: [999.0]}, patch=2, **told
    )
    for info in (one, other):
        torch.manual_seed(0)
        codec = PixelUnshuffle(info.patch)
        denoiser = Teacher.random(info, NETWORK, {"name": "vp"}, "v", codec).denoiser
        Generator(denoiser, codec, info).save_pretrained(root / info.name)
    return root


def draw(engine: Engine, name: str, orders: list[Order], **more: Any) -> Any:
    return asyncio.run(engine.draw(engine.named(name), more.pop("steps", 1), orders, SIDE, SIDE, **more))


def orders(count: int, first: int = 0) -> list[Order]:
    return [Order(seed, seed % len(LABELS)) for seed in range(first, first + count)]


@pytest.mark.parametrize("name", ["student", "sar"])
def test_a_recorded_backend_wins_and_draws_what_the_reference_draws(weights: Path, name: str) -> None:
    model = Model.open(name, weights / name, "cuda", 250)
    profile = tuning.tune(model, lambda work: work(), seconds=30, tolerance=2, largest=16)
    ran = {entry["backend"].partition("/")[0] for entry in profile.tried if "ms" in entry}
    assert ran == {"eager", "fp16+graph", "channels-last+graph", "eager+graph"}, profile.tried
    assert profile.backend.endswith("+graph") and profile.levels <= 2 and max(profile.against_one.values()) <= 2
    gc.collect()
    torch.cuda.empty_cache()  # what a recording reads must not have been let go of
    filler = [torch.randn(1 << 20, device="cuda") for _ in range(64)]
    probes = model.probes(16)
    for steps in model.steps or [1]:
        for size in (1, 2, 3, 4, 16, 5):  # prepared shapes and others, in turn: a replay must not keep an older input
            alone = np.concatenate([model.draw(steps, [probe], strict=True) for probe in probes[:size]])
            # half a level of the tolerance for every step, and one for the batch
            assert levels(model.draw(steps, probes[:size]), alone) <= 2 + steps
    assert len(filler) == 64


def test_the_cpu_draws_the_same_picture(weights: Path) -> None:
    there, here = (Generator.from_pretrained(weights / "student", device) for device in ("cuda", "cpu"))
    seeds, labels = [3, 4, 5], [0, 1, 0]
    one, other = (generator.sample(seeds, labels=labels, steps=4) for generator in (there, here))
    assert float((one - other).abs().max()) < 0.02


def test_strict_is_the_same_bytes_whatever_else_is_drawn(weights: Path) -> None:
    with running(weights, device="cuda", tune_seconds=10) as engine, ThreadPoolExecutor(8) as pool:
        expected = draw(engine, "student", orders(1), strict=True)[0].pixels.tobytes()
        others = [pool.submit(draw, engine, "student", orders(4, 10 * i)) for i in range(20)]
        stricts = [pool.submit(draw, engine, "student", orders(1), strict=True) for _ in range(20)]
        assert {future.result()[0].pixels.tobytes() for future in stricts} == {expected}
        for i, future in enumerate(others):
            alone = draw(engine, "student", orders(4, 10 * i), strict=True)
            assert all(levels(a.pixels, b.pixels) <= 3 for a, b in zip(future.result(), alone, strict=True))


def test_pictures_drawn_while_a_backend_is_measured_are_right(weights: Path) -> None:
    """Graphs are recorded in another thread, beside the traffic."""
    with running(weights, device="cuda", tune_seconds=20) as engine:
        expected = [drawn.pixels for drawn in draw(engine, "student", orders(2), strict=True)]
        rounds = 0
        while engine.named("student").profile is None or rounds < 50:
            found = draw(engine, "student", orders(2))
            assert all(levels(a.pixels, b) <= 3 for a, b in zip(found, expected, strict=True))
            rounds += 1
        assert engine.named("student").backend_info()["name"].endswith("+graph")


def test_a_batch_that_does_not_fit_is_split_and_the_server_lives_on(weights: Path) -> None:
    with running(weights, device="cuda") as engine:
        draw(engine, "student", orders(1))
        torch.cuda.synchronize()
        limit = (torch.cuda.memory_reserved() + (1 << 20)) / torch.cuda.mem_get_info()[1]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit)
        try:
            try:
                found = draw(engine, "student", orders(16))
                assert max(drawn.batch for drawn in found) < 16
            except ApiError as error:  # not even one
                assert error.status == 503 and error.body.code == "out_of_memory"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert len(draw(engine, "student", orders(2, 50))) == 2 and engine.alive
        until(lambda: engine.inflight == 0)
