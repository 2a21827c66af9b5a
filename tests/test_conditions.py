"""What SAR becomes at a network's input: pixels, levels, presence, calibration; and what old folders are given."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draw_with_diffusers import condition, draw_with_parts, ramp
from torch.nn import functional as F

from distillers.data import open_data, read_sar
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.jobs.suggest import diffused_inputs
from distillers.models import conditions
from distillers.models.codec import PixelUnshuffle
from distillers.models.radiometry import AMPLITUDE, SENTINEL1, SENTINEL1_DB, Levels, Radiometry
from distillers.sar.options import SceneOptions
from distillers.sar.translate import translate
from distillers.teacher import Teacher
from distillers.training.trainer import train
from distillers.weights.manifest import MANIFEST, Info

ROOT = Path(__file__).parents[1]
NETWORK = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def seen(**more: Any) -> Radiometry:
    """One band, with what is asked for."""
    one = {"channels": 1 + more.get("calibrated", False), "bands": ["VV"]}
    return Radiometry.of(SENTINEL1_DB.to_dict() | one | more)


def test_the_level_of_an_even_picture_is_known_by_hand() -> None:
    """pi/2 m, pi m and 2 pi m of m = 0.5."""
    sar = torch.full((2, 1, 12, 8), 0.5)
    told = conditions.encode_sar(sar, seen(levels={"cells": [3, 5], "frequencies": 3}), PixelUnshuffle(4))
    assert told.shape == (2, 16 + 2 * 2 * 3 + 1, 3, 2)
    sines, cosines = [0.5**0.5, 1, 0], [0.5**0.5, 0, -1]
    expected = [0.5] * 16 + (sines + cosines) * 2 + [1]
    torch.testing.assert_close(told, torch.tensor(expected)[None, :, None, None].expand_as(told), atol=1e-6, rtol=0)


def test_a_window_counts_only_what_lies_inside_the_picture() -> None:
    cells = torch.linspace(-1, 1, 30).reshape(1, 1, 5, 6)
    sar = F.interpolate(cells, scale_factor=2)  # two pixels a cell
    told = conditions.encode_sar(sar, seen(levels={"cells": [3], "frequencies": 1}), PixelUnshuffle(2))
    means = torch.asin(told[0, 4]) / (torch.pi / 2)  # the lowest frequency is monotone over [-1, 1]
    for row, column in ((0, 0), (0, 3), (4, 5), (2, 2)):
        inside = cells[0, 0, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert float(means[row, column]) == pytest.approx(float(inside.mean()), abs=1e-5)


def test_a_window_may_be_larger_than_the_picture() -> None:
    sar = torch.rand(1, 1, 8, 8) - 0.5
    told = conditions.encode_sar(sar, seen(levels={"cells": [17], "frequencies": 1}), PixelUnshuffle(4))
    torch.testing.assert_close(told[0, 16], torch.sin(torch.pi / 2 * sar.mean()).expand(2, 2))


def test_a_band_that_is_missing_is_told_from_one_of_the_middle_level() -> None:
    sar = torch.full((2, 3, 8, 8), 1e-9)
    sar[0, 1] = 0  # the first picture has no VH
    told = conditions.encode_sar(sar, SENTINEL1, PixelUnshuffle(4))
    assert told[:, -3:-1, 0, 0].tolist() == [[1, 0], [1, 1]]


def test_the_plane_of_calibration_comes_last_and_is_no_band() -> None:
    sar = torch.zeros(1, 3, 8, 8)
    sar[:, 2] = -1
    told = conditions.encode_sar(sar, SENTINEL1, PixelUnshuffle(4))
    assert (told[:, -1] == -1).all() and (told[:, :-1] >= 0).all()


@pytest.mark.parametrize("described", [None, {"channels": 2, "range": [-1, 1]}, SENTINEL1_DB.to_dict()])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_manifest_that_says_nothing_of_levels_gives_pixels_alone(described: Any, factor: int) -> None:
    own, codec = Radiometry.of(described), PixelUnshuffle(factor)
    sar = torch.rand(2, own.channels, 8, 8)
    assert torch.equal(conditions.encode_sar(sar, own, codec), codec.encode(sar))
    assert not set(own.to_dict()) & {"levels", "calibrated"}


@pytest.mark.parametrize(
    ("own", "count"),
    [
        (AMPLITUDE, 16),
        (SENTINEL1_DB, 32),
        (SENTINEL1, 32 + 2 * 24 + 2 + 1),
        (replace(SENTINEL1, levels=None), 32 + 1),
        (replace(AMPLITUDE, levels=Levels(cells=(1,), frequencies=2)), 16 + 4 + 1),
    ],
)
def test_the_channels_are_counted_as_they_are_made(own: Radiometry, count: int) -> None:
    codec = PixelUnshuffle(4)
    assert conditions.sar_channels(own, codec) == count
    sar = torch.rand(1, own.channels, 16, 8) * 2 - 1
    told = conditions.encode_sar(sar, own, codec)
    assert told.shape == (1, count, 4, 2)
    assert torch.allclose(told, condition(sar, own.to_dict(), 4), atol=1e-6)  # as written down for stock diffusers


def test_the_local_level_survives_group_normalisation() -> None:
    """Two even grounds in one tile, then each alone: what a group's mean leaves of the pixels, and of the level."""
    norm = torch.nn.GroupNorm(1, 16)
    grounds = [torch.full((1, 1, 32, 32), m) for m in (-0.8, 0.2)]
    told = [
        conditions.encode_sar(sar, seen(levels={"cells": [5], "frequencies": 4}), PixelUnshuffle(4)) for sar in grounds
    ]
    pixels, levels = ([norm(F.pad(t[:, part], (0,) * 5 + (16 - t[:, part].shape[1],))) for t in told] for part in (
        slice(0, 16), slice(16, 24),
    ))  # fmt: skip
    assert torch.allclose(*pixels, atol=1e-3) and (levels[0] - levels[1]).abs().max() > 0.5


# --- from pairs to a folder to a scene


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A tiny translator of radiometry "sentinel1", trained for a moment by the shipped teacher's recipe, saved."""
    from folders import save_pair

    root = tmp_path_factory.mktemp("pairs")
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        save_pair(root / f"{split}/sar/{name}.png", root / f"{split}/opt/{name}.png", ord(name), 64)
    table = json.loads(json.dumps(Recipe.load("sar-optical-128-teacher").table()))
    table["data"] |= {"size": 32, "balance": 2, "sources": [{"path": str(root), "bands": "VH"}]}
    table["model"]["network"] = NETWORK
    table["train"] |= {"iterations": 3, "batch": 4, "tracker": "none", "sample_every": 0, "precision": "no"}
    table["train"] |= {"watch_every": 0, "publish": "last"}  # there are too few pictures to measure
    table["diffusion"]["sampling_steps"] = 2
    recipe = Recipe.from_table(table)
    data = load_data(recipe)
    made = train(recipe.distiller(), load_teacher(recipe, data), data, recipe.settings(), root / "run", device="cpu")
    made.save_pretrained(root / "made")
    return recipe, root / "made"


def test_a_folder_with_levels_opens_as_it_was_saved(trained: tuple[Recipe, Path]) -> None:
    recipe, folder = trained
    teacher, data = Teacher.from_pretrained(folder), load_data(recipe)
    assert Radiometry.of(teacher.info.sar) == SENTINEL1
    x0, cond = teacher.example()
    encoded = teacher.encode_batch(data.draw(2, np.random.default_rng(0)), "cpu")
    assert cond and cond["sar"].shape[1:] == encoded["sar"].shape[1:] == (83, *x0.shape[-2:])
    told = diffused_inputs(teacher, torch.device("cpu"))[0][2]
    assert told and told["sar"].shape[1] == 83 and told["sar"][:, 32:-1].abs().max() <= 1


def test_stock_diffusers_draws_a_folder_with_levels(trained: tuple[Recipe, Path]) -> None:
    generator, about = Generator.from_pretrained(trained[1]), json.loads((trained[1] / MANIFEST).read_text())
    ours = generator.sample([0, 1], sar=ramp(generator.info.sar_channels, *generator.info.size), steps=2)
    theirs = torch.from_numpy(draw_with_parts(trained[1], about, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-3, rtol=0)


def test_levels_and_calibration_change_what_is_drawn(trained: tuple[Recipe, Path]) -> None:
    generator = Generator.from_pretrained(trained[1])
    torch.manual_seed(0)
    sar = torch.rand(1, 3, 32, 32) * 0.2
    sar[:, 2] = -1
    brighter, absolute = sar.clone(), sar.clone()
    brighter[:, :2] += 0.5
    absolute[:, 2] = 1
    pictures = [generator.sample([0], sar=one) for one in (sar, brighter, absolute)]
    assert all(not torch.allclose(pictures[0], other, atol=1e-4) for other in pictures[1:])


def test_a_picture_of_any_size_is_translated_and_looked_at(trained: tuple[Recipe, Path], tmp_path: Path) -> None:
    generator = Generator.from_pretrained(trained[1])
    file = sorted((trained[1].parent / "test/sar").iterdir())[0]
    sar = read_sar(file, SENTINEL1, "VV")
    assert sar.shape[1] == 3 and (sar[:, 1] == 0).all() and (sar[:, 2] == -1).all()
    assert generator.translate(sar[..., :50, :37]).shape == (1, 3, 50, 37)
    picture, band = SENTINEL1.to_picture(sar[0].numpy())
    assert band == "VV" and np.abs(SENTINEL1.from_picture(picture, band) - sar[0].numpy()).max() < 1e-3
    assert generator.condition.pictures({"sar": sar})["SAR"].shape == (1, 1, 64, 64)


@pytest.mark.parametrize(("units", "plane"), [("db", 1), ("dn", -1)])
def test_a_scene_says_whether_its_levels_are_absolute(
    trained: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: str, plane: int
) -> None:
    pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")
    from test_scene import backscatter, pixels, write

    values = backscatter(90, 70)
    if units == "dn":
        values = np.round(10 ** (values / 20 + 3)).astype(np.uint16)
    scene = write(tmp_path / "scene.tif", values)
    generator, told = Generator.from_pretrained(trained[1]), []
    own = Generator.encode_condition

    def watched(self: Generator, **given: Any) -> Any:
        told.append(given["sar"][:, 2])
        return own(self, **given)

    monkeypatch.setattr(Generator, "encode_condition", watched)
    facts = translate(generator, scene, tmp_path / "out.tif", SceneOptions(tile=48, overlap=16))
    assert facts.units == units and len(told) > 1 and all((planes == plane).all() for planes in told)
    assert pixels(tmp_path / "out.tif").shape == (3, 90, 70)


def test_the_shipped_teacher_reads_its_three_sources() -> None:
    recipe = Recipe.load("sar-optical-128-teacher")
    for source in recipe.data["sources"]:
        if not (ROOT / source["path"]).is_dir():
            pytest.skip(f"the real data do not stand at {source['path']}")
    sources = [{**source, "path": str(ROOT / source["path"]), "limit": 2} for source in recipe.data["sources"]]
    data: Any = open_data(**{**recipe.data, "sources": sources, "balance": 2})
    assert [(part.units, part.calibrated) for part in data.parts] == [
        ("dn", False), ("stretched-db", False), ("db", True),
    ]  # fmt: skip
    batch = data.draw(8, np.random.default_rng(0))
    assert batch["sar"].shape == (8, 3, 128, 128) and batch["sar"].isfinite().all()


def test_orders_and_batches_of_conditions_are_each_others_inverse() -> None:
    sar = torch.rand(3, 2, 4, 4)
    every: list[tuple[conditions.Given, int]] = [({}, 2), ({"labels": [1, 0]}, 2), ({"prompts": ["a", "b"]}, 2)]
    every += [({"prompts": ["a", "b"], "negative_prompts": [None, "c"]}, 2), ({"sar": sar}, 3)]
    for given, count in every:
        empty = {"label": None, "prompt": None, "negative_prompt": None, "sar": None}
        orders = [SimpleNamespace(**empty | one) for one in conditions.scatter(given, count)]
        again: Any = conditions.gather(orders)
        assert set(again) == set(given)
        for key, value in again.items():
            assert torch.equal(value, sar) if key == "sar" else list(value) == given[key]  # type: ignore[literal-required]
    part = conditions.subset({"sar": sar, "labels": None}, 1, 3)
    assert torch.equal(part["sar"], sar[1:]) and part["labels"] is None  # type: ignore[arg-type]


def test_micro_batches_are_the_batch_in_parts() -> None:
    batch = {"x0": torch.rand(6, 1), "label": torch.arange(6)}
    parts = conditions.split(batch, 3)
    assert [part["label"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part["x0"] for part in parts]), batch["x0"])


@pytest.mark.parametrize(
    ("task", "given", "wrong"),
    [
        ("image", {}, {"labels": [0]}),
        ("class-to-image", {"labels": [2]}, {"labels": [1]}),
        ("class-to-image", {"labels": [2]}, {"labels": None}),
        ("class-to-image", {"labels": [2]}, {"labels": [2], "prompts": ["x"]}),
        ("sar-to-optical", {"sar": torch.zeros(1, 1, 8, 8)}, {"sar": torch.full((1, 1, 8, 8), 1.5)}),
        ("sar-to-optical", {"sar": torch.zeros(1, 1, 8, 8)}, {"sar": torch.zeros(1, 2, 8, 8)}),
        ("text-to-image", {"prompts": ["a wood"]}, {"prompts": [7]}),
        ("text-to-image", {"prompts": ["a wood"]}, {"sar": torch.zeros(1, 1, 8, 8)}),
    ],
)
def test_each_task_takes_its_own_condition_and_no_other(task: str, given: Any, wrong: Any) -> None:
    labels = {"labels": ["a", "b", "c"], "shares": [[0, 2]]} if task == "class-to-image" else {}
    info = Info(
        name="m",
        task=task,
        method="m",
        role="student",
        data="d",
        sampler="ddim",
        size=(8, 16),
        **labels,  # type: ignore[arg-type]
    )
    own = info.condition(PixelUnshuffle(2))
    own.check(given, 1)
    own.check(own.probe(3), 3)
    for count, bad in ((1, wrong), *([(2, given)] if given else [])):
        with pytest.raises(BadInput):
            own.check(bad, count)
    example = own.example() or {}
    assert all(len(value) == 1 for value in example.values())
    if task == "sar-to-optical":
        assert example["sar"].shape == (1, own.channels, 4, 8) and own.size(own.probe(1)) == (8, 16)
        with pytest.raises(BadInput, match="noise is no SAR"):
            own.in_turn(range(3))
    if task == "class-to-image":
        assert own.in_turn(range(1, 4)) == {"labels": [2, 0, 2]} and own.spread(4) == {"labels": [0, 0, 2, 2]}
        assert own.choices == "0, 2, the share of m" and own.names({"labels": [2]}, 1) == ["c"]
