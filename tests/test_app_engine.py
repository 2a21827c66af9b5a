"""The engine over real, small weights folders: backends by measurement, folders that change, memory, devices, load."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from service import LABELS, SIDE, publish, until

from app.engine import backends, folders, store, tuning, worker
from app.engine.budget import choose
from app.engine.engine import Engine, Order, Picture
from app.engine.model import Model
from app.engine.profile import Profile, read_profiles, write_profile
from app.errors import ApiError
from app.settings import Settings
from distillers.errors import BadInput
from distillers.evaluation.self_check import write_reference
from distillers.generator import Generator
from distillers.weights.manifest import digests

TWICE = {1: [999.0], 2: [999.0, 499.0]}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, "teacher", "class-to-image", labels=LABELS, default_steps=4)
    publish(root, "student", "class-to-image", labels=LABELS, teacher="teacher", step_times=TWICE)
    publish(root, "sar", "sar-to-optical", teacher="not-here", step_times={1: [999.0]}, patch=2)
    return root


@pytest.fixture
def weights(published: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(published, tmp_path / "weights"))


@contextmanager
def running(weights: Path, **settings: Any) -> Iterator[Engine]:
    engine = Engine(
        Settings(
            weights=weights,
            **{"device": "cpu", "tune_seconds": 0, "rescan_seconds": 0.1, "max_wait_seconds": 10_000, **settings},
        )
    )
    engine.start()
    try:
        until(lambda: engine.opened)
        yield engine
    finally:
        engine.stop()


@asynccontextmanager
async def held(engine: Engine) -> AsyncIterator[threading.Event]:
    """The engine's thread stands still, until the event is set or the block ends."""
    begun, release = threading.Event(), threading.Event()
    holding = asyncio.ensure_future(engine.call(lambda: (begun.set(), release.wait(300))))
    await asyncio.to_thread(begun.wait)
    try:
        yield release
    finally:
        release.set()
        await holding


def alone_in(weights: Path, name: str) -> None:
    """Remove the other folders, which would be tuned, too."""
    for folder in weights.iterdir():
        if folder.name != name:
            shutil.rmtree(folder)


def draw(engine: Engine, name: str, *orders: Order, steps: int = 1, **more: Any) -> list[Picture]:
    return asyncio.run(engine.draw(engine.named(name), steps, orders, SIDE, SIDE, **more))


def levels(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def rewrite(weights: Path, name: str, *, seed: int) -> None:
    """The folder anew, as `publish` does it: written beside, then renamed."""
    generator = Generator.from_pretrained(weights / name)
    torch.manual_seed(seed)
    for parameter in generator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    generator.save_pretrained(weights / f".{name}.new")
    shutil.rmtree(weights / name)
    (weights / f".{name}.new").rename(weights / name)


# --- backends and the profile


def test_a_backend_is_chosen_by_measurement_and_remembered_beside_the_weights(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open("student", weights / "student", "cpu", 250)
    profile = tuning.tune(model, lambda work: work(), seconds=30, tolerance=2, largest=2)
    tried = {entry["backend"] for entry in profile.tried}
    assert {"eager/1", "channels-last/1"} <= tried and any(name.startswith("openvino/") for name in tried)
    scores = {e["backend"]: np.mean([ms / n for n, ms in e["ms"].items()]) for e in profile.tried if "refused" not in e}
    assert scores[profile.id] == min(scores.values())
    assert 1 in profile.buckets and set(profile.buckets) | set(profile.dropped) >= {1, 2}
    assert profile.levels <= 2 and max(profile.against_one.values()) <= 2

    def never(*_: Any) -> Any:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(tuning, "median_and_spread", never)
    again = Model.open("student", weights / "student", "cpu", 250)
    kept = tuning.tune(again, lambda work: work(), seconds=30, tolerance=2, largest=2)
    assert (kept.id, kept.buckets, kept.against_one) == (profile.id, profile.buckets, profile.against_one)
    assert again.backend_info()["name"] == profile.backend and again.backend_info()["measured"]
    with pytest.raises(AssertionError):  # another tolerance is another question
        tuning.tune(again, lambda work: work(), seconds=30, tolerance=0, largest=2)


@pytest.mark.parametrize("name", ["channels-last", "openvino", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", ["student", "sar", "teacher"])
def test_every_backend_draws_what_the_library_draws(weights: Path, name: str, folder: str) -> None:
    if name == "compile" and (folder != "student" or not shutil.which("g++")):
        pytest.skip("compiling takes half a minute: once is enough, and only where there is a compiler")
    model = Model.open(folder, weights / folder, "cpu", 250)
    backend = next(b for b in backends.candidates("cpu", True) if b.name == name)
    steps = max(model.steps or [3])
    reference = tuning.probe(model, steps)
    prepared = tuning.prepare(model, backend.open_all(model.networks), [1, 2], lambda work: work())
    assert all(len(some) == 2 for some in prepared)
    assert levels(tuning.probe(model, steps, prepared, backend.threads), reference) <= 1
    orders = model.probes(2)
    with model.using(prepared, None):
        assert levels(model.draw(steps, orders), [model.draw(steps, [order])[0] for order in orders]) <= 1
    assert (tuning.probe(model, steps) == reference).all()  # the reference was left as it is


def test_a_backend_that_draws_other_pictures_is_refused(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: torch.nn.Module) -> backends.Prepare:
        return lambda inputs: lambda x, *_: torch.zeros_like(x)

    def broken(network: torch.nn.Module) -> backends.Prepare:
        raise RuntimeError("no such instruction")

    others = [backends.Backend("wrong", False, 1, wrong), backends.Backend("broken", True, 1, broken)]
    monkeypatch.setattr(tuning, "candidates", lambda *_: [backends.Backend("eager", True, 1, backends.eager), *others])
    model = Model.open("student", weights / "student", "cpu", 250)
    profile = tuning.tune(model, lambda work: work(), seconds=30, tolerance=2, largest=2)
    told = {entry["backend"]: entry for entry in profile.tried}
    assert profile.id == "eager/1" and told["broken/1"]["failed"] == "RuntimeError"
    assert "more than 2 levels" in told["wrong/1"]["refused"] and told["wrong/1"]["levels"] > 2


def test_servers_that_share_a_folder_never_read_half_a_profile(tmp_path: Path) -> None:
    """One writes while another reads; both have written before."""
    write_profile(tmp_path, "other", Profile())
    done, lost = threading.Event(), list[int]()

    def read() -> None:
        while not done.is_set():
            if "other" not in read_profiles(tmp_path):
                lost.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    many = Profile(tried=[{"backend": "eager", "ms": {str(i): 1.0}} for i in range(2000)])
    for _ in range(60):
        write_profile(tmp_path, "own", many)
    done.set()
    reader.join()
    assert not lost and set(read_profiles(tmp_path)) == {"own", "other"}
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_a_doubtful_profile_is_measured_again_in_an_idle_moment(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *_: [backends.Backend("eager", True, 1, backends.eager)])
    alone_in(weights, "student")
    with running(weights, tune_seconds=20, max_batch=2) as engine:
        until(lambda: engine.named("student").profile)
        profile = engine.named("student").profile
        assert profile is not None and profile.spread is not None and profile.load is not None
    kept = weights / "student" / "profile.json"
    (key,) = stored = json.loads(kept.read_text())
    for doubtful in ({"spread": 9.0, "buckets": {"1": 5.0}}, {"spread": None, "load": None, "buckets": {"1": 5.0}}):
        kept.write_text(json.dumps({key: stored[key] | doubtful}))
        with running(weights, tune_seconds=20, max_batch=2) as engine:
            until(lambda: engine.named("student").profile)
            assert engine.named("student").backend_info()["sure"] is False  # it serves all the same
            draw(engine, "student", Order(1, 0))
            monkeypatch.setattr(store, "IDLE_S", 0)
            until(lambda: engine.named("student").backend_info()["batch_ms"][1] < 5000)
            assert engine.named("student").profile.spread < 9  # type: ignore[union-attr,operator]
        assert json.loads(kept.read_text())[key]["buckets"]["1"] < 5
        monkeypatch.setattr(store, "IDLE_S", 60.0)


def test_a_measurement_that_is_no_better_changes_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *_: [backends.Backend("eager", True, 1, backends.eager)])
    monkeypatch.setattr(tuning, "median_and_spread", lambda *_: (1.0, 0.9))
    model = Model.open("student", weights / "student", "cpu", 250)
    for spread, kept in ((0.5, True), (0.95, False)):
        doubted = Profile(buckets={1: 7.0}, spread=spread, load=0.0)
        found = tuning.tune(model, lambda work: work(), seconds=30, tolerance=2, largest=2, doubted=doubted)
        assert (found is doubted) == kept and (model.profile is found) != kept


def test_a_bucket_whose_pictures_depend_on_their_mates_is_not_used(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that looks at the whole batch: the fault that padding and fused kernels bring in elsewhere."""

    def mixing(network: torch.nn.Module) -> backends.Prepare:
        own = backends.plain(network)
        return lambda inputs: lambda x, *told: own(x + 0.2 * (x.mean(0, keepdim=True) - x[:1]), *told)

    monkeypatch.setattr(tuning, "candidates", lambda *_: [backends.Backend("mixing", True, 1, mixing)])
    model = Model.open("student", weights / "student", "cpu", 250)
    profile = tuning.tune(model, lambda work: work(), seconds=30, tolerance=2, largest=4)
    assert set(profile.buckets) == {1} and "levels" in profile.dropped[2] and profile.against_one[2] > 1


def test_the_server_tunes_beside_its_work_and_draws_the_same_before_and_after(weights: Path) -> None:
    """The bytes of who asks for strict ones depend on neither the load nor the backend."""
    alone_in(weights, "student")
    with running(weights, tune_seconds=20, max_batch=4) as engine:
        before = [draw(engine, "student", Order(seed, 1))[0].pixels for seed in range(3)]
        loaded = draw(engine, "student", *(Order(seed, 1) for seed in range(6)), strict=True)
        assert {drawn.batch for drawn in loaded} == {1}
        until(lambda: engine.named("student").profile and not engine.named("student").tuning)
        after = [draw(engine, "student", Order(seed, 1))[0].pixels for seed in range(3)]
        assert levels(before, after) <= 2
        together = draw(engine, "student", *(Order(seed, 1) for seed in range(3)))
        assert levels([drawn.pixels for drawn in together], after) <= 2
        assert {drawn.bucket for drawn in together} <= {1, 2, 4}
        strict = [draw(engine, "student", Order(seed, 1), strict=True)[0] for seed in range(6)]
        assert all((one.pixels == other.pixels).all() for one, other in zip(loaded, strict, strict=True))
        alone = Generator.from_pretrained(weights / "student")
        torch.set_num_threads(1)
        expected = ((alone.sample([0, 1, 2], labels=[1] * 3) + 1) * 127.5).round().permute(0, 2, 3, 1)
        assert levels([drawn.pixels for drawn in strict[:3]], expected) <= 1


@pytest.mark.slow
def test_shapes_that_come_again_and_again_are_prepared(weights: Path) -> None:
    alone_in(weights, "sar")
    with running(weights, tune_seconds=20, max_batch=2) as engine:
        until(lambda: engine.named("sar").profile)
        model = engine.named("sar")
        if model.profile and model.profile.backend == "eager":
            pytest.skip("nothing to prepare")
        sar = np.zeros((1, 32, 48), np.float32)
        known = len(model.dispatches[0].prepared)

        def ask() -> Any:
            return asyncio.run(engine.draw(model, 1, [Order(5, sar=sar)], 32, 48))[0].pixels

        first = ask()
        until(lambda: [ask()] and len(model.dispatches[0].prepared) > known)
        assert levels(ask(), first) <= 1


# --- folders that come, change and go


def test_a_folder_that_changes_under_load_is_exchanged_and_nothing_is_lost(weights: Path) -> None:
    with running(weights) as engine:
        before = draw(engine, "student", Order(7, 1))[0].pixels
        old, stop, seen, failed = engine.named("student"), threading.Event(), list[Any](), list[Any]()

        def ask() -> None:
            while not stop.is_set():
                try:
                    seen.append(draw(engine, "student", *(Order(7, 1) for _ in range(3)))[0].pixels)
                except Exception as error:
                    failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        rewrite(weights, "student", seed=1)
        until(lambda: engine.named("student") is not old)
        enough = len(seen) + 2 * len(threads)
        until(lambda: failed or len(seen) >= enough)
        stop.set()
        for thread in threads:
            thread.join()
        after = draw(engine, "student", Order(7, 1))[0].pixels
        assert not failed and levels(before, after) > 1
        assert all(levels(one, before) <= 1 or levels(one, after) <= 1 for one in seen)
        assert engine.named("student").revision != old.revision


def test_an_order_that_waits_is_drawn_by_the_model_it_was_checked_against(weights: Path) -> None:
    with running(weights) as engine:
        old = engine.named("student")
        before = draw(engine, "student", Order(7, 1))[0].pixels

        async def both() -> Any:
            async with held(engine):
                drawing = asyncio.ensure_future(engine.draw(old, 1, [Order(7, 1)], SIDE, SIDE))
                while not sum(engine.waiting().values()):
                    await asyncio.sleep(0.01)
                await engine.unload("student")
                assert "student" not in engine.models
            return (await drawing)[0].pixels

        assert levels(asyncio.run(both()), before) <= 1


@pytest.mark.parametrize("fault", ["truncated", "not a number", "manifest", "golden"])
def test_a_bad_folder_takes_nothing_down(weights: Path, fault: str) -> None:
    with running(weights) as engine:
        old = engine.named("student")
        before = draw(engine, "student", Order(7, 1))[0].pixels
        folder = weights / "student"
        tensors = next(folder.rglob("*.safetensors"))
        if fault == "truncated":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        elif fault == "manifest":
            (folder / "fewstep.json").write_text("{")
        elif fault == "golden":
            (folder / "golden.json").write_text(json.dumps({"steps": 1, "levels": np.zeros((8, 8, 3)).tolist()}))
            os.utime(tensors)
        else:
            held = load_file(tensors)  # with its digest in the manifest: a whole folder of weights that are no numbers
            save_file({name: torch.full_like(value, float("nan")) for name, value in held.items()}, tensors)
            manifest = json.loads((folder / "fewstep.json").read_text())
            manifest["sha256"] = digests(folder)
            (folder / "fewstep.json").write_text(json.dumps(manifest))
        slot = engine.store.slots["student"]
        until(lambda: slot.version == folders.version(folder))
        with pytest.raises((BadInput, Exception)):
            asyncio.run(engine.load("student"))
        assert engine.named("student") is old
        assert levels(draw(engine, "student", Order(7, 1))[0].pixels, before) <= 1


def test_folders_come_and_go_while_the_server_runs(weights: Path) -> None:
    with running(weights) as engine:
        shutil.copytree(weights / "student", weights / ".other")
        (weights / ".other").rename(weights / "other")
        until(lambda: "other" in engine.models)
        draw(engine, "other", Order(1, 0))
        (weights / "other").rename(weights / ".gone")
        until(lambda: "other" not in engine.models)
        with pytest.raises(ApiError) as absent:
            engine.named("other")
        assert absent.value.status == 404


def test_a_golden_pair_that_fits_is_no_obstacle(weights: Path) -> None:
    for name in ("student", "teacher", "sar"):
        write_reference(Generator.from_pretrained(weights / name), weights / name)
    with running(weights) as engine:
        assert sorted(engine.models) == ["sar", "student", "teacher"] and not engine.failed


def test_load_and_unload_by_request(weights: Path) -> None:
    with running(weights) as engine:
        asyncio.run(engine.unload("student"))
        with pytest.raises(ApiError) as away:
            draw(engine, "student", Order(1, 0))
        assert away.value.status == 503 and away.value.body.code == "model_not_loaded"
        time.sleep(0.3)  # the next look at the folder does not open it again
        assert "student" not in engine.models
        assert asyncio.run(engine.load("student")).name == "student"
        draw(engine, "student", Order(1, 0))
        with pytest.raises(ApiError) as absent:
            asyncio.run(engine.load("absent"))
        assert absent.value.status == 404


def test_what_was_not_asked_for_the_longest_is_put_away_and_comes_back_when_asked(weights: Path) -> None:
    size = Model.open("student", weights / "student", "cpu", 250).bytes / 2**20
    with running(weights, memory_mb=2.5 * size) as engine:
        assert len(engine.models) == 2 and engine.store.slots["teacher"].state == "unloaded"
        draw(engine, "student", Order(1, 0))
        model = asyncio.run(engine.open_for("teacher", lambda model: True))
        assert model.name == "teacher" and sorted(engine.models) == ["student", "teacher"]
        assert asyncio.run(engine.open_for("sar", lambda model: True)).name == "sar"


# --- memory, devices, hangs


def test_a_batch_that_does_not_fit_into_memory_is_split_and_the_cap_remembered(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Model.draw, list[int]()

    def small(self: Model, steps: int, orders: Any, *more: Any, **named: Any) -> Any:
        asked.append(len(orders))
        if len(orders) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, steps, orders, *more, **named)

    with running(weights) as engine:
        alone = [draw(engine, "student", Order(seed, 0))[0].pixels for seed in range(8)]
        monkeypatch.setattr(Model, "draw", small)
        drawn = draw(engine, "student", *(Order(seed, 0) for seed in range(8)))
        assert levels([d.pixels for d in drawn], alone) <= 1 and asked == [8, 4, 2, 2, 4, 2, 2]
        asked.clear()
        draw(engine, "student", *(Order(seed, 0) for seed in range(8)))
        assert max(asked) <= 2
        monkeypatch.setattr(Model, "draw", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("out")))
        with pytest.raises(ApiError) as none:
            draw(engine, "student", Order(1, 0))
        assert none.value.status == 503 and none.value.headers == {"Retry-After": "5"}
        monkeypatch.setattr(Model, "draw", real)
        draw(engine, "student", Order(1, 0))


def test_several_devices_share_the_work_and_draw_the_same(weights: Path) -> None:
    with running(weights, device="cpu,cpu") as engine:
        alone = [draw(engine, "student", Order(seed, 2))[0].pixels for seed in range(12)]

        async def many() -> list[Any]:
            model = engine.named("student")
            asked = [engine.draw(model, 1, [Order(seed, 2)], SIDE, SIDE) for seed in range(12)]
            return [drawn[0].pixels for drawn in await asyncio.gather(*asked)]

        for _ in range(5):
            assert levels(asyncio.run(many()), alone) <= 1
        assert all(worker.turns > 0 for worker in engine.workers)


def test_a_pass_that_hangs_is_seen_and_one_that_ends_is_not(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, release = Model.draw, threading.Event()

    def hangs(self: Model, *given: Any) -> Any:
        release.wait(300)
        return real(self, *given)

    with running(weights, hang_seconds=0.2) as engine:
        assert not engine.stuck
        monkeypatch.setattr(Model, "draw", hangs)
        thread = threading.Thread(target=draw, args=(engine, "student", Order(1, 0)))
        thread.start()
        until(lambda: engine.stuck)
        release.set()
        thread.join()
        assert not engine.stuck and engine.alive


def test_a_lost_device_is_dead_for_good(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(weights) as engine:
        monkeypatch.setattr(
            Model, "draw", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal access"))
        )
        with pytest.raises(RuntimeError):
            draw(engine, "student", Order(1, 0))
        until(lambda: not engine.alive)
        assert not engine.ready


# --- load


def test_a_storm_of_callers_who_leave_costs_not_one_pass(weights: Path) -> None:
    with running(weights, queue_limit=100) as engine:
        model = engine.named("student")

        async def storm() -> None:
            async with held(engine):
                turns = engine.workers[0].turns
                for _ in range(20):  # 2000 in all: who has left makes room for others
                    asked = [
                        asyncio.ensure_future(engine.draw(model, 1, [Order(1, 0)], SIDE, SIDE)) for _ in range(100)
                    ]
                    await asyncio.sleep(0)
                    for task in asked:
                        task.cancel()
                    await asyncio.gather(*asked, return_exceptions=True)
                    assert all(task.cancelled() for task in asked)
                assert sum(engine.waiting().values()) == 0
            assert (await engine.draw(model, 1, [Order(2, 0)], SIDE, SIDE))[0].batch == 1
            assert engine.workers[0].turns == turns + 1

        asyncio.run(storm())


def test_four_times_too_much_is_answered_or_refused_at_once_and_the_engine_is_never_idle(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capacity is known, for a pass of a known time stands in for the network. Seconds are the benchmark's business:
    here nothing is drawn in vain, the next order is always there, and who is refused never waited."""
    each, ahead = 0.01, list[int]()

    with running(weights, queue_limit=20, max_batch=1) as engine:

        def paced(self: Model, steps: int, orders: Any, *more: Any) -> Any:
            ahead.append(len(engine.workers[0].batcher))
            time.sleep(each * len(orders))
            return np.zeros((len(orders), SIDE, SIDE, 3), np.uint8)

        monkeypatch.setattr(Model, "draw", paced)
        model, turns = engine.named("student"), engine.workers[0].turns

        async def overload() -> tuple[int, int]:
            done = refused = 0

            async def ask() -> None:
                nonlocal done, refused
                asked = asyncio.ensure_future(engine.draw(model, 1, [Order(1, 0)], SIDE, SIDE))
                await asyncio.sleep(0)  # one turn of the loop: who is refused knows it by now
                at_once = asked.done()
                try:
                    await asked
                    done += 1
                except ApiError as error:
                    assert at_once and error.status == 503 and int((error.headers or {})["Retry-After"]) >= 1
                    refused += 1

            tasks = list[asyncio.Task[None]]()
            while len(ahead) < 200:
                tasks += [asyncio.ensure_future(ask()) for _ in range(4)]
                await asyncio.sleep(each)
            await asyncio.gather(*tasks)
            return done, refused

        done, refused = asyncio.run(overload())
        assert done == engine.workers[0].turns - turns == len(ahead)
        assert refused > 2 * (done - 20)
        assert sum(waiting > 0 for waiting in ahead[20:180]) >= 0.95 * 160


def test_deadlines(weights: Path) -> None:
    with running(weights) as engine:
        model = engine.named("student")
        assert len(draw(engine, "student", Order(1, 0), deadline=time.perf_counter() + 600)) == 1

        async def late() -> None:
            async with held(engine) as release:
                turns = engine.workers[0].turns
                deadline = time.perf_counter() + 0.2
                asked = asyncio.ensure_future(engine.draw(model, 1, [Order(1, 0)], SIDE, SIDE, deadline=deadline))
                while time.perf_counter() <= deadline:
                    await asyncio.sleep(0.01)
                release.set()
                with pytest.raises(ApiError) as told:
                    await asked
                assert told.value.status == 504 and told.value.body.code == "deadline_exceeded"
            assert engine.workers[0].turns == turns

        asyncio.run(late())
        with pytest.raises(ApiError) as hopeless:
            draw(engine, "student", Order(1, 0), deadline=time.perf_counter() - 1)
        assert hopeless.value.status == 504


def test_what_is_done_with_a_picture_is_done_beside_the_engine(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(weights) as engine:
        names = list[str]()

        def finish(pixels: Any) -> bytes:
            names.append(threading.current_thread().name)
            return bytes(pixels[0, 0])

        (drawn,) = draw(engine, "student", Order(1, 0), finish=finish)
        assert drawn.file == bytes(drawn.pixels[0, 0]) and drawn.encode_s > 0
        assert "engine" in names[0]  # nobody waits for the device
        names.clear()
        draw(engine, "student", *(Order(seed, 0) for seed in range(2)), finish=finish)
        assert names == [threading.current_thread().name] * 2  # tiny ones by who waits for them
        names.clear()
        monkeypatch.setattr(worker, "TINY", 0)
        draw(engine, "student", *(Order(seed, 0) for seed in range(2)), finish=finish)
        assert all("codec" in name for name in names) and len(names) == 2
        with pytest.raises(ZeroDivisionError):
            draw(engine, "student", Order(1, 0), finish=lambda pixels: 1 // 0)


def test_partial_pictures_lead_to_the_last_and_belong_to_their_order(weights: Path) -> None:
    with running(weights) as engine:
        seen: dict[int, list[Any]] = {0: [], 1: []}
        shown = ((0, 1, 2), (0, 2))
        orders = [
            Order(s, 0, on_partial=lambda i, p, s=s: seen[s].append((i, p)), partial_steps=shown[s]) for s in (0, 1)
        ]
        drawn = draw(engine, "teacher", *orders, steps=4)
        for s in (0, 1):
            assert tuple(i for i, _ in seen[s]) == shown[s]
            distance = [levels(picture, drawn[s].pixels) for _, picture in seen[s]]
            assert distance[-1] <= distance[0]


def test_edits_begin_from_a_picture(weights: Path) -> None:
    """Noised to the time of a late step, a picture of one colour stays near it, and less so from an early one."""
    with running(weights) as engine:
        start = np.full((3, SIDE, SIDE), 0.5, np.float32)
        off = [
            float(
                np.abs(
                    draw(engine, "teacher", Order(1, 0, start=start), steps=50, first=first)[0].pixels / 127.5 - 1.5
                ).mean()
            )
            for first in (0, 40, 49)
        ]
        assert off[2] < off[1] < off[0] and off[2] < 0.2


# --- the latency budget


def test_a_latency_budget_chooses_model_and_steps(weights: Path) -> None:
    report = {"rows": [{"role": "student", "steps": n, "frechet": f} for n, f in ((1, 20.0), (2, 15.0))]}
    report["rows"] += [{"role": "teacher", "steps": n, "frechet": 90.0 / n} for n in (4, 10, 50)]
    (weights / "student" / "report.json").write_text(json.dumps(report))
    with running(weights) as engine:
        models = [engine.named("student"), engine.named("teacher")]
        for model, each in zip(models, (0.010, 0.020), strict=True):
            model.profile = Profile(buckets={1: each}, steps=1)
        told = {b: choose(engine, models, b) for b in (15, 25, 100, 250, 5000)}
        assert {b: (c.model.name, c.steps) for b, c in told.items()} == {
            15: ("student", 1),
            25: ("student", 2),
            100: ("student", 2),
            250: ("teacher", 10),
            5000: ("teacher", 50),
        }
        assert told[25].expected_ms == pytest.approx(20) and told[25].quality == 15.0 and "15" in told[25].why
        assert choose(engine, models[:1], 45, n=4).steps == 1  # four pictures take four times as long
        with pytest.raises(BadInput, match="10 or more now"):
            choose(engine, models, 5)
        with pytest.raises(BadInput, match="cannot be compared"):
            choose(engine, [*models, SimpleNamespace(name="sar", info=SimpleNamespace(data="other"))], 100)  # type: ignore[list-item]
        (weights / "student" / "report.json").unlink()
        most = choose(engine, models, 100)
        assert (most.model.name, most.steps) == ("teacher", 4) and most.quality is None


def test_the_budget_goes_by_the_picture_that_was_drawn_at_load_until_backends_are_measured(weights: Path) -> None:
    with running(weights) as engine:
        model = engine.named("teacher")
        assert model.profile is None and model.step_s is not None and 0 < model.step_s < 5
        model.step_s = 0.010
        assert choose(engine, [model], 105).steps == 10
        with pytest.raises(BadInput, match="10 or more now"):
            choose(engine, [model], 9)


SIGNALS = """
import faulthandler, gc, signal, subprocess, sys, torch
from app.engine.backends import openvino
from diffusers import UNet2DModel
from distillers.models.families import TOLD
faulthandler.enable()
inputs = (torch.zeros(1, 3, 8, 8), torch.zeros(1), *[None] * len(TOLD))
def network():
    return UNet2DModel(8, 3, 3, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
first, second = (openvino("f32")(network())(inputs) for _ in range(2))
for one in (first, second):
    one(*inputs)
del one, first; gc.collect()
del second; gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
subprocess.run([sys.executable, "-c", ""], capture_output=True)
"""


@pytest.mark.process
def test_a_signal_is_survived_after_openvinos_models_are_gone() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr
