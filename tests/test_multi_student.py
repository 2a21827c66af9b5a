"""Shares, their students, and the one folder that routes: who learns what, who draws what, and who is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import trainings
from diffusers import LCMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import transformer
from processes import Popen
from service import GENERATE, engine_held, error_of, pictures, until_ready, wait_until_waiting
from starlette.testclient import TestClient
from torch import Tensor, nn
from typer.testing import CliRunner

from app.main import create_app
from app.settings import Settings
from distillers import cli
from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.inputs import held_out, load_data, load_teacher
from distillers.jobs.merge import merge
from distillers.jobs.publish import draw_rows
from distillers.jobs.recipe import Recipe
from distillers.jobs.suggest import linear_cka, suggest, table, variants
from distillers.methods import find
from distillers.methods.dmd2 import Dmd2
from distillers.methods.multi_student import MultiStudent, class_embeddings, equal_clusters
from distillers.models.denoiser import Denoiser, Routed
from distillers.models.schedule import VariancePreserving
from distillers.teacher import Teacher
from distillers.training.losses import SNR_CAP
from distillers.training.settings import TrainSettings
from distillers.training.trainer import begin
from distillers.weights.manifest import Info

NETWORK = trainings.NETWORK | {"block_out_channels": [8, 16]}
SMALL = {"block_out_channels": [4, 8]}
TRAIN: dict[str, Any] = {"iterations": 2, "batch": 4, "warmup": 0, "samples": 2, "tracker": "none"}
SHAPES: dict[str, Any] = {"kind": "shapes", "size": 8}
FIRST, SECOND = list(range(12)), list(range(12, 24))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of the shapes."""
    root = tmp_path_factory.mktemp("students")
    about = {"task": "class-to-image", "network": NETWORK}
    recipe = Recipe.from_table({"name": "teacher", "method": "diffusion", "data": SHAPES, "model": about})
    teacher = load_teacher(recipe, load_data(recipe))
    Generator(teacher.denoiser, teacher.codec, teacher.info).save_pretrained(root / "teacher")
    return root


@pytest.fixture(scope="module")
def teacher(root: Path) -> Teacher:
    return Teacher.from_pretrained(root / "teacher")


def plan(root: Path, **options: Any) -> Recipe:
    """Two students, half the teacher's width, in two iterations."""
    own = {"students": 2, "network": SMALL, "options": {"critic_turns": 1}, **options}
    return Recipe.from_table(
        {"name": "pair", "method": "multi_student", "teacher": str(root / "teacher"), "data": SHAPES}
        | {"multi_student": own, "train": TRAIN}
    )


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    """What `distill` makes of it: training/student-0, training/student-1, and the two as one."""
    distill(plan(root), root / "pair", "cpu")
    return root / "pair"


def students_of(folder: Path) -> list[Path]:
    return [folder / "training" / f"student-{k}" for k in (0, 1)]


@pytest.fixture
def lone(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the two students, to be spoilt."""
    return [shutil.copytree(place, tmp_path / place.name) for place in students_of(made)]


def constant(teacher: Teacher, value: float) -> Denoiser:
    """A student that draws one grey, whatever it is asked."""
    network: Any = copy.deepcopy(teacher.denoiser.network)
    nn.init.zeros_(network.conv_out.weight)
    nn.init.constant_(network.conv_out.bias, value)
    return Denoiser(network, teacher.denoiser.schedule, "x0").eval()


def student_info(teacher: Teacher, **more: Any) -> Info:
    times = {1: [999.0], 2: [999.0, 499.0]}
    told = {"role": "student", "method": "multi_student", "sampler": "consistency", "teacher": "teacher"}
    return replace(teacher.info, step_times=times, sha256={}, **{**told, **more})


def dark_and_bright(teacher: Teacher) -> Generator:
    denoisers = [constant(teacher, value) for value in (-0.8, 0.8)]
    info = student_info(teacher, name="both", shares=[FIRST, SECOND])
    return Generator(Routed(denoisers, info.shares), teacher.codec, info).eval()


# --- who learns what


@given(st.integers(1, 60), st.integers(1, 60))
def test_shares_hold_every_class_once_and_are_equal(classes: int, students: int) -> None:
    about: Any = SimpleNamespace(info=SimpleNamespace(labels=list(map(str, range(classes)))))
    method = MultiStudent(students=students)
    if students > classes:
        with pytest.raises(BadInput, match=r"multi_student\.students"):
            method.shares(about)
        return
    shares = method.shares(about)
    assert [label for share in shares for label in share] == list(range(classes))  # consecutive
    assert len(shares) == students and {len(share) - classes // students for share in shares} <= {0, 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99))
def test_clusters_hold_every_point_once_and_are_equal(points: int, clusters: int, seed: int) -> None:
    clusters = min(points, clusters)
    embeddings = torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))
    found = equal_clusters(embeddings, clusters)
    assert sorted(i for cluster in found for i in cluster) == list(range(points))
    assert {len(cluster) - points // clusters for cluster in found} <= {0, 1}
    assert found == equal_clusters(embeddings, clusters) == sorted(map(sorted, found))


def test_clusters_find_groups_and_split_what_is_too_many() -> None:
    rng = torch.Generator().manual_seed(0)
    group = torch.tensor([0, 1, 2] * 5)
    points = 10 * torch.eye(3)[group] + 0.1 * torch.randn(15, 3, generator=rng)
    assert equal_clusters(points, 3) == [[i for i in range(15) if i % 3 == k] for k in range(3)]
    uneven = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 9.0])[:, None]  # five beside one: equal size has its price
    assert equal_clusters(uneven, 2) == [[0, 1, 2], [3, 4, 5]]


def test_clusters_are_of_the_teachers_own_embeddings(teacher: Teacher) -> None:
    network: Any = teacher.denoiser.network
    assert torch.equal(class_embeddings(teacher), network.class_embedding.weight[:24])
    grouped = copy.deepcopy(teacher)
    with torch.no_grad():
        embedding: Any = grouped.denoiser.network
        embedding.class_embedding.weight[:24] = torch.eye(2, 32).repeat(12, 1)
    shares = MultiStudent(students=2, partition="clusters").shares(grouped)
    assert shares == [list(range(0, 24, 2)), list(range(1, 24, 2))]
    drawn = transformer(student_info(teacher, labels=["a", "b", "c"]))
    dit: Any = drawn.denoiser
    assert class_embeddings(Teacher(dit, drawn.codec, drawn.info)).shape == (3, 16)
    unlabelled = replace(teacher, info=replace(teacher.info, labels=["a", "b"]))
    with pytest.raises(BadInput, match="no embedding of 2 classes"):
        class_embeddings(unlabelled)


@pytest.mark.parametrize(("student", "share"), [(0, FIRST), (1, SECOND)])
def test_a_batch_holds_its_students_share_only(student: int, share: list[int], root: Path) -> None:
    recipe = plan(root, student=student)
    whole, method = load_data(recipe), recipe.distiller()
    part = method.data(whole, load_teacher(recipe, whole))
    seen = {int(label) for i in range(8) for label in part.draw(16, np.random.default_rng(i))["label"]}
    assert seen <= set(share) and len(seen) > 8
    assert set(part.items(range(64))["label"].tolist()) <= set(share)


def test_one_training_is_of_one_student(teacher: Teacher, data: ImageData) -> None:
    for method in (MultiStudent(students=2), MultiStudent(students=25, student=0)):
        for ask in (lambda m=method: m.networks(teacher), lambda m=method: m.data(data, teacher)):
            with pytest.raises(BadInput, match=r"multi_student.students?:"):
                ask()


@pytest.mark.parametrize("base", ["dmd2", "consistency"])
def test_alone_and_as_its_teacher_it_is_the_base_method_bit_for_bit(
    base: str, teacher: Teacher, data: ImageData, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"critic_turns": 2} if base == "dmd2" else {"points": 8}
    settings = TrainSettings(iterations=4, batch=4, warmup=0, tracker="none")
    states = []
    for method in (find(base)(**own), MultiStudent(base=base, options=own)):
        run = begin(method, teacher, settings, tmp_path, device="cpu")
        part = method.data(data, teacher)
        for i in range(settings.iterations):
            run.iteration(i, part)
        states.append((run.nets.state_dict(), run.generator().denoiser.state_dict()))
    for ours, theirs in zip(*states, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_base_method_has_its_own_progress(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def step(self: Dmd2, nets: Any, batch: Any, progress: float) -> Iterator[Any]:
        given.append(progress)
        yield "critic", torch.zeros(())

    monkeypatch.setattr(Dmd2, "step", step)
    batch = {"x0": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1])}
    for method in (MultiStudent(network=SMALL, matching=0.2), MultiStudent(network=SMALL)):
        nets, start, given[:] = method.networks(teacher), method.matched, []
        players = [next(method.step(nets, batch, p))[0] for p in (0.0, start - 1e-6, start, start + (1 - start) / 2)]
        assert players == ["student", "student", "critic", "critic"] and given == pytest.approx([0, 0.5])
    assert (MultiStudent(network=SMALL).matched, MultiStudent(start="untrained").matched) == (0.3, 0.3)
    assert MultiStudent().matched == MultiStudent(start="x").matched == MultiStudent(network={}).matched == 0


def test_score_matching_is_of_the_teachers_answer(teacher: Teacher) -> None:
    method = MultiStudent(network=SMALL)
    torch.manual_seed(0)
    nets = method.networks(teacher)
    batch = {"x0": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 5, 11, 23])}
    torch.manual_seed(1)
    player, loss = next(method.step(nets, batch, 0.0))
    torch.manual_seed(1)
    t = nets["student"].schedule.spaced(0.02 + 0.96 * torch.rand(4, dtype=torch.float64))
    x_t, cond = nets["student"].schedule.add_noise(batch["x0"], torch.randn(4, 3, 8, 8), t), {"label": batch["label"]}
    gap = (nets["student"](x_t, t, cond) - teacher.denoiser(x_t, t, cond)).square().mean((1, 2, 3))
    expected = ((nets["student"].schedule.snr(t).clamp(max=SNR_CAP) + 1) * gap).mean()
    assert player == "student" and sum(p.numel() for p in nets["student"].parameters()) < 40_000
    torch.testing.assert_close(loss, expected.float())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"students": 0}, "students"),
        ({"students": 2, "student": 2}, "student"),
        ({"student": -1}, "student"),
        ({"partition": "random"}, "partition"),
        ({"matching": 0.2}, "matching"),
        ({"matching": 1.0, "start": "untrained"}, "matching"),
        ({"base": "nothing"}, "base"),
        ({"base": "multi_student"}, "base"),
        ({"base": "diffusion"}, "base"),
        ({"base": "refine"}, "base"),
        ({"options": {"nonsense": 1}}, "options.nonsense"),
        ({"options": {"critic_turns": "many"}}, "options.critic_turns"),
        ({"options": {"critic_turns": True}}, "options.critic_turns"),
        ({"options": {"start": "untrained"}}, "options.start"),
        ({"base": "consistency", "network": SMALL}, "network"),
        ({"base": "consistency", "start": "untrained"}, "start"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], field: str, root: Path) -> None:
    table = plan(root).table() | {"multi_student": options}
    with pytest.raises(BadInput) as refused:
        Recipe.from_table(table)
    assert refused.value.field == f"multi_student.{field}"


# --- who draws what


class Telling(nn.Module):
    """A network that answers with its number, and notes what it was asked."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.asked = number, list[list[int]]()

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        self.asked.append(label.tolist())
        return x * 0 + self.number + label[:, None] / 100 + x + time[:, None] / 1000


def telling(shares: list[list[int]]) -> Routed:
    schedule = VariancePreserving.from_betas()
    return Routed([Denoiser(Telling(k), schedule, "x0") for k in range(len(shares))], shares)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_a_routed_batch_is_each_students_own_work_in_place(classes: int, students: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = [part.tolist() for part in np.array_split(rng.permutation(classes), min(classes, students))]
    routed, labels = telling(shares), torch.from_numpy(rng.integers(0, classes, 9))
    x_t, t = torch.from_numpy(rng.normal(size=(9, 2))).float(), torch.from_numpy(rng.uniform(1, 999, 9))
    answer = routed(x_t, t, {"label": labels})
    for row, label in enumerate(labels.tolist()):  # total, and a function of the label alone
        k = next(k for k, share in enumerate(shares) if label in share)
        own = routed.students[k](x_t[row : row + 1], t[row : row + 1], {"label": labels[row : row + 1]})
        torch.testing.assert_close(answer[row : row + 1], own)
    order = torch.from_numpy(rng.permutation(9))
    assert torch.equal(routed(x_t[order], t[order], {"label": labels[order]}), answer[order])
    one_time = routed(x_t, t[0], {"label": labels})
    torch.testing.assert_close(one_time, routed(x_t, t[0].expand(9), {"label": labels}))


def test_each_student_is_called_once_with_its_rows() -> None:
    routed = telling([[0, 2], [1], [3]])
    routed(torch.zeros(5, 2), torch.tensor(9.0), {"label": torch.tensor([2, 1, 0, 2, 1])})
    asked = [student.network.asked for student in routed.students]  # type: ignore[union-attr]
    assert asked == [[[2, 0, 2]], [[1, 1]], []]  # who has no row is not called


@pytest.mark.parametrize("shares", [[[0, 1], [1, 2]], [[0], [2]], [[1, 2]]])
def test_a_router_that_is_not_total_is_refused(shares: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="shares"):
        telling(shares)


def test_a_merged_generator_is_copied_moved_and_saved(teacher: Teacher, tmp_path: Path) -> None:
    both = dark_and_bright(teacher)
    labels = [20, 3, 12, 11]
    drawn = both.sample(range(4), labels=labels, steps=2)
    assert torch.equal(drawn.mean((1, 2, 3)).sign(), torch.tensor([1.0, -1, 1, -1]))
    assert torch.equal(copy.deepcopy(both).to("cpu").sample(range(4), labels=labels, steps=2), drawn)
    both.save_pretrained(tmp_path / "both")
    files = {str(p.relative_to(tmp_path / "both")) for p in (tmp_path / "both").rglob("*") if p.is_file()}
    parts = {f"students/{k}/{name}" for k in (0, 1) for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert files == parts | {"fewstep.json", "scheduler/scheduler_config.json"}
    info = Info.read(tmp_path / "both")
    assert set(info.sha256) == files - {"fewstep.json"} and info.shares == [FIRST, SECOND]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        again = Generator.from_pretrained(tmp_path / "both", dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {dtype}
        assert (again.sample(range(4), labels=labels, steps=2) - drawn).abs().max() < 0.01
    again.save_pretrained(tmp_path / "again")
    assert Info.read(tmp_path / "again").shares == info.shares


def test_stock_diffusers_opens_each_student_and_draws_its_pictures(made: Path) -> None:
    generator = Generator.from_pretrained(made)
    scheduler: Any = LCMScheduler.from_pretrained(made / "scheduler")
    assert not (made / "model_index.json").exists()
    for k, label in ((0, 3), (1, 17)):
        scheduler.set_timesteps(1)
        network: Any = UNet2DModel.from_pretrained(made / "students" / str(k)).eval()
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            output = network(noise, scheduler.timesteps[0], class_labels=torch.tensor([label])).sample
        theirs = scheduler.step(output, scheduler.timesteps[0], noise).prev_sample.clamp(-1, 1)
        torch.testing.assert_close(generator.sample([5], labels=[label]), theirs, atol=1e-3, rtol=0)


def test_a_merged_folder_draws_what_its_students_draw(made: Path) -> None:
    both = Generator.from_pretrained(made)
    alone = [Generator.from_pretrained(place) for place in students_of(made)]
    labels = [23, 0, 11, 12, 5]
    drawn = both.sample(range(5), labels=labels)
    for i, label in enumerate(labels):
        own = alone[label // 12].sample([i], labels=[label])
        torch.testing.assert_close(drawn[i : i + 1], own, atol=1e-4, rtol=0)


def test_a_dead_student_shows_in_its_share_alone(teacher: Teacher) -> None:
    """What a mean over all classes dilutes: every share is to be looked at by itself."""
    rng = torch.Generator().manual_seed(0)
    real = {label: 0.5 * torch.randn(64, 3, 8, 8, generator=rng) for label in (0, 12)}

    class Alive(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return 0.5 * x

    schedule = teacher.denoiser.schedule
    routed = Routed([Denoiser(Alive(), schedule, "x0"), constant(teacher, 0.0)], [FIRST, SECOND])
    noise = torch.randn(64, 3, 8, 8, generator=rng)
    with torch.no_grad():
        found = {
            label: energy(routed(noise, torch.tensor(999.0), {"label": torch.full((64,), label)}), real[label])
            for label in real
        }
    assert found[12] > 10 * abs(found[0])


def energy(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased."""
    a, b, n = a.flatten(1), b.flatten(1), len(a)
    within = (torch.cdist(a, a).sum() + torch.cdist(b, b).sum()) / (n * (n - 1))
    return float(2 * torch.cdist(a, b).mean() - within)


# --- the folder


def test_a_merged_folder_is_a_whole_one(made: Path, root: Path) -> None:
    info = Info.read(made)
    assert (info.name, info.method, info.shares) == ("pair", "multi_student", [FIRST, SECOND])
    assert Recipe.load(made / "recipe.toml").table() == plan(root).table()
    costs = [json.loads((place / "training" / "cost.json").read_text()) for place in students_of(made)]
    whole = json.loads((made / "training" / "cost.json").read_text())
    assert whole["iterations"] == 4 and whole["seconds"] == pytest.approx(sum(cost["seconds"] for cost in costs))
    assert whole["peak_memory_mb"] == max(cost["peak_memory_mb"] for cost in costs)
    assert {"device", "threads", "batch"} <= set(whole) and (made / "grid.png").is_file()
    card = (made / "README.md").read_text()
    assert "`students/1` draws yellow circle" in card
    exec(card.split("```python\n")[1].split("```")[0].replace('"pair"', repr(str(made))), {})
    assert [Info.read(place).shares for place in students_of(made)] == [[FIRST], [SECOND]]
    assert Info.read(students_of(made)[1]).name == "pair-student-1"


def test_folders_that_hold_one_network_for_all_say_nothing_of_shares(root: Path, teacher: Teacher) -> None:
    assert "shares" not in json.loads((root / "teacher" / "fewstep.json").read_text())
    made = MultiStudent(options={"critic_turns": 1}).generator(MultiStudent().networks(teacher), teacher)
    assert made.info.shares == [] and made.info.classes == list(range(24))


@pytest.mark.parametrize(
    "shares", [[FIRST], [FIRST, FIRST + SECOND], [FIRST, SECOND[1:]], [FIRST, [*SECOND, 24]], [FIRST, SECOND, []]]
)
def test_a_manifest_with_wrong_shares_is_refused(shares: list[list[int]], teacher: Teacher, tmp_path: Path) -> None:
    dark_and_bright(teacher).save_pretrained(tmp_path / "x")
    replace(Info.read(tmp_path / "x"), shares=shares).write(tmp_path / "x")
    with pytest.raises(BadInput):
        Generator.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize("spoil", ["missing", "damaged", "foreign", "surplus"])
def test_a_spoilt_student_is_refused_by_file(spoil: str, teacher: Teacher, tmp_path: Path) -> None:
    dark_and_bright(teacher).save_pretrained(tmp_path / "x")
    zero, one = (tmp_path / "x" / "students" / k for k in "01")
    file = "diffusion_pytorch_model.safetensors"
    if spoil == "missing":
        shutil.rmtree(one)
    elif spoil == "damaged":
        (one / file).write_bytes((one / file).read_bytes()[:-1])
    elif spoil == "foreign":
        shutil.copy(zero / file, one / file)
    else:
        shutil.copytree(one, tmp_path / "x" / "students" / "2")
    with pytest.raises(BadInput, match=f"students/{'2' if spoil == 'surplus' else '1'}"):
        Generator.from_pretrained(tmp_path / "x")


def change(folder: Path, **entries: Any) -> None:
    replace(Info.read(folder), **entries).write(folder)


def change_recipe(folder: Path, **entries: Any) -> None:
    (folder / "recipe.toml").write_text(tomli_w.dumps(Recipe.load(folder / "recipe.toml").table() | entries))


SPOILT: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "another teacher": (lambda lone: change(lone[1], teacher="other"), r"student-1: teacher.*allowed: teacher"),
    "another data set": (lambda lone: change(lone[1], data="other"), "student-1: data"),
    "other times": (lambda lone: change(lone[1], step_times={1: [998.0]}), "student-1: step_times"),
    "another sampler": (lambda lone: change(lone[1], sampler="ddim"), "student-1: sampler"),
    "other labels": (lambda lone: change(lone[1], labels=[f"x{i}" for i in range(24)]), "student-1: labels"),
    "another method": (lambda lone: change(lone[1], method="dmd2"), "a folder of dmd2"),
    "no share": (lambda lone: change(lone[1], shares=[]), "one student of a share"),
    "a share twice": (
        lambda lone: change(lone[1], shares=[[*SECOND, 11]]),
        "shares.*no class of .*student-0",
    ),
    "a class missing": (lambda lone: change(lone[1], shares=[SECOND[1:]]), "also of yellow circle"),
    "a student missing": (lambda lone: lone.pop(), "also of yellow circle"),
    "another recipe": (lambda lone: change_recipe(lone[1], train={"seed": 1}), r"recipe.toml: got \['train'\]"),
    "nobody": (lambda lone: lone.clear(), "folders"),
}


@pytest.mark.parametrize("why", SPOILT)
def test_folders_that_do_not_belong_together_are_refused_by_name(why: str, lone: list[Path], tmp_path: Path) -> None:
    spoil, named = SPOILT[why]
    spoil(lone)
    with pytest.raises(BadInput, match=named):
        merge(lone, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_students_and_their_teacher_are_never_the_merged_folder(lone: list[Path]) -> None:
    for out in (lone[0], Path(str(Recipe.load(lone[0] / "recipe.toml").teacher))):
        with pytest.raises(BadInput, match=r"out: .*that is read"):
            merge(lone, out)


def test_students_are_merged_in_any_order_by_the_command(lone: list[Path], made: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["merge", *map(str, reversed(lone)), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0 and "2 students" in done.output, done.output
    assert Info.read(tmp_path / "merged") == Info.read(made)  # digests and all


def test_a_merged_folder_is_nobodys_start(made: Path, teacher: Teacher) -> None:
    with pytest.raises(BadInput, match="one network"):
        Teacher.from_pretrained(made)
    with pytest.raises(BadInput, match=r"start.*one network"):
        MultiStudent(start=str(made)).networks(teacher)
    assert MultiStudent(network=None, start=None).networks(teacher)["student"]


# --- a lone student


def test_a_lone_student_draws_its_share_and_nothing_else(made: Path, tmp_path: Path) -> None:
    place = students_of(made)[1]
    generator = Generator.from_pretrained(place)
    assert generator.sample([0, 1], labels=[12, 23]).shape == (2, 3, 8, 8)
    for label in (0, 11, 24, -1):
        with pytest.raises(BadInput, match=r"12 to 23, the share of pair-student-1"):
            generator.sample([0], labels=[label])
    scattered = replace(generator.info, shares=[[12, 15, 20]])
    assert scattered.condition(generator.codec).choices == "12, 15, 20, the share of pair-student-1"
    runner, out = CliRunner(), str(tmp_path / "x.png")
    assert runner.invoke(cli.app, ["generate", str(place), "--n", "3", "--device", "cpu", "--out", out]).exit_code == 0
    refused = runner.invoke(cli.app, ["generate", str(place), "--label", "red circle", "--out", out])
    assert isinstance(refused.exception, BadInput) and refused.exception.field == "labels"
    test, train = held_out(place)
    assert {*test.items(range(20))["label"].tolist(), *train.items(range(20))["label"].tolist()} <= set(SECOND)
    draw_rows({"student": (generator, 1)}, None, tmp_path / "rows.png")


def test_a_job_of_one_student_is_named_after_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pair.toml").write_text(tomli_w.dumps(plan(root).table()))
    monkeypatch.chdir(tmp_path)
    command = ["distill", "pair.toml", "multi_student.student=1", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    folder = tmp_path / "weights" / "pair-student-1"
    assert Info.read(folder).name == "pair-student-1" and (folder / "unet").is_dir()
    assert Recipe.load(folder / "recipe.toml").named().name == "pair-student-1"  # and made again, it is the same
    assert plan(root).named().name == "pair" and plan(root, students=1, student=0).named().name == "pair"
    elsewhere = tmp_path / "weights" / "other-data"
    shutil.copytree(folder, elsewhere / "training" / "student-1")
    with pytest.raises(BadInput, match="another recipe"):  # of another recipe's job
        distill(Recipe.from_table(plan(root).table() | {"name": "other"}), elsewhere, "cpu")


def test_what_is_finished_is_not_made_again(made: Path, root: Path) -> None:
    places = students_of(made)
    before = [(place / "fewstep.json").stat().st_mtime_ns for place in places]
    distill(plan(root), made, "cpu")
    assert [(place / "fewstep.json").stat().st_mtime_ns for place in places] == before


@pytest.mark.process
@pytest.mark.slow
def test_killed_midway_the_same_command_ends_with_the_same_folder(root: Path, tmp_path: Path) -> None:
    train = {**TRAIN, "iterations": 40, "checkpoint_every": 5}
    recipe = Recipe.from_table(plan(root).table() | {"train": train})
    (tmp_path / "pair.toml").write_text(tomli_w.dumps(recipe.table()))
    command = [sys.executable, "-m", "distillers.cli", "distill", str(tmp_path / "pair.toml"), "--device", "cpu"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        process = Popen([*command, "--out", str(killed)], env=environment, stdout=log, stderr=log)
        second = killed / "training" / "student-1" / "training" / "checkpoints"
        while not list(second.glob("[0-9]*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (students_of(killed)[0] / "fewstep.json").is_file(), (tmp_path / "log").read_text()
    assert not (killed / "fewstep.json").exists()
    distill(recipe, killed, "cpu")
    distill(recipe, tmp_path / "whole", "cpu")
    assert Info.read(killed).sha256 == Info.read(tmp_path / "whole").sha256


# --- served


@pytest.fixture(scope="module")
def client(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    served = tmp_path_factory.mktemp("served")
    both = dark_and_bright(teacher)
    both.save_pretrained(served / "both")
    alone: Any = both.denoiser
    info = replace(both.info, name="bright", shares=[SECOND])
    Generator(alone.students[1], teacher.codec, info).save_pretrained(served / "bright")
    with TestClient(create_app(Settings(weights=served, device="cpu")), raise_server_exceptions=False) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


def test_every_class_is_drawn_by_its_student(client: TestClient) -> None:
    answer = client.post(GENERATE, json={"model": "both", "n": 9, "seed": 3})
    labels = [item["label"] for item in answer.json()["data"]]
    names = client.get("/v1/models/both").json()["labels"]
    bright = [bool(picture.mean() > 128) for picture in pictures(answer)]
    assert bright == [names.index(label) >= 12 for label in labels] and 0 < sum(bright) < 9
    for label in (0, 11, 12, 23):
        (picture,) = pictures(client.post(GENERATE, json={"model": "both", "label": label, "seed": 1}))
        assert (picture.mean() > 128) == (label >= 12)


def test_one_pass_is_of_one_student(client: TestClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        with engine_held(client):
            asked = [
                pool.submit(client.post, GENERATE, json={"model": "both", "label": label, "seed": label})
                for label in (1, 13, 2, 14, 3, 15)
            ]
            wait_until_waiting(client, 6)
        timings = [order.result().json()["timings"] for order in asked]
    assert [timing["batch"] for timing in timings] == [3] * 6


def test_the_list_of_models_tells_the_students(client: TestClient, teacher: Teacher) -> None:
    about = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
    one = sum(p.numel() for p in teacher.denoiser.parameters()) * 4 / 2**20
    assert (about["both"]["students"], about["both"]["shares"]) == (2, [FIRST, SECOND])
    assert (about["bright"]["students"], about["bright"]["shares"]) == (1, [SECOND])
    assert about["both"]["parameters_mb"] == pytest.approx(2 * one, abs=2e-3)
    assert about["bright"]["parameters_mb"] == pytest.approx(one, abs=2e-3)


def test_a_lone_student_is_served_for_its_share(client: TestClient) -> None:
    for body, field in (({"label": 3}, "label"), ({"prompt": "red circle"}, "prompt")):
        refused = error_of(client.post(GENERATE, json={"model": "bright", **body}), 400)
        assert refused["param"] == field and "yellow circle" in refused["message"]
    answer = client.post(GENERATE, json={"model": "bright", "n": 8, "seed": 0})
    assert {item["label"].split()[0] for item in answer.json()["data"]} <= {"yellow", "magenta", "cyan"}
    assert all(picture.mean() > 128 for picture in pictures(answer))


# --- which small student


def test_agreement_is_1_for_the_same_and_its_rotation_and_0_for_strangers() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 20, generator=rng), torch.randn(50, 300, generator=rng)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=rng)).Q
    assert linear_cka(a, a) == pytest.approx(1, abs=1e-9)
    assert linear_cka(a, 3 * a @ rotation + 7) == pytest.approx(1, abs=1e-5)
    assert linear_cka(a, b) == pytest.approx(linear_cka(b, a)) and abs(linear_cka(a, b)) < 0.15
    assert 0.3 < linear_cka(a, a + torch.randn(50, 20, generator=rng)) < 0.9
    assert linear_cka(a, torch.ones(50, 3)) == 0
    plain = [linear_cka(torch.randn(40, 400), torch.randn(40, 400)) for _ in range(20)]
    assert abs(float(np.mean(plain))) < 0.05  # the biased estimate gives 0.9 here


def test_the_teachers_own_copy_would_agree_fully(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    network = teacher.denoiser.network
    monkeypatch.setattr("distillers.jobs.suggest.rebuilt", lambda *_: copy.deepcopy(network))
    (same,) = suggest(teacher, candidates=1)
    assert same.agreement == pytest.approx(1, abs=1e-6) and same.spread < 1e-6


def test_candidates_get_smaller_and_the_budget_is_kept(teacher: Teacher) -> None:
    found = suggest(teacher)
    assert [c.agreement for c in found] == sorted((c.agreement for c in found), reverse=True)
    assert all(0 <= c.spread < 1 and -0.2 < c.agreement < 1 for c in found)
    sizes = {c.parameters for c in found}
    assert len(sizes) == len(found) > 1 and found[0].line in table(found, teacher)
    for budget in (min(c.latency_ms for c in found) / 1e3, 1e6):
        again = suggest(teacher, budget_ms=budget)
        within = [c for c in again if c.latency_ms <= budget]
        assert again[: len(within)] == within and len(within) in (0, len(again))
        assert ("None is within" in table(again, teacher, budget)) == (not within)
    for wrong in ({"budget_ms": 0.0}, {"candidates": 0}):
        with pytest.raises(BadInput):
            suggest(teacher, **wrong)  # type: ignore[arg-type]


def test_the_line_goes_into_a_recipe(root: Path, teacher: Teacher) -> None:
    import tomllib

    for candidate in suggest(teacher):
        method = MultiStudent(**tomllib.loads(candidate.line))
        student = method.networks(teacher)["student"]
        assert sum(p.numel() for p in student.parameters()) == candidate.parameters
    runner = CliRunner()
    done = runner.invoke(cli.app, ["suggest-student", str(root / "teacher"), "--candidates", "2", "--device", "cpu"])
    assert done.exit_code == 0 and "A hint, not a promise" in done.output, done.output


def test_a_transformer_is_made_smaller_by_depth_and_heads(teacher: Teacher) -> None:
    drawn = transformer(student_info(teacher, labels=["a", "b", "c"]))
    denoiser: Any = drawn.denoiser
    assert variants(denoiser.network) == [{}, {"num_attention_heads": 1}]
    config = {**denoiser.network.config, "num_layers": 8, "num_attention_heads": 4}
    deep: Any = SimpleNamespace(config=SimpleNamespaceConfig(config))
    assert {"num_layers": 4} in variants(deep) and {"num_layers": 2, "num_attention_heads": 1} in variants(deep)
    of = Teacher(denoiser, drawn.codec, replace(drawn.info, guidance_scale=1.0))
    assert {c.line for c in suggest(of)} == {'start = "untrained"', "network = { num_attention_heads = 1 }"}
    with pytest.raises(BadInput, match="UNet2DModel or"):
        variants(SimpleNamespace(config=SimpleNamespaceConfig({})))  # type: ignore[arg-type]


class SimpleNamespaceConfig(dict):
    """A diffusers config: keys are attributes, too."""

    __getattr__ = dict.__getitem__


def test_the_shipped_recipe_is_one() -> None:
    recipe = Recipe.load("shapes-multi-student")
    method = recipe.distiller()
    assert isinstance(method, MultiStudent) and method.students == 2 and method.matched == 0.3
