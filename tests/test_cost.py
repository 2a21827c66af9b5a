"""The passes of one iteration, counted on real networks: which there were, how each went, and that they play again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import NETWORK

from distillers import methods
from distillers.benchmarks.training import Pass, measure, record_passes, table
from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.inputs import load_teacher
from distillers.jobs.recipe import Recipe
from distillers.methods.consistency import Consistency
from distillers.models.codec import PixelUnshuffle
from distillers.models.guidance import embed_guidance
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Networks, Turn
from distillers.training.settings import TrainSettings
from distillers.training.trainer import begin
from distillers.weights.manifest import Info

TEACHER: dict[str, Any] = {
    "name": "tiny-teacher",
    "method": "diffusion",
    "data": {"kind": "shapes", "size": 8},
    "model": {"task": "class-to-image", "network": NETWORK},
}
Iteration = Callable[[Networks, Batch], Tensor]


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


@pytest.fixture(scope="module")
def teacher(data: ImageData) -> Teacher:
    made = load_teacher(Recipe.from_table(TEACHER), data)
    made.denoiser.eval().requires_grad_(False)
    return made


@dataclass(frozen=True, kw_only=True)
class Plain(Consistency):
    """Whatever a test wants to see counted, as the student's turn."""

    loss: Iteration

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        yield "student", self.loss(nets, batch)


def passes_of(method: Consistency, teacher: Teacher, data: ImageData, **changes: Any) -> list[Pass]:
    settings = TrainSettings(**{"iterations": 4, "batch": 4, **changes})
    run = begin(method, teacher, settings, Path("nowhere"), device="cpu")
    with record_passes(run.nets) as passes:
        run.iteration(2, data)
    for one in passes:
        one.replay()
    with record_passes(run.nets) as again:
        pass
    assert not again and not any("features" in vars(net) for net in run.nets.modules()), "nothing stays behind"
    return passes


def kinds(passes: list[Pass]) -> dict[str, int]:
    return dict(Counter(one.kind for one in passes))


@pytest.mark.parametrize("anchored", [0.0, 0.25])
@pytest.mark.parametrize(("solver", "forward"), [("heun", 3), ("ddim", 2)])
def test_consistency_is_teacher_target_and_student(
    solver: Any, forward: int, anchored: float, teacher: Teacher, data: ImageData
) -> None:
    """Two more calls of the teacher, on a quarter of the batch, where it anchors what has little noise."""
    passes = kinds(passes_of(Consistency(solver=solver, anchored=anchored), teacher, data))
    assert passes == {"forward": forward + 2 * bool(anchored), "forward+backward": 1}


def test_accumulation_takes_every_pass_once_a_part(teacher: Teacher, data: ImageData) -> None:
    passes = passes_of(Consistency(solver="ddim"), teacher, data, accumulation=2)
    assert kinds(passes) == {"forward": 4, "forward+backward": 2}


def test_a_needless_pass_is_counted_and_played_too(teacher: Teacher, data: ImageData) -> None:
    def loss(nets: Networks, batch: Batch) -> Tensor:
        t = torch.full((len(batch["x0"]),), 300.0)
        cond = {"label": batch["label"]}
        for _ in range(2):  # once would do
            x0 = nets["teacher"](batch["x0"], t, cond)
        nets["student"](batch["x0"], t, cond)  # with a graph that nobody asks
        return (nets["student"](batch["x0"], t, cond) - x0).square().mean()

    passes = passes_of(Plain(loss=loss), teacher, data)
    assert [one.kind for one in passes] == ["forward", "forward", "forward", "forward+backward"]


def test_a_gradient_to_the_input_alone_is_one(teacher: Teacher, data: ImageData) -> None:
    def loss(nets: Networks, batch: Batch) -> Tensor:
        t, cond = torch.full((len(batch["x0"]),), 300.0), {"label": batch["label"]}
        return nets["teacher"](nets["student"](batch["x0"], t, cond), t, cond).square().mean()

    passes = passes_of(Plain(loss=loss), teacher, data)
    assert [one.kind for one in passes] == ["forward+backward", "forward+backward to the input"]


def test_an_encoder_is_a_pass_that_ended_early(teacher: Teacher, data: ImageData) -> None:
    reached: list[nn.Module] = []

    def loss(nets: Networks, batch: Batch) -> Tensor:
        t, cond = torch.full((len(batch["x0"]),), 300.0), {"label": batch["label"]}
        last = nets["teacher"].network.conv_out
        if not reached:
            last.register_forward_hook(lambda module, *_: reached.append(module))
        (real,) = nets["teacher"].features(batch["x0"], t, cond, ["mid_block"])
        made = nets["student"](batch["x0"], t, cond)
        (fake,) = nets["teacher"].features(made, t, cond, layers=["mid_block"])
        return (fake - real).square().mean()

    passes = passes_of(Plain(loss=loss), teacher, data)
    assert [one.kind for one in passes] == ["features", "forward+backward", "features+backward to the input"]
    assert not reached, "played again, an encoder still stops where it stopped"


def test_a_forward_derivative_is_one(teacher: Teacher, data: ImageData) -> None:
    def loss(nets: Networks, batch: Batch) -> Tensor:
        x, t, cond = batch["x0"], torch.full((len(batch["x0"]),), 300.0), {"label": batch["label"]}
        with torch.no_grad():
            value, slope = torch.func.jvp(lambda x, t: nets["student"](x, t, cond), (x, t), (x, torch.ones_like(t)))
        return (nets["student"](x, t, cond) - value - slope).square().mean()

    passes = passes_of(Plain(loss=loss), teacher, data)
    assert [one.kind for one in passes] == ["jvp", "forward+backward"]
    assert len(passes[0].tangents) == 2


def test_a_pass_is_played_with_its_own_guidance_and_precision(teacher: Teacher, data: ImageData) -> None:
    dtypes: list[torch.dtype] = []

    @dataclass(frozen=True, kw_only=True)
    class Told(Plain):
        def networks(self, teacher: Teacher) -> Networks:
            nets = super().networks(teacher)
            embed_guidance(nets["student"].network)
            nets["student"].network.conv_in.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
            return nets

    def loss(nets: Networks, batch: Batch) -> Tensor:
        first = {k: v[:1] for k, v in batch.items()}
        t = torch.tensor(300.0)
        told = nets["student"](batch["x0"], t, {"label": batch["label"], "guidance": torch.full((4,), 3.0)})
        alone = nets["student"](first["x0"], t, {"label": first["label"], "guidance": torch.full((1,), 3.0)})
        return told.square().mean() + alone.square().mean()

    passes = passes_of(Told(loss=loss), teacher, data, precision="bf16")
    assert [len(one.scales[0][1]) for one in passes] == [4, 1]
    assert dtypes == [torch.bfloat16] * 4


class Paired:
    """Shapes with a grey copy for SAR."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def draw(self, n: int, rng: Any) -> Batch:
        batch = self.data.draw(n, rng)
        return {**batch, "sar": batch["image"].mean(1, keepdim=True)}


@pytest.mark.parametrize("name", [name for name in methods.names() if name != "autoencoder"])
def test_every_method_is_written_down_and_plays_again(name: str, data: ImageData) -> None:
    kind = methods.find(name)
    task = "class-to-image" if "class-to-image" in kind.tasks else kind.tasks[0]
    labels, sar = (list(data.labels), None) if task == "class-to-image" else ([], {"channels": 1})
    info = Info(
        name="tiny", task=task, method="diffusion", role="teacher", data="shapes", sampler="ddim", size=(8, 8),
        labels=labels, sar=sar,
    )  # fmt: skip
    teacher = Teacher.random(info, NETWORK, {"name": "vp"}, "v", PixelUnshuffle(1))
    teacher.denoiser.eval().requires_grad_(False)
    for precision in ("no", "bf16"):
        settings = TrainSettings(iterations=10, batch=4, precision=precision)
        run = begin(kind(), teacher, settings, Path("nowhere"), device="cpu")
        for i in (0, 5, 9):
            with record_passes(run.nets) as passes:
                run.iteration(i, Paired(data))
            assert any("+backward" in one.kind for one in passes), "somebody learns"
            for one in passes:
                one.replay()


@pytest.fixture
def recipe(teacher: Teacher, tmp_path: Path) -> Path:
    Generator(teacher.denoiser, teacher.codec, teacher.info).save_pretrained(tmp_path / "tiny-teacher")
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'name = "tiny"\nmethod = "consistency"\nteacher = "{tmp_path / "tiny-teacher"}"\n'
        '[data]\nkind = "shapes"\nsize = 8\n[train]\niterations = 20\nbatch = 4\n'
    )
    return file


def test_a_recipe_is_measured_where_it_is_asked_to(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    step = Consistency.step
    monkeypatch.setattr(
        Consistency, "step", lambda self, nets, batch, at: (asked.append(at), step(self, nets, batch, at))[1]
    )
    said = measure(Recipe.load(recipe), iterations=2, progress=0.5, device="cpu")
    assert asked == [0.5] * 5
    assert (said.recipe, said.method, said.batch, said.iterations) == ("tiny", "consistency", 4, 2)
    assert said.passes == {"forward": 3, "forward+backward": 1}
    assert said.ratio == pytest.approx(said.iteration_ms / said.bare_ms) and said.bare_ms > 0
    assert json.loads(json.dumps(asdict(said)))["setting"]["torch"] == torch.__version__
    text = table([said, said])
    assert text.count("| tiny | consistency | 4 | no | 3 forward, 1 forward+backward |") == 2 and "0.5 of" in text
    measure(Recipe.load(recipe), iterations=1, progress=1.0, device="cpu")
    assert asked[-1] == 19 / 20, "the last iteration there is"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the path")
@pytest.mark.slow
def test_compiled_networks_are_timed_against_compiled_passes(recipe: Path) -> None:
    said = measure(Recipe.load(recipe), iterations=2, progress=0.9, device="cpu", compiled=True)
    assert said.execution == "compiled" and "Networks run compiled." in table([said])
    assert said.passes == {"forward": 3, "forward+backward": 1} and said.bare_ms > 0


def test_networks_that_compute_otherwise_when_compiled_are_not_timed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: nn.Module, **_: Any) -> None:  # what inductor makes of some networks: a part gets no gradient
        monkeypatch.setattr(
            network, "_compiled_call_impl", lambda *a, **k: network._call_impl(a[0].detach() * 0, *a[1:], **k)
        )

    monkeypatch.setattr(nn.Module, "compile", wrong)
    with pytest.raises(
        BadInput, match=r"compiled: got True; allowed: networks that compute the same .* but the student"
    ):
        measure(Recipe.load(recipe), iterations=1, progress=0.9, device="cpu", compiled=True)


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"progress": 1.5}])
def test_measuring_nothing_is_refused(wrong: dict[str, Any], recipe: Path) -> None:
    with pytest.raises(BadInput, match="iterations, progress"):
        measure(Recipe.load(recipe), **{"iterations": 1, "progress": 0.9, **wrong})
