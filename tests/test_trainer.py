"""The loop: turns, accumulation, several processes; checkpoints, and resuming to the same bits after any kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from torch import Tensor, nn
from trainings import TINY, Breaks, Duel, Regression, norm, same, settings, values
from two_processes import BEGAN, in_two_processes

from distillers.data import Batch, ImageData, open_data
from distillers.errors import BadInput, Notice, TrainingStopped
from distillers.generator import Generator
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot
from distillers.methods.diffusion import Diffusion
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.multi_student import MultiStudent
from distillers.methods.scm import ContinuousConsistency
from distillers.teacher import Teacher
from distillers.training.distiller import (
    Distiller,
    Networks,
    Turn,
)
from distillers.training.trainer import Run, begin, train
from distillers.training.watch import Watch


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


@pytest.fixture(scope="module")
def teacher(data: ImageData) -> Teacher:
    return load_teacher(Recipe.from_table(TINY), data)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Fresh processes that need not import torch again."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    context = multiprocessing.get_context("forkserver")
    ours = ["distillers.cli", "distillers.jobs.publish", "distillers.jobs.recipe", "pydantic.fields"]
    context.set_forkserver_preload([*ours, "accelerate.utils", "diffusers.schedulers", "torch.utils.tensorboard"])
    return context


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return norm([x - y for x, y in zip(a, b, strict=True)])


# --- turns -----------------------------------------------------------------------------------------------------------
def test_a_turn_moves_its_player_by_its_own_gradient_only(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    duel = Duel()
    rates = {"critic": 1e-2}
    # RAdam's first steps without momentum are plain gradient steps, so that the rate can be read off the weights.
    train(
        duel,
        teacher,
        data,
        settings(betas=(0.0, 0.999), learning_rate=1e-3, learning_rates=rates),
        tmp_path,
        device="cpu",
    )
    assert [turn["player"] for turn in duel.seen] == ["critic", "critic", "student"] * 3
    for turn in duel.seen[:4]:
        assert not turn["bystander moved"]
        assert turn["bystander gradient"] > 0  # the gradient reached the other player, and stayed out of its next turn:
        assert distance(turn["gradient"], turn["own"]) < 1e-5 * norm(turn["own"])
        rate = distance(turn["before"], turn["after"]) / norm(turn["own"])
        assert rate == pytest.approx({"critic": 1e-2, "student": 1e-3}[turn["player"]], rel=1e-2)


@dataclass(frozen=True, kw_only=True)
class Looks(Regression):
    """A pass of the student without gradients, then the one that it learns from."""

    def loss(self, net: nn.Module, batch: Batch, progress: float) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            super().loss(net, batch, progress)
        self.seen.append({"cached": torch.is_autocast_cache_enabled()})
        return super().loss(net, batch, progress)


def test_a_pass_without_gradients_takes_none_from_the_next(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    """torch before 2.10 hands the weights that the first pass has cast, without gradients, to the second."""
    method = Looks()
    train(method, teacher, data, settings(iterations=1, precision="bf16"), tmp_path, device="cpu")
    cast, turn = method.seen
    assert cast == {"cached": False} and all(g.any() for g in turn["gradient"])


def test_each_player_is_clipped_alone(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    duel = Duel()
    train(duel, teacher, data, settings(iterations=1, clip=1e-3), tmp_path, device="cpu")
    for turn in duel.seen:
        assert norm(turn["gradient"]) == pytest.approx(1e-3, rel=1e-2)
        assert turn["bystander gradient"] > 2e-3 or turn["player"] == "critic"  # not yet clipped: it was not its turn


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 2, [0.5, 0.9045, 0.6545, 0.3455, 0.0955]),
    ],
)
def test_warm_up_and_decay(
    decay: str, warmup: int, expected: list[float], teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    method = Regression()
    chosen = settings(iterations=5, betas=(0.0, 0.999), learning_rate=1e-2, warmup=warmup, decay=decay)
    train(method, teacher, data, chosen, tmp_path, device="cpu")
    rates = [distance(turn["before"], turn["after"]) / norm(turn["gradient"]) for turn in method.seen]
    assert [rate / 1e-2 for rate in rates] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_every_stage_warms_up_and_decays(decay: str, teacher: Teacher, tmp_path: Path) -> None:
    """Each as a training of its own, of its share of the iterations with its share of the warm-up."""
    method = HyperSD(segments=(4, 2, 1), adversarial_weights=(0.0, 0.0, 0.0))  # a quarter, a quarter, a half
    run = begin(method, teacher, settings(iterations=40, warmup=8, decay=decay), tmp_path, device="cpu")
    short, long = (
        begin(Regression(), teacher, settings(iterations=n, warmup=n // 5, decay=decay), tmp_path, device="cpu")
        for n in (10, 20)
    )
    expected = 2 * [short.rate(i) for i in range(10)] + [long.rate(i) for i in range(20)]
    assert [run.rate(i) for i in range(40)] == pytest.approx(expected)
    matched = MultiStudent(start="untrained", matching=0.25)
    assert matched.stage_starts() == [0.0, 0.25]
    staged = MultiStudent(start=None, base="hyper_sd", options={"segments": [2, 1], "adversarial_weights": [0, 0]})
    assert staged.stage_starts() == [0.0, 0.5]


def test_the_tracker_shows_what_an_adversary_weighs(
    teacher: Teacher, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of adversaries of a given weight and of a given ratio; none without one."""
    heads: dict[str, Any] = {"segments": (1,), "points": 8}
    for method, expected in (
        (HyperSD(adversarial_weights=(0.3,), **heads), 0.3),
        (HyperSD(adversarial_weights=(0.0,), **heads), None),
        (AdversarialConsistency(adversarial_start=0.0, adversarial_ramp=0.0), 1.0),
        (AdversarialConsistency(adversarial_start=0.0, adversarial_ramp=0.0, adversarial_weight=2.0), 2.0),
        (Dmd2(gan_weight=0.1, critic_turns=1), 1.0),
    ):
        run, shown = begin(method, teacher, settings(), tmp_path, device="cpu"), dict[str, float]()
        monkeypatch.setattr(run.accelerator, "log", lambda values, step, shown=shown: shown.update(values))
        run.dry_run(data)
        run.iteration(0, data)
        run.log(1)
        found = shown.get("gradient/adversary_over_loss")
        if isinstance(method, HyperSD):
            assert found == (expected and pytest.approx(expected, rel=1e-3))
        else:
            assert found is not None and found > 0
            if expected == 1.0:
                single = found
            elif expected == 2.0:
                assert found == pytest.approx(2 * single, rel=1e-3)
        assert not run.nets.pulls


def test_accumulation_gives_the_same_gradient_and_one_follow(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    whole, parts = Regression(), Regression()
    train(whole, teacher, data, settings(), tmp_path / "1", device="cpu")
    train(parts, teacher, data, settings(accumulation=4), tmp_path / "4", device="cpu")
    assert len(whole.seen) == len(parts.seen) == 3
    for one, four in zip(whole.seen, parts.seen, strict=True):
        assert distance(one["gradient"], four["gradient"]) < 1e-4 * norm(one["gradient"])
        assert distance(one["target"], four["target"]) < 0.05 * distance(one["before"], one["after"])
    first = parts.seen[0]
    halfway = [(a + b) / 2 for a, b in zip(first["before"], first["after"], strict=True)]
    assert distance(first["target"], halfway) < 1e-2 * distance(first["before"], first["after"])


def test_the_generator_holds_the_evaluation_average(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    method = Regression()
    averaged = train(method, teacher, data, settings(learning_rate=1e-2, ema=0.15), tmp_path / "ema", device="cpu")
    expected = method.seen[0]["before"]
    for i, turn in enumerate(method.seen):
        decay = min(0.15, (1 + i) / (10 + i))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, turn["after"], strict=True)]
    assert distance(values(averaged.denoiser), expected) < 1e-5 * norm(expected)
    last = train(method, teacher, data, settings(learning_rate=1e-2, ema=0.0), tmp_path / "none", device="cpu")
    assert same(values(last.denoiser), method.seen[-1]["after"])


@pytest.mark.process
def test_two_processes_are_one_with_both_batches(
    processes: ForkServerContext, teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    """Over gloo; in the third iteration one of the two is asked to stop, and both leave."""
    in_two_processes(one_of_two_processes, tmp_path, processes)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["stopped"] == ranks[1]["stopped"] and "iteration 3" in ranks[0]["stopped"]
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["00000003"]

    class Both:
        """What processes 0 and 1 draw, in one batch."""

        name, size, labels, items, __len__ = data.name, data.size, data.labels, data.items, data.__len__
        drawn = 0

        def draw(self, n: int, rng: np.random.Generator) -> Batch:
            halves = [data.draw(n // 2, np.random.default_rng((1, self.drawn, process))) for process in (0, 1)]
            self.drawn += 1
            return {k: torch.cat([half[k] for half in halves]) for k in halves[0]}

    alone = Regression()
    train(alone, teacher, Both(), settings(batch=8), tmp_path / "alone", device="cpu")
    for i, turn in enumerate(alone.seen):
        assert same(ranks[0]["seen"][i]["after"], ranks[1]["seen"][i]["after"])
        assert distance(ranks[0]["seen"][i]["gradient"], turn["gradient"]) < 1e-4 * norm(turn["gradient"])


def one_of_two_processes(folder: str) -> None:
    class Interrupted(Regression):
        def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
            assert torch.distributed.get_world_size() == 2
            Path(folder, BEGAN).touch()
            if len(self.seen) == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from super().step(nets, batch, progress)

    rank = torch.distributed.get_rank()
    plan, method = Recipe.from_table(TINY), Interrupted()
    data = load_data(plan)
    with pytest.raises(TrainingStopped) as stopped:
        train(method, load_teacher(plan, data), data, settings(iterations=9), Path(folder, "run"), device="cpu")
    torch.save({"seen": method.seen, "stopped": str(stopped.value)}, Path(folder, f"rank{rank}.pt"))


# --- killed and started again ----------------------------------------------------------------------------------------
def output_to(log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def fewstep(arguments: list[str], log: str, kill_at: int, kill_by: int, kill_after: float) -> None:
    """The command, killed at its kill_at-th touch of a checkpoint's files or after kill_after seconds of computing."""
    output_to(Path(log))
    touches = 0

    def audit(event: str, details: tuple[Any, ...]) -> None:
        nonlocal touches
        deleting = event in ("os.remove", "os.rmdir")
        touching = event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and "checkpoints" in str(details[0])
        touches += deleting or touching
        if touches == kill_at and (deleting or touching):
            os.kill(os.getpid(), kill_by)

    if kill_at:
        sys.addaudithook(audit)
    signal.setitimer(
        signal.ITIMER_VIRTUAL, kill_after
    )  # nobody handles its signal, which ends a process as SIGKILL does
    from distillers import cli

    sys.argv = ["fewstep", *arguments]
    cli.main()


@dataclass
class Command:
    """`fewstep distill` of one recipe into one folder, as often as it takes."""

    context: ForkServerContext
    recipe: Path
    out: Path

    def run(self, kill_at: int = 0, kill_by: int = signal.SIGKILL, kill_after: float = 0.0) -> int:
        arguments = ["distill", str(self.recipe), "--out", str(self.out), "--device", "cpu"]
        log = str(self.out.with_suffix(".log"))
        process = self.context.Process(target=fewstep, args=(arguments, log, kill_at, kill_by, kill_after))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    @property
    def output(self) -> str:
        """What the last run wrote, in one line."""
        return " ".join(self.out.with_suffix(".log").read_text().split())

    @property
    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.out / "training" / "checkpoints").glob("*"))

    def results(self) -> tuple[dict[str, Any], bytes]:
        last = self.out / "training" / "checkpoints" / self.checkpoints[-1]
        published = next(self.out.glob("unet/*.safetensors"))
        return flat(torch.load(last / "state.pt", weights_only=True)), published.read_bytes()


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path; tensors as their bytes."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}/{key}").items()}
    return {name: state.numpy().tobytes() if isinstance(state, Tensor) else state}


@pytest.mark.process
@pytest.mark.parametrize("method", ["diffusion", "consistency"])
def test_killed_anywhere_it_ends_with_the_same_bits(
    method: str, processes: ForkServerContext, teacher: Teacher, tmp_path: Path
) -> None:
    table = TINY
    if method == "consistency":
        Generator(teacher.denoiser, teacher.codec, teacher.info).save_pretrained(tmp_path / "teacher")
        table = {k: TINY[k] for k in ("data", "train")} | {"name": "tiny-student", "method": method}
        table |= {"teacher": str(tmp_path / "teacher"), "consistency": {"steps": [1, 2]}}
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps(table))
    whole = Command(processes, recipe, tmp_path / "whole")
    killed = Command(processes, recipe, tmp_path / "killed")
    assert whole.run() == 0, whole.output

    rng = random.Random()  # other moments every time
    touches = [rng.randint(3, 40) for _ in range(3)]  # a checkpoint takes 8 to 15
    seconds = [rng.uniform(0.1, 0.9)]
    moments = [{"kill_at": n} for n in touches] + [{"kill_after": s} for s in seconds]
    rng.shuffle(moments)
    for moment in moments:
        assert killed.run(**moment) in (-signal.SIGKILL, -signal.SIGVTALRM, 0), killed.output
    assert killed.run() == 0, killed.output
    assert killed.results() == whole.results(), f"killed at {moments}"
    assert killed.checkpoints == ["00000007", "00000008"]


@pytest.mark.parametrize(
    "method",
    [
        AdversarialConsistency(),
        HyperSD(segments=(2, 1), adversarial_weights=(0.1, 0.1), score_weight=0.5, critic_turns=1),
        Boot(),
        ContinuousConsistency(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_player_goes_on_where_it_was(
    method: Distiller, teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    """Discriminators, critics, adapters and targets resume to the same bits; the teacher is not stored with them."""

    def run(folder: str, iterations: range) -> dict[str, list[Tensor]]:
        chosen = settings(iterations=8, checkpoint_every=4)
        (tmp_path / folder).mkdir(exist_ok=True)
        one = begin(method, teacher, chosen, tmp_path / folder, device="cpu")
        assert one.resume() == iterations.start
        for i in iterations:
            one.iteration(i, data)
        one.save(iterations.stop)
        return {name: values(net) for name, net in one.nets.items()}

    whole = run("whole", range(8))
    run("parts", range(4))
    resumed = run("parts", range(4, 8))
    assert all(same(whole[name], resumed[name]) for name in whole)
    stored = torch.load(tmp_path / "parts" / "checkpoints" / "00000008" / "state.pt", weights_only=True)["nets"]
    assert "student" in stored and not {"teacher", "backbone", "codec"} & set(stored)


@pytest.mark.process
@pytest.mark.parametrize("kill_by", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_writes_a_checkpoint_and_the_same_command_goes_on(
    processes: ForkServerContext, tmp_path: Path, kill_by: int
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps(TINY | {"train": TINY["train"] | {"checkpoint_every": 3}}))
    command = Command(processes, recipe, tmp_path / "out")
    assert command.run(kill_at=3, kill_by=kill_by) == 1  # while the first checkpoint is written
    assert f"stopped: asked to stop at iteration 4; the same command continues from {command.out}" in command.output
    assert "Traceback" not in command.output
    assert command.checkpoints == ["00000003", "00000004"]
    assert command.run() == 0, command.output
    assert command.checkpoints == ["00000006", "00000008"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_before_a_checkpoint(
    how: str, teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    chosen = settings(iterations=10, checkpoint_every=2, log_every=100, ema=0.5)
    with pytest.raises(TrainingStopped, match=r"student .*00000004"):
        train(Breaks(how=how), teacher, data, chosen, tmp_path, device="cpu")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004"]
    state = flat(torch.load(tmp_path / "checkpoints" / "00000004" / "state.pt", weights_only=True))
    assert all(np.isfinite(np.frombuffer(v, np.float32)).all() for v in state.values() if isinstance(v, bytes))
    made = train(Regression(), teacher, data, chosen, tmp_path, device="cpu")  # goes on from there
    assert made.sample([0], labels=[0]).isfinite().all()


def test_a_learning_rate_beyond_reason_stops_the_run(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"student .*none yet"):
        train(Diffusion(), teacher, data, settings(iterations=9, learning_rate=1e20, clip=1.0), tmp_path, device="cpu")
    assert not (tmp_path / "checkpoints").exists()


def test_a_longer_training_goes_on_from_a_shorter_one(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    def run(folder: str, iterations: int, **changes: Any) -> Generator:
        chosen = settings(iterations=iterations, **changes)
        about = {"name": "x", "train": {"iterations": iterations, **changes}}
        return train(Regression(), teacher, data, chosen, tmp_path / folder, description=about, device="cpu")

    whole = run("whole", 8)
    run("parts", 4)
    with pytest.warns(Notice, match="from iteration 4 of what was a training of 4 iterations and is one of 8"):
        longer = run("parts", 8, samples=2)  # what leaves the weights as they are may change, too
    assert same(values(longer), values(whole))  # at a constant rate
    with pytest.raises(BadInput, match=r"train\.iterations: got 6; allowed: 8 or more"):
        run("parts", 6)
    with pytest.raises(BadInput, match="another recipe"):
        run("parts", 9, learning_rate=0.5)


def test_a_damaged_checkpoint_is_named(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    train(Regression(), teacher, data, settings(), tmp_path, device="cpu")
    (newest,) = (tmp_path / "checkpoints").iterdir()
    for name, allowed in (("state.pt", "an earlier checkpoint"), ("about.json", "a description")):
        for damaged in (b"", b"{}", (newest / name).read_bytes()[:100]):
            whole = (newest / name).read_bytes()
            (newest / name).write_bytes(damaged)
            with pytest.raises(BadInput, match=allowed if damaged == b"{}" else name):
                train(Regression(), teacher, data, settings(), tmp_path, device="cpu")
            (newest / name).write_bytes(whole)


def test_only_the_recipe_that_began_there_goes_on(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    about = {"name": "first", "steps": (1, 2)}  # a tuple, which JSON knows as a list
    train(Regression(), teacher, data, settings(), tmp_path, description=about, device="cpu")
    again = Regression()
    train(again, teacher, data, settings(), tmp_path, description=about, device="cpu")
    assert not again.seen  # nothing was left to do
    with pytest.raises(BadInput, match="another recipe") as refused:
        train(again, teacher, data, settings(), tmp_path, description={"name": "second"}, device="cpu")
    assert refused.value.field == str(tmp_path)


def test_what_killed_processes_left_is_cleared_away(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    for name in (".00000001", ".00000001.4711", ".00000007"):  # half written
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "00000000").mkdir()  # half deleted
    method = Regression()
    train(method, teacher, data, settings(iterations=5, checkpoint_every=1), tmp_path, device="cpu")
    assert len(method.seen) == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000005"]


# --- what a look at the pictures leaves behind ------------------------------------------------------------------------
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_samples_and_the_watch_leave_every_network_in_its_own_mode(
    ema: float, teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    """A discriminator's encoder learns in evaluation mode, beside a student in training mode."""
    chosen = settings(ema=ema, tracker="none", watch_every=1, watch_samples=132)
    run = begin(AdversarialConsistency(), teacher, chosen, tmp_path, device="cpu")
    before = {name: part.training for name, part in run.nets.named_modules()}
    assert before["student"] and before["discriminator"] and not before["discriminator.encoder"]
    run.iteration(0, data)
    run.draw_samples(1, data)
    assert {name: part.training for name, part in run.nets.named_modules()} == before
    run.watch(1, Watch(data, 132, 1, tmp_path))
    assert {name: part.training for name, part in run.nets.named_modules()} == before


# --- what it costs ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Sleepy(Regression):
    """Iterations of 50 ms at least; at iteration `fails` the process is as good as killed."""

    fails: int = -1

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        if len(self.seen) == self.fails:
            raise KeyboardInterrupt
        time.sleep(0.05)
        yield from super().step(nets, batch, progress)


def test_the_cost_is_that_of_all_iterations_whoever_ran_them(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    chosen = settings(iterations=8, checkpoint_every=2, sample_every=3)
    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        train(Sleepy(fails=5), teacher, data, chosen, tmp_path, device="cpu")
    first = json.loads((tmp_path / "cost.json").read_text())
    assert first["iterations"] == 4 and first["seconds"] >= 4 * 0.05
    train(Sleepy(), teacher, data, chosen, tmp_path, device="cpu")
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert first["seconds"] + 4 * 0.05 <= cost["seconds"] <= time.perf_counter() - begun
    assert cost.pop("seconds") and cost.pop("device").startswith("cpu")
    assert first["peak_memory_mb"] <= (peak := cost.pop("peak_memory_mb")) < 1e5 and peak > 50  # torch alone takes more
    assert 0 <= cost.pop("waited_for_data") < 4
    assert cost == {
        "iterations": 8, "batch": 4, "threads": torch.get_num_threads(), "precision": "no", "execution": "eager",
    }  # fmt: skip


def test_a_checkpoint_from_before_costs_were_counted_goes_on(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Sleepy(fails=2), teacher, data, settings(checkpoint_every=2), tmp_path, device="cpu")
    (tmp_path / "checkpoints" / "00000002" / "about.json").write_text('{"iteration": 2, "description": {}}')
    train(Sleepy(), teacher, data, settings(checkpoint_every=2), tmp_path, device="cpu")
    assert json.loads((tmp_path / "cost.json").read_text())["seconds"] >= 0.05


def test_samples_and_checkpoints_are_no_part_of_the_cost(
    teacher: Teacher, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, draw = Run.save, Run.draw_samples
    monkeypatch.setattr(Run, "save", lambda run, done: (time.sleep(1), save(run, done))[1])
    monkeypatch.setattr(Run, "draw_samples", lambda run, done, data: (time.sleep(1), draw(run, done, data))[1])
    begun = time.perf_counter()
    train(Regression(), teacher, data, settings(checkpoint_every=2, sample_every=1), tmp_path, device="cpu")
    seconds = json.loads((tmp_path / "cost.json").read_text())["seconds"]
    assert 0 < seconds <= time.perf_counter() - begun - 5  # two checkpoints and three grids of samples


# --- what people see -------------------------------------------------------------------------------------------------
def test_losses_are_written_for_tensorboard(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    duel, critic = Duel(), []
    train(duel, teacher, data, settings(iterations=4, log_every=2, learning_rate=1e-9), tmp_path, device="cpu")
    events = EventAccumulator(str(tmp_path / "logs" / "fewstep")).Reload()
    critic = events.Scalars("loss/critic")
    assert [event.step for event in critic] == [2, 4]
    # Nobody moves, so both players' means are of the same numbers, although one of them has two turns.
    assert [e.value for e in critic] == pytest.approx([e.value for e in events.Scalars("loss/student")], rel=1e-3)


def test_trackers_by_name(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    train(Regression(), teacher, data, settings(iterations=1, tracker="none"), tmp_path / "none", device="cpu")
    assert not (tmp_path / "none" / "logs").exists()
    with pytest.raises(BadInput, match=r"train\.tracker.*tensorboard.*wandb"):
        train(Regression(), teacher, data, settings(tracker="nonsense"), tmp_path / "bad", device="cpu")
    assert not (tmp_path / "bad").exists()


def test_sample_grids_have_the_right_size_and_change_nothing(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    chosen = {"iterations": 3, "samples": 5}
    plain = train(Diffusion(sampling_steps=2), teacher, data, settings(**chosen), tmp_path / "a", device="cpu")
    drawn = train(
        Diffusion(sampling_steps=2), teacher, data, settings(**chosen, sample_every=1), tmp_path / "b", device="cpu"
    )
    assert same(values(plain.denoiser), values(drawn.denoiser))
    pictures = sorted((tmp_path / "b" / "samples").glob("*.png"))
    assert [p.name for p in pictures] == ["000001.png", "000002.png", "000003.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert (image.format, image.size) == ("PNG", (2 * 10 + 2, 3 * 10 + 2))  # two columns of 8 px and gaps


# --- settings --------------------------------------------------------------------------------------------------------
def test_bfloat16_runs_on_float32_weights(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    exact, rounded = Regression(), Regression()
    train(exact, teacher, data, settings(), tmp_path / "no", device="cpu")
    made = train(rounded, teacher, data, settings(precision="bf16"), tmp_path / "bf16", device="cpu")
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    error = distance(exact.seen[0]["gradient"], rounded.seen[0]["gradient"]) / norm(exact.seen[0]["gradient"])
    assert 1e-5 < error < 0.2  # another precision, the same gradient


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("batch", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rates", {"student": -1.0}),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("warmup", -1),
        ("ema", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("accumulation", 3),
        ("optimizer", "sgd"),
        ("decay", "steps"),
        ("precision", "fp8"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadInput) as refused:
        settings(**{name: value})
    assert refused.value.field.startswith(f"train.{name}")


def test_a_rate_for_nobody_is_refused(teacher: Teacher, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"learning_rates\.critic.*student"):
        train(Regression(), teacher, data, settings(learning_rates={"critic": 1e-3}), tmp_path, device="cpu")
