"""The contract over every method in the registry, on the true U-Net at 8 px. A new method is held to it unasked.

What is asked of generators is not asked of a method that makes none: the autoencoder's own file has its proofs.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import Paired, batch_for, digest, digests, iterate, learners, teacher_for

from distillers import methods
from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.recipe import Recipe
from distillers.models.clipping import Clipping
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import from_config
from distillers.training.distiller import Distiller, Networks
from distillers.weights.manifest import AUTOENCODER

FOLLOWERS = ("target", "path")  # what a method may move by itself
every_method = pytest.mark.parametrize("name", methods.names())
every_generator = pytest.mark.parametrize(
    "name", [n for n in methods.names() if AUTOENCODER not in methods.find(n).tasks]
)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


def task_of(name: str) -> str:
    """A task that the method is for; by class where it can be."""
    return "class-to-image" if "class-to-image" in methods.find(name).tasks else methods.find(name).tasks[0]


def given_to(generator: Generator, seeds: list[int], data: ImageData) -> dict[str, Any]:
    """A condition for each seed."""
    if generator.info.task == "class-to-image":
        return {"labels": [5 * i for i in range(len(seeds))]}
    return {"sar": Paired(data).draw(len(seeds), np.random.default_rng(3))["sar"]}


@every_generator
def test_a_clipped_teacher_gives_clipped_targets_and_free_students(name: str, data: ImageData) -> None:
    """A bound would kill the gradient of what lies outside of it."""
    method, teacher = methods.find(name)(), teacher_for(task_of(name), data)
    teacher.denoiser.clipping = Clipping(0.125)
    nets = method.networks(teacher)
    trained = [net for net in learners(nets).values() if isinstance(net, Denoiser)]
    assert trained and not any(net.clipping for net in (*trained, method.generator(nets, teacher).denoiser))
    if "teacher" in nets:
        batch = batch_for(teacher, data)
        cond = {k: v for k, v in batch.items() if k in ("label", "sar")}
        with torch.no_grad():
            target = nets["teacher"](torch.randn_like(batch["x0"]), torch.tensor(teacher.denoiser.schedule.t_max), cond)
        assert float(target.abs().max()) == 0.125


@every_generator
@pytest.mark.parametrize("task", ["image", "class-to-image", "sar-to-optical"])
def test_networks_turns_and_generator(name: str, task: str, data: ImageData) -> None:
    if task not in methods.find(name).tasks:
        pytest.skip(f"{name} is for {', '.join(methods.find(name).tasks)}")
    method, teacher = methods.find(name)(), teacher_for(task, data)
    original = digest(teacher.denoiser)
    nets = method.networks(teacher)
    assert isinstance(nets, Networks) and "student" in learners(nets)
    assert not {p for net in learners(nets).values() for p in net.parameters()} & set(teacher.denoiser.parameters())
    still = {k: net for k, net in nets.items() if k not in learners(nets) and k not in FOLLOWERS}
    assert not any(module.training for net in still.values() for module in net.modules())
    start, played = digests(nets), set()
    for progress in (0.0, 0.3, 0.5, 0.99):
        torch.manual_seed(1)
        played |= set(iterate(method, nets, batch_for(teacher, data, method.draws(progress)), progress))
    assert played == set(learners(nets)), "whoever learns has a turn"
    assert digests(still) == {k: start[k] for k in still}, "frozen networks moved"
    assert digest(teacher.denoiser) == original
    moved = {k for k in nets if digest(nets[k]) != start[k]}
    assert moved == {k for k in nets if k not in still}, "targets follow, learners move"

    made = method.generator(nets, teacher)
    own = set(made.denoiser.parameters())
    assert not own & {p for k, net in nets.items() if k in FOLLOWERS or k in still for p in net.parameters()}
    assert own <= {p for net in learners(nets).values() for p in net.parameters()}
    assert (made.info.task, made.info.size, made.info.labels) == (task, (8, 8), teacher.info.labels)
    assert not made.info.step_times or made.info.default_steps in made.info.step_times
    for steps, times in made.info.step_times.items():
        assert len(times) == steps and times == sorted(times, reverse=True)
        assert all(made.schedule.t_min <= t <= made.schedule.t_max for t in times)
    sar = Paired(data).draw(2, np.random.default_rng(3))["sar"] if task == "sar-to-optical" else None
    labels = [0, 1] if task == "class-to-image" else None
    pictures = made.eval().sample([7, 8], labels=labels, sar=sar)
    assert pictures.shape == (2, 3, 8, 8) and pictures.abs().max() <= 1
    last = made.sample([8], labels=labels and labels[1:], sar=None if sar is None else sar[1:])
    assert torch.allclose(pictures[1:], last, atol=1e-4)  # a picture depends on its own seed and condition only


@every_generator
def test_a_step_is_a_function_of_the_global_seed(name: str, data: ImageData) -> None:
    method, teacher = methods.find(name)(), teacher_for(task_of(name), data)
    nets, batch = method.networks(teacher), batch_for(teacher, data, method.draws(0.0))
    iterate(method, nets, batch, 0.0)  # a loss against a copy of itself is the same for every seed at first

    def first_loss(seed: int) -> float:
        torch.manual_seed(seed)
        return next(method.step(nets, batch, 0.0))[1].item()

    assert first_loss(5) == first_loss(5) != first_loss(6)


@every_generator
def test_what_it_makes_survives_the_folder(name: str, data: ImageData, tmp_path: Path) -> None:
    method, teacher = methods.find(name)(), teacher_for(task_of(name), data)
    made = method.generator(method.networks(teacher), teacher).eval()
    made.save_pretrained(tmp_path / "made")
    opened = Generator.from_pretrained(tmp_path / "made")
    assert (opened.info.step_times, opened.info.sampler) == (made.info.step_times, made.info.sampler)
    for steps in made.info.step_times or [3]:
        pair = [g.sample([0, 1], steps=steps, **given_to(g, [0, 1], data)) for g in (made, opened)]
        assert (pair[0] - pair[1]).abs().mean() < 0.02  # weights are published in half precision


@every_generator
@pytest.mark.parametrize("schedule", ["edm", "flow", "trig"])
def test_continuous_schedules(name: str, schedule: str, data: ImageData) -> None:
    teacher = teacher_for(task_of(name), data)
    teacher.denoiser.schedule = from_config({"name": schedule})
    method = methods.find(name)()
    nets = method.networks(teacher)
    assert iterate(method, nets, batch_for(teacher, data, method.draws(0.5)), 0.5)
    made = method.generator(nets, teacher).eval()
    assert made.sample([0], **given_to(made, [0], data)).isfinite().all()


@every_method
def test_it_is_one_paper_and_one_frozen_dataclass(name: str) -> None:
    kind = methods.find(name)
    module = sys.modules[kind.__module__]
    assert re.search(r"\b(19|20)\d\d\b", module.__doc__ or ""), "the docstring names the paper and its year"
    defined = [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
    assert [v for v in defined if issubclass(v, Distiller)] == [kind]
    assert is_dataclass(kind) and kind.__dict__["__dataclass_params__"].frozen
    kind()  # every hyper-parameter has a default


@every_method
def test_every_field_is_explained_in_a_trailing_comment(name: str) -> None:
    kind = methods.find(name)
    lines = inspect.getsource(kind).splitlines()
    for field in fields(kind):
        (line,) = [line for line in lines if line.startswith(f"    {field.name}:")]
        assert re.search(r"  # \S", line), f"{name}.{field.name} has no trailing comment"


@every_method
def test_unknown_and_wrongly_typed_fields_are_refused(name: str) -> None:
    table = {"name": "x", "method": name, "data": {"kind": "shapes"}}
    table |= {"teacher": "weights/x"} if methods.find(name).starts_from == "teacher" else {}
    known = ".*".join(sorted(f.name for f in fields(methods.find(name))))
    with pytest.raises(BadInput, match=f"allowed: .*{known}") as refused:
        Recipe.from_table(table | {name: {"nonsense": 1}})
    assert refused.value.field == f"{name}.nonsense"
    for field in fields(methods.find(name)):
        with pytest.raises(BadInput) as refused:
            Recipe.from_table(table | {name: {field.name: 1 if "dict" in field.type else {"no": "such type"}}})
        assert refused.value.field.startswith(f"{name}.{field.name}")
