"""Recipes: what ships is accepted, overrides keep their types, and everything wrong is refused by name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from trainings import NETWORK

from distillers import methods
from distillers.data import open_data
from distillers.errors import BadInput, Notice
from distillers.generator import Generator
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.publish import manifest
from distillers.jobs.recipe import Recipe, shipped
from distillers.weights.manifest import Info


@pytest.fixture
def teacher_table() -> dict[str, Any]:
    return {
        "name": "tiny",
        "method": "diffusion",
        "data": {"kind": "shapes", "size": 8},
        "model": {"task": "class-to-image", "network": NETWORK},
    }


@pytest.fixture
def student_table() -> dict[str, Any]:
    return {"name": "tiny-student", "method": "consistency", "teacher": "weights/tiny", "data": {"kind": "shapes"}}


def write(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(table))
    return path


# --- what ships ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", shipped())
def test_what_ships_is_accepted(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name  # one file = one published folder
    assert type(recipe.distiller()) is methods.find(recipe.method)
    assert recipe.settings().iterations > 0
    kind = recipe.data.get("kind", "images")
    with pytest.raises(BadInput) as refused:  # the data may be absent here, but no option of theirs may be unknown
        open_data(kind, **{k: v for k, v in recipe.data.items() if k not in ("kind", "path")}, path="/nowhere")
    assert refused.value.field in ("path", "data.path")


def test_the_issue_s_folders_have_recipes() -> None:
    assert {"shapes-teacher", "eurosat-teacher", "sar-optical-teacher"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_the_table_makes_the_recipe_again(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    copy = write(tmp_path / "recipe.toml", recipe.table() | {"versions": {"torch": "2"}})  # as it is published
    assert Recipe.load(copy) == recipe
    assert Recipe.load(copy).table() == recipe.table()


# --- overrides -------------------------------------------------------------------------------------------------------
def test_overrides_keep_their_types(teacher_table: dict[str, Any], tmp_path: Path) -> None:
    overrides = [
        "train.batch=32",
        "train.learning_rate=1e-3",
        "train.optimizer=adamw",  # a bare word is a string
        'train.decay="cosine"',
        "train.betas=[0.5, 0.99]",
        "train.learning_rates.student=2",
        "model.network.add_attention=true",
        "model.network.block_out_channels=[4, 8]",
        "model.schedule={ name = 'vp', beta_schedule = 'linear' }",
        "diffusion.label_dropout=0",
        "data.size=16",
        "name=other",
    ]
    recipe = Recipe.load(write(tmp_path / "r.toml", teacher_table), overrides)
    chosen = recipe.settings()
    assert (chosen.batch, chosen.learning_rate, chosen.optimizer, chosen.decay) == (32, 1e-3, "adamw", "cosine")
    assert (chosen.betas, chosen.learning_rates) == ((0.5, 0.99), {"student": 2.0})
    model = recipe.model_settings()
    assert model.network == NETWORK | {"add_attention": True, "block_out_channels": [4, 8]}
    assert model.schedule == {"name": "vp", "beta_schedule": "linear"}
    assert (recipe.options, recipe.data, recipe.name) == ({"label_dropout": 0}, {"kind": "shapes", "size": 16}, "other")
    assert tomllib.loads(tomli_w.dumps(recipe.table()))["train"]["betas"] == [0.5, 0.99]


def test_names_that_look_like_numbers_are_names(student_table: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["name=7", "teacher=2024", "data.path=1e3"]
    recipe = Recipe.load(write(tmp_path / "r.toml", student_table), overrides)
    assert (recipe.name, recipe.teacher, recipe.data["path"]) == ("7", "2024", "1e3")


@pytest.mark.parametrize(
    ("override", "field", "allowed"),
    [
        ("train.batches=3", "train.batches", "batch, betas, cache_gb"),
        ("train.batch=many", "train.batch", "integer"),
        ("train.batch='32'", "train.batch", "integer"),
        ("train.batch=true", "train.batch", "integer"),
        ("train.batch=1.5", "train.batch", "integer"),
        ("train.batch=1979-05-27", "train.batch", "integer"),
        ("train.batch=0", "train.batch", "above 0"),
        ("train.learning_rate=0", "train.learning_rate", "above 0"),
        ("train.learning_rate=-1e-4", "train.learning_rate", "above 0"),
        ("train.learning_rate=nan", "train.learning_rate", "finite"),
        ("train.learning_rate=inf", "train.learning_rate", "finite"),
        ("train.learning_rates.student=fast", "train.learning_rates.student", "number"),
        ("train.betas=[0.9]", "train.betas.1", "required"),
        ("train.seed=-1", "train.seed", "0 to"),
        ("train.optimizer=lion", "train.optimizer", "radam, adamw, adam"),
        ("train=fast", "train", r"\[train\]"),
        ("train.batch.size=3", "train.batch", "integer"),
        ("name.x=3", "name.x", "name is a value"),
        ("name=", "name", "the name of the folder"),
        (
            "diffusion.dropout=0.1",
            "diffusion.dropout",
            "label_dropout, last_time_share, log_mean, log_std, sampling_steps",
        ),
        ("diffusion.label_dropout=often", "diffusion.label_dropout", "number"),
        ("consistency.points=4", "consistency", "diffusion, lora, method, model"),
        ("method=alchemy", "method", "consistency, diffusion"),
        ("method=[1]", "method", "consistency, diffusion"),
        ("teacher=weights/tiny", "teacher", "absent"),
        ("model.task=poetry", "model.task", "'sar-to-optical' or 'text-to-image'"),
        ("model.patch=0", "model.patch", "1 or more"),
        ("model.schedule.name=trig", "model.schedule.name", "vp or edm, which diffusers"),
        ("model.schedule.name=edm", "model.prediction", "edm, edm-v with the schedule edm"),
        ("model.prediction=edm", "model.prediction", "x0, eps, v with the schedule vp"),
        ("model.prediction=noise", "model.prediction", "'eps'"),
        ("model.size=3", "model.size", "network, patch, prediction"),
        ("colour=red", "colour", "data, diffusion, lora, method, model, name, student, teacher, train"),
        ("train.batch", "override", "key=value"),
        ("=3", "override", "key=value"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    override: str, field: str, allowed: str, teacher_table: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"allowed: .*{allowed}") as refused:
        Recipe.load(write(tmp_path / "r.toml", teacher_table), [override])
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"teacher": None}, "teacher", "a folder or hub id"),
        ({"teacher": 5}, "teacher", "a folder or hub id"),
        ({"teacher": ""}, "teacher", "a folder or hub id"),
        ({"model": {"task": "image"}}, "model", "only method = .diffusion. builds a network"),
        ({"name": None}, "name", "the name of the folder"),
        ({"consistency": {"points": 1}}, "consistency.points", "2 or more"),
        ({"consistency": {"solver": "rk4"}}, "consistency.solver", "'heun' or 'ddim'"),
        ({"consistency": [1]}, "consistency", r"\[consistency\]"),
    ],
)
def test_a_student_s_recipe_is_checked_too(
    change: dict[str, Any], field: str, allowed: str, student_table: dict[str, Any]
) -> None:
    table = {k: v for k, v in (student_table | change).items() if v is not None}
    with pytest.raises(BadInput, match=f"allowed: .*{allowed}") as refused:
        Recipe.from_table(table)
    assert refused.value.field == field


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"recipe: got .nowhere.*shapes-teacher"):
        Recipe.load("nowhere")
    with pytest.raises(BadInput, match="a TOML file or one of"):
        Recipe.load(tmp_path)
    for broken in (b"name = ", b"\xff\xfe", b"train = 1\ntrain = 2\n"):
        (tmp_path / "r.toml").write_bytes(broken)
        with pytest.raises(BadInput, match="valid TOML") as refused:
            Recipe.load(tmp_path / "r.toml")
        assert refused.value.field == str(tmp_path / "r.toml")


# --- what a recipe opens ---------------------------------------------------------------------------------------------
def test_the_seed_makes_the_untrained_network(teacher_table: dict[str, Any]) -> None:
    def weights(seed: int) -> torch.Tensor:
        recipe = Recipe.from_table(teacher_table | {"train": {"seed": seed}})
        return next(load_teacher(recipe, load_data(recipe)).denoiser.parameters()).clone()

    first = weights(0)
    torch.manual_seed(99)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"data": {"kind": "paintings"}}, "data.kind", "shapes"),
        ({"data": {"kind": ["shapes"]}}, "data.kind", "shapes"),
        ({"data": {"kind": "shapes", "colour": 1}}, "data.colour", "size"),
        ({"data": {"kind": "shapes", "size": 9}}, "data.size", "a multiple of 2"),
        ({"model": {"task": "sar-to-optical", "network": NETWORK}}, "data", "pairs"),
        ({"model": {"network": {"depth": 3}}}, "network", "UNet2DModel"),
        ({"model": {"network": NETWORK, "schedule": {"name": "vp", "betas": 1}}}, "schedule", "betas"),
    ],
)
def test_data_and_network_must_fit(
    change: dict[str, Any], field: str, allowed: str, teacher_table: dict[str, Any]
) -> None:
    recipe = Recipe.from_table(teacher_table | change)
    with pytest.raises(BadInput, match=f"allowed: .*{allowed}") as refused:
        load_teacher(recipe, load_data(recipe))
    assert refused.value.field == field


def test_the_order_of_numbered_classes_is_said(
    teacher_table: dict[str, Any], student_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.from_table(teacher_table)
    data = load_data(recipe)
    made = load_teacher(recipe, data)
    numbered = replace(made.info, labels=[str(i) for i in range(len(data.labels))])
    Generator(made.denoiser, made.codec, numbered).save_pretrained(tmp_path / "tiny")
    with pytest.warns(Notice, match=r"numbers its classes.*\(0 is red circle, 1 is red square"):
        teacher = load_teacher(Recipe.from_table(student_table | {"teacher": str(tmp_path / "tiny")}), data)
    assert teacher.info.labels == list(data.labels)


def test_a_student_is_described_by_its_teacher_recipe_and_data(
    teacher_table: dict[str, Any], student_table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe.from_table(teacher_table)
    data = load_data(recipe)
    made = load_teacher(recipe, data)
    Generator(made.denoiser, made.codec, made.info).save_pretrained(tmp_path / "tiny")
    plan = Recipe.from_table(student_table | {"teacher": str(tmp_path / "tiny")})
    teacher = load_teacher(plan, data)
    assert teacher.info == Info.read(tmp_path / "tiny")  # a teacher tells of itself
    info = manifest(plan.distiller().generator(plan.distiller().networks(teacher), teacher).info, plan, teacher, data)
    assert (info.name, info.method, info.role, info.teacher) == ("tiny-student", "consistency", "student", "tiny")
    assert (info.task, info.data, info.size, info.labels) == ("class-to-image", "shapes", (8, 8), list(data.labels))
    for missing in (str(tmp_path / "nowhere"), "no/such/hub/id"):
        with pytest.raises(BadInput):
            load_teacher(Recipe.from_table(student_table | {"teacher": missing}), data)
