"""Networks split over two processes learn what whole copies of them learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import TINY, settings
from two_processes import BEGAN, in_two_processes

from distillers.errors import BadInput
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.methods.consistency import Consistency
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.models.lora import LoraSettings, plain
from distillers.teacher import Teacher
from distillers.training.distiller import Distiller, on_one_base
from distillers.training.settings import TrainSettings
from distillers.training.sharding import is_split, local_part
from distillers.training.trainer import begin, train

METHODS: dict[str, Callable[[], Distiller]] = {
    "consistency": Consistency,
    "hyper-sd": lambda: HyperSD(points=4, segments=(2, 1), adversarial_weights=(0.5, 0.5), score_weight=1.0),
    "dmd2": lambda: Dmd2(critic_turns=2),
}
CASES = [(method, lora) for method in METHODS for lora in (False, True)]
LONG, SHORT = 2, 1  # iterations, and those of a run that is started again
TOLERANCE = 1e-3  # of the largest change of a weight: gradients are summed in another order


def teacher_of(lora: bool) -> Teacher:
    plan = Recipe.from_table(TINY)
    teacher = load_teacher(plan, load_data(plan))
    torch.manual_seed(0)
    torch.nn.init.normal_(teacher.denoiser.network.conv_out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    return on_one_base(teacher, LoraSettings(rank=2)) if lora else teacher


def plan(shard: bool) -> TrainSettings:
    """RAdam's first steps are plain gradient steps, so that weights differ as much as gradients do."""
    return settings(shard=shard, iterations=LONG, checkpoint_every=SHORT, learning_rate=1e-2, tracker="none")


def begun_in_parts(method: str, lora: bool, out: Path) -> float:
    """Play the first iterations, write a checkpoint, and return the share of the base's weights that is kept here."""
    data = load_data(Recipe.from_table(TINY))
    out.mkdir(parents=True, exist_ok=True)
    run = begin(METHODS[method](), teacher_of(lora), plan(shard=True), out, device="cpu")
    base = [p for p in plain(run.teacher.denoiser.network).parameters() if is_split(p)]
    for i in range(SHORT):
        run.iteration(i, data)
    run.save(SHORT)
    run.accelerator.wait_for_everyone()
    run.close()
    return sum(local_part(p).numel() for p in base) / sum(p.numel() for p in base)


def trained(method: str, lora: bool, out: Path, *, shard: bool) -> dict[str, Tensor]:
    data = load_data(Recipe.from_table(TINY))
    made = train(METHODS[method](), teacher_of(lora), data, plan(shard), out, device="cpu")
    assert not any(is_split(p) for p in made.parameters())
    return made.denoiser.state_dict()  # type: ignore[union-attr]


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_with_parts_learn_what_two_with_copies_do(tmp_path: Path) -> None:
    """Through a checkpoint of whole weights, written half-way."""
    in_two_processes(one_of_two_processes, tmp_path)
    for method, lora in CASES:
        found: dict[str, Any] = torch.load(tmp_path / f"{method}-{lora}.pt", weights_only=True)
        copies, parts = found["copies"], found["parts"]
        start = teacher_of(False).denoiser.state_dict()
        learnt = (
            {k: v for k, v in copies.items() if ".B." in k} if lora else {k: v - start[k] for k, v in copies.items()}
        )
        change = max(float(value.abs().max()) for value in learnt.values())
        apart = max(float((copies[key] - parts[key]).abs().max()) for key in copies)
        assert change > 1e-8 and apart < TOLERANCE * change, (method, lora, apart, change)
        assert found["share"] < 0.55, "each process keeps about half of the weights"
    assert list((tmp_path / "dmd2-False" / "parts" / "samples").glob("*.png"))


def test_one_process_has_nothing_to_split(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train\.shard: got True; allowed: false in one process; torchrun"):
        begin(Consistency(), teacher_of(False), plan(shard=True), tmp_path, device="cpu")


def one_of_two_processes(folder: str) -> None:
    root = Path(folder)
    (root / BEGAN).touch()
    for method, lora in CASES:
        out = root / f"{method}-{lora}"
        copies = trained(method, lora, out / "copies", shard=False)
        share = begun_in_parts(method, lora, out / "parts")
        parts = trained(method, lora, out / "parts", shard=True)
        if torch.distributed.get_rank() == 0:
            torch.save({"copies": copies, "parts": parts, "share": share}, root / f"{method}-{lora}.pt")
