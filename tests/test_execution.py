"""How networks are run in a training: measured, agreeing with eager, recorded; batches drawn ahead."""

import gc
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainings import TINY, Duel, Regression, settings, values

from distillers.data import Batch, ImageData, open_data
from distillers.jobs.inputs import load_teacher
from distillers.jobs.recipe import Recipe
from distillers.teacher import Teacher
from distillers.training.distiller import Networks, Turn
from distillers.training.execution import DryRun, Execution, run_as
from distillers.training.trainer import Run, begin, train

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the path")


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


@pytest.fixture(scope="module")
def teacher(data: ImageData) -> Teacher:
    return load_teacher(Recipe.from_table(TINY), data)


def played(loss: float = 1.0, gradient: float = 1.0) -> DryRun:
    return DryRun([("student", loss, torch.full((4,), gradient))], 0.1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (played(), None),
        (played(loss=1.01, gradient=1.1), None),
        (played(loss=1.2), "loss is 1.2 where it is 1"),
        (played(gradient=1.5), "gradient differs by 50%"),
        (played(loss=float("nan")), "not finite"),
        (played(gradient=float("inf")), "not finite"),
    ],
)
def test_passes_that_differ_by_more_than_rounding_are_named(other: DryRun, said: str | None) -> None:
    found = played().disagreement(other)
    assert found is None if said is None else found and said in found


def test_a_dry_run_changes_no_network(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    """Not the players', and not the target that follows after the last turn."""
    run = begin(Regression(), teacher, settings(), tmp_path, device="cpu")
    with torch.no_grad():
        next(run.nets["target"].parameters()).add_(1)  # following would now move it
    before = {name: values(net) for name, net in run.nets.items()}
    found = run.dry_run(data)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], values(run.nets[name]), strict=True))
    assert [player for player, *_ in found.turns] == ["student", "student"] and found.seconds > 0  # early and late
    assert all(p.grad is None for p in run.nets["student"].parameters())


def test_every_turn_is_compared(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    found = begin(Duel(), teacher, settings(), tmp_path, device="cpu").dry_run(data)
    assert [player for player, *_ in found.turns] == 2 * ["critic", "critic", "student"]


def test_a_player_who_enters_late_is_compared(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    class Late(Duel):
        def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
            yield from (turn for turn in super().step(nets, batch, progress) if turn[0] == "student" or progress > 0.5)

    found = begin(Late(), teacher, settings(), tmp_path, device="cpu").dry_run(data)
    assert [player for player, *_ in found.turns] == ["student", "critic", "critic", "student"]


@pytest.mark.parametrize(
    ("seconds", "disagree", "expected"),
    [
        ({"eager": 1.0, "eager, channels last": 0.7, "compiled, channels last": 0.5}, "", "compiled, channels last"),
        ({"eager": 1.0, "eager, channels last": 1.2, "compiled": 0.5}, "", "compiled"),
        ({"eager": 1.0, "eager, channels last": 0.99, "compiled, channels last": 1.1}, "", "eager"),  # within the noise
        ({"eager": 1.0, "eager, channels last": 1.2, "compiled": 0.5}, "compiled", "eager"),
        (
            {"eager": 1e-3, "eager, channels last": 1e-4, "compiled, channels last": 1e-4},
            "",
            "eager",
        ),  # a short training
    ],
)
def test_the_fastest_way_that_agrees_is_taken(
    seconds: dict[str, float], disagree: str, expected: str, teacher: Teacher, data: ImageData, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def dry_run(run: Run, data: ImageData, execution: Execution | None = None) -> DryRun:
        name = str(execution or Execution())
        return replace(played(gradient=9.0 if name == disagree else 1.0), seconds=seconds[name])

    monkeypatch.setattr(Run, "dry_run", dry_run)
    run = begin(Regression(), teacher, settings(iterations=100_000), tmp_path, device="cpu")
    said = run.choose_execution(data)
    assert str(run.execution) == expected and said.startswith(expected + " (")


def test_code_that_cannot_be_compiled_stays_eager(
    teacher: Teacher, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no working C++ compiler\nand more")

    monkeypatch.setattr(nn.Module, "compile", broken)
    run = begin(Regression(), teacher, settings(compile="always"), tmp_path, device="cpu")
    assert "failed: no working C++ compiler" in run.choose_execution(data)
    assert not run.execution.compiled and run.dry_run(data).turns


@needs_compiler
@pytest.mark.slow
def test_a_compiled_training_agrees_and_resumes_to_the_same_bits(
    teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    def run(folder: str, iterations: range) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        one = begin(Regression(), teacher, settings(iterations=4, compile="always"), tmp_path / folder, device="cpu")
        assert one.resume() == iterations.start
        if not iterations.start:
            said = one.choose_execution(data)
            assert one.execution.compiled, said
            one.execution = Execution(compiled=True)  # which memory format was faster may differ from run to run
            run_as(one.nets, one.execution)
        for i in iterations:
            one.iteration(i, data)
        one.save(iterations.stop)
        return one

    whole = run("whole", range(4))
    run("parts", range(2))
    resumed = run("parts", range(2, 4))
    assert resumed.execution == whole.execution and "compiled" in resumed.cost(4)["execution"]
    for a, b in zip(values(whole.nets["student"]), values(resumed.nets["student"]), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():  # features are seen through hooks, which compiled code would not call
        x0 = torch.zeros(1, 3, 8, 8)
        seen = whole.nets["student"].features(x0, torch.tensor(500.0), {"label": torch.zeros(1, dtype=torch.long)})
    assert len(seen) == 1


def test_networks_keep_their_names_however_they_run(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    run = begin(Regression(), teacher, settings(), tmp_path, device="cpu")
    names = list(run.nets.state_dict())
    run_as(run.nets, Execution(compiled=True, channels_last=True))
    assert list(run.nets.state_dict()) == names
    weight = run.nets["student"].network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    run_as(run.nets, Execution())
    assert run.nets["student"].network._compiled_call_impl is None


class Slow:
    """Data with an array of their own, which say what thread asked."""

    def __init__(self, data: ImageData) -> None:
        self.data, self.threads, self.light = data, list[str](), np.linspace(0.1, 1, 100_000, dtype=np.float32)
        self.name, self.size, self.labels, self.items = data.name, data.size, data.labels, data.items

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        self.threads.append(threading.current_thread().name)
        batch = self.data.draw(n, rng)
        self.light[:] *= 1  # as writable as it was, wherever it is
        return batch | {"image": batch["image"] * float(rng.choice(self.light))}


def test_batches_are_drawn_ahead_and_none_too_many(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    slow = Slow(data)
    train(Regression(), teacher, slow, settings(iterations=5), tmp_path, device="cpu")
    assert len(slow.threads) == 5 and all(name.startswith("data") for name in slow.threads)
    told = json.loads((tmp_path / "cost.json").read_text())
    assert 0 <= told["waited_for_data"] <= told["seconds"] and told["execution"] == "eager"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.process
def test_processes_draw_the_same_batches_as_the_thread(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    trained = []
    for workers in (0, 2):
        slow = Slow(data)
        made = train(Regression(), teacher, slow, settings(iterations=5, workers=workers), tmp_path / str(workers))
        assert len(slow.threads) == (1 if workers else 5)  # one draw here, so that all processes share what is decoded
        trained.append(made.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)
    assert not multiprocessing.active_children()


class Endless:
    """What never ends where it is collected by a process that did not make it, as a compiled OpenVINO model does."""

    def __init__(self) -> None:
        self.me, self.maker = self, os.getpid()

    def __del__(self) -> None:
        while os.getpid() != self.maker:
            time.sleep(1)


@pytest.mark.process
def test_processes_inherit_nothing_of_this_one(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    gc.disable()
    try:
        Endless()
        train(Regression(), teacher, Collects(data), settings(iterations=2, workers=1), tmp_path, device="cpu")
    finally:
        gc.enable()


class Collects(Slow):
    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        if multiprocessing.parent_process():
            gc.collect()
        return super().draw(n, rng)


@pytest.mark.process
def test_a_stopped_training_with_processes_goes_on_where_it_stood(
    teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    class Stops(Regression):
        def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
            if progress >= 0.5:
                raise KeyboardInterrupt
            yield from super().step(nets, batch, progress)

    chosen = settings(iterations=6, checkpoint_every=2, workers=1)
    whole = train(Regression(), teacher, data, chosen, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(Stops(), teacher, data, chosen, tmp_path / "halves", device="cpu")
    resumed = train(Regression(), teacher, data, chosen, tmp_path / "halves", device="cpu")
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_an_error_of_the_data_is_the_trainings(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    class Broken(Slow):
        def draw(self, n: int, rng: np.random.Generator) -> Batch:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(Regression(), teacher, Broken(data), settings(), tmp_path, device="cpu")
