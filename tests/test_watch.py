"""The watch over a training: figures on held-out data, the best averages kept, and publishing as it stands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import TINY, Breaks

from distillers.errors import BadInput, TrainingStopped
from distillers.generator import Generator
from distillers.jobs.distill import distill, publish_run
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.training.settings import TrainSettings
from distillers.training.trainer import train
from distillers.training.watch import Watch, best_iteration, history

TRAIN = {
    "iterations": 6, "batch": 4, "warmup": 1, "samples": 2, "checkpoint_every": 2, "watch_every": 2,
    "watch_samples": 132, "watch_steps": 1, "publish": "best", "ema": 0.5, "learning_rate": 1e-2,
}  # fmt: skip
WATCHED: dict[str, Any] = {**TINY, "name": "watched", "train": TRAIN, "data": {"kind": "shapes", "size": 8}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with its watch."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    distill(Recipe.from_table(WATCHED), out, "cpu")
    return out


def weights_of(folder: Path) -> list[torch.Tensor]:
    return list(Generator.from_pretrained(folder).denoiser.parameters())


def test_every_measurement_is_written_down(run: Path) -> None:
    found = history(run / "training")
    assert [entry["iteration"] for entry in found] == [2, 4, 6]
    assert all(entry["frechet"] > 0 and entry["n"] == 132 and entry["steps"] == 1 for entry in found)
    events = EventAccumulator(str(next((run / "training" / "logs").rglob("events*"))).rsplit("/", 1)[0])
    events.Reload()
    assert [round(e.value, 3) for e in events.Scalars("watch/frechet")] == [round(e["frechet"], 3) for e in found]
    assert events.Tags()["images"]


def test_the_best_averages_are_what_is_published(run: Path, tmp_path: Path) -> None:
    best = torch.load(run / "training" / "best.pt", weights_only=True)["student"]
    published = Generator.from_pretrained(run).denoiser.state_dict()
    assert all(torch.equal(best[name].half().float(), value.float()) for name, value in published.items())
    assert best_iteration(run / "training") == min(history(run / "training"), key=lambda e: e["frechet"])["iteration"]


def test_a_run_is_published_as_it_stands(run: Path, tmp_path: Path) -> None:
    """From its newest checkpoint; the recipe and the card say at which iteration that was."""
    said = publish_run(run, tmp_path / "watched", "last")
    assert said == "the averages of iteration 6 of 6"
    publish_run(run / "training", tmp_path / "best", "best")
    state = torch.load(run / "training" / "checkpoints" / "00000006" / "state.pt", weights_only=True)
    last = state["averages"]["student"]
    published = Generator.from_pretrained(tmp_path / "watched").denoiser.state_dict()
    assert all(torch.equal(last[name].half().float(), value.float()) for name, value in published.items())
    assert Recipe.load(tmp_path / "watched" / "recipe.toml").name == "watched"
    assert "published at iteration 6 of 6" in (tmp_path / "watched" / "README.md").read_text()
    for ours, theirs in zip(weights_of(run), weights_of(tmp_path / "best"), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_published_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run: got .*training with a checkpoint"):
        publish_run(tmp_path, tmp_path / "out")
    with pytest.raises(BadInput, match="which"):
        publish_run(run, tmp_path / "out", "newest")
    unwatched = Recipe.from_table(
        {**WATCHED, "train": {k: v for k, v in TRAIN.items() if "wa" not in k and k != "publish"}}
    )
    distill(unwatched, tmp_path / "plain", "cpu")
    with pytest.raises(BadInput, match="no watched weights"):
        publish_run(tmp_path / "plain", tmp_path / "out", "best")


def test_a_measurement_made_again_replaces_the_first(run: Path, tmp_path: Path) -> None:
    """A resumed run repeats the iterations after its last checkpoint."""
    generator, data = Generator.from_pretrained(run), load_data(Recipe.from_table(WATCHED))
    (tmp_path / "watch.jsonl").write_text(
        "".join(json.dumps({"iteration": i, "frechet": f}) + "\n" for i, f in ((1, 1e9), (2, 0.0), (3, 0.0)))
    )
    figures, best = Watch(data, 132, 1, tmp_path).measure(generator, 2)
    assert best and [entry["iteration"] for entry in history(tmp_path)] == [1, 2]
    assert history(tmp_path)[-1]["frechet"] == figures["frechet"]


def test_weights_that_are_no_numbers_stop_the_run_before_they_draw(tmp_path: Path) -> None:
    recipe = Recipe.from_table(WATCHED)
    data = load_data(recipe)
    chosen = replace(recipe.settings(), watch_every=4, log_every=100, checkpoint_every=100)
    with pytest.raises(TrainingStopped, match="the loss of student is not finite"):
        train(Breaks(how="loss"), load_teacher(recipe, data), data, chosen, tmp_path, device="cpu")
    assert not history(tmp_path)


def test_too_few_pictures_are_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train.watch_samples: got 100.*more than the 128 features"):
        distill(Recipe.from_table({**WATCHED, "train": {**TRAIN, "watch_samples": 100}}), tmp_path / "out", "cpu")
    assert not list(tmp_path.rglob("state.pt"))
    with pytest.raises(BadInput, match=r"train.publish"):
        TrainSettings(publish="best")


def test_the_command_publishes(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from distillers.cli import app

    said = CliRunner().invoke(app, ["publish", str(run), str(tmp_path / "watched"), "--which", "best"])
    assert said.exit_code == 0 and "the averages of iteration" in said.output
    assert (tmp_path / "watched" / "fewstep.json").is_file()


def test_a_translator_is_watched_beside_its_sar_and_the_real_pictures(tmp_path: Path) -> None:
    rng, pairs = np.random.default_rng(0), tmp_path / "pairs"
    for name, split in enumerate(("train", "test")):
        for kind, shape in (("sar", (8, 8)), ("opt", (8, 8, 3))):
            (pairs / split / kind).mkdir(parents=True)
            Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(pairs / split / kind / f"{name}.png")
    table = {
        **TINY, "data": {"kind": "pairs", "path": str(pairs), "size": 8},
        "model": {**TINY["model"], "task": "sar-to-optical"},
        "train": {"iterations": 1, "batch": 1, "samples": 1, "tracker": "none"},
    }  # fmt: skip
    recipe = Recipe.from_table(table)
    data = load_data(recipe)
    train(recipe.distiller(), load_teacher(recipe, data), data, recipe.settings(), tmp_path / "run", device="cpu")
    sheet = np.asarray(Image.open(tmp_path / "run" / "samples" / "000001.png").convert("RGB"))
    sar, real = (np.asarray(Image.open(pairs / "train" / kind / "0.png").convert("RGB")) for kind in ("sar", "opt"))
    height, left = sheet.shape[0] // 3, 2  # each row under its name; a gap of 2 about a picture
    for row, shown in ((0, sar), (2, real)):
        bottom = (row + 1) * height - 2
        np.testing.assert_allclose(sheet[bottom - 8 : bottom, left : left + 8].astype(int), shown, atol=1)
