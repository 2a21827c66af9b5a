"""The command and what a person may get wrong: one line names it, before any work, and nothing is overwritten."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from folders import noise, save
from networks import contents, describe, untrained

from distillers.cli import main
from distillers.errors import BadInput, Notice
from distillers.jobs.inputs import find_teacher, held_out, hold_out, load_data
from distillers.jobs.recipe import Recipe

Fewstep = Callable[..., tuple[int, str, str]]
RECIPE = {
    "name": "mine",
    "method": "consistency",
    "teacher": "weights/plain",
    "data": {"kind": "images", "path": "images"},
    "train": {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    untrained(describe(name="plain")).save_pretrained(root / "weights" / "plain")
    untrained(describe("class-to-image", "consistency", name="labelled")).save_pretrained(root / "weights" / "labelled")
    untrained(describe("sar-to-optical", "consistency", name="sar")).save_pretrained(root / "weights" / "sar")
    return root


@pytest.fixture
def home(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a teacher, pictures and what is none of these."""
    (tmp_path / "weights").mkdir()
    for folder in (published / "weights").iterdir():
        (tmp_path / "weights" / folder.name).symlink_to(folder)
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png", noise(i))
    save(tmp_path / "grey.png", np.zeros((16, 16), np.uint8))
    (tmp_path / "file.txt").write_text("no picture, no folder, no TOML")
    (tmp_path / "empty").mkdir()
    write_recipe(tmp_path / "mine.toml", RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def fewstep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fewstep:
    """Run the command as its entry point does: exit code, what it said, what it complained of."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def write_recipe(file: Path, table: dict[str, object]) -> Path:
    file.write_text(tomli_w.dumps(table))
    return file


# --- what is read, and what is written ---
@pytest.mark.parametrize("out", ["weights/plain", "link", "weights/plain/inside"])
@pytest.mark.parametrize("command", [["adopt", "weights/plain", "OUT"], ["distill", "mine.toml", "--out", "OUT"]])
def test_a_teacher_is_never_the_folder_to_make(home: Path, fewstep: Fewstep, command: list[str], out: str) -> None:
    (home / "link").symlink_to(home / "weights" / "plain")
    before = contents(home / "weights" / "plain")
    code, _, err = fewstep(*(out if word == "OUT" else word for word in command))
    assert code == 2 and err.startswith("error: out: got") and "is read" in err
    assert contents(home / "weights" / "plain") == before


@pytest.mark.parametrize("out", ["images", "images/new"])
def test_data_are_never_the_folder_to_make(home: Path, fewstep: Fewstep, out: str) -> None:
    code, _, err = fewstep("distill", "mine.toml", "--out", out)
    assert code == 2 and "is read" in err and len(list((home / "images").iterdir())) == 4


def test_a_training_is_published_anywhere_but_over_what_it_was_made_of(home: Path, fewstep: Fewstep) -> None:
    assert fewstep("distill", "mine.toml", "--out", "run", "--device", "cpu")[0] == 0
    before = contents(home / "weights" / "plain")
    for out in ("weights/plain", "images", "images/new", "run/training", "run/training/new"):
        code, _, err = fewstep("publish", "run", out)
        assert code == 2 and "is read" in err, out
    assert contents(home / "weights" / "plain") == before and len(list((home / "images").iterdir())) == 4
    assert fewstep("publish", "run", "other")[0] == fewstep("publish", "run", "run")[0] == 0
    assert (home / "other" / "fewstep.json").is_file()


@pytest.mark.parametrize("out", ["", ".", "..", "/", "file.txt", "file.txt/new", "/proc/new"])
@pytest.mark.parametrize("command", [["adopt", "weights/plain"], ["distill", "mine.toml", "--out"]])
def test_a_folder_that_cannot_be_made_is_refused(home: Path, fewstep: Fewstep, command: list[str], out: str) -> None:
    code, _, err = fewstep(*command, out)
    assert code == 2 and err.startswith("error: out: got")


@pytest.mark.parametrize(
    "out", ["x.jpg", "file.txt", "empty", "file.txt/x.SUFFIX", "/proc/x.SUFFIX", "/proc/new/x.SUFFIX"]
)
@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        (["generate", "not-opened", "--out"], "png"),
        (["evaluate", "weights/plain", "--out"], "json"),
        (["translate", "grey.png", "--model", "not-opened"], "png"),
        (["demonstration"], "tif"),
        (["benchmark", "training", "not-opened", "--out"], "json"),
        (["benchmark", "scene", "not-opened", "--out"], "json"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_work(
    home: Path, fewstep: Fewstep, command: list[str], suffix: str, out: str
) -> None:
    if command[0] == "translate" and out == "empty":  # a folder takes results, but not this one
        out = "/proc"
    code, _, err = fewstep(*command, out.replace("SUFFIX", suffix))
    assert code == 2 and err.startswith("error: out: got"), err
    assert (home / "file.txt").read_text().startswith("no picture")


def test_a_report_is_no_part_of_the_weights_folder(home: Path, fewstep: Fewstep) -> None:
    for name in ("fewstep.json", "unet/config.json", "scheduler/scheduler_config.json"):
        before = (home / "weights/plain" / name).read_bytes()
        code, _, err = fewstep("evaluate", "weights/plain", "--out", f"weights/plain/{name}")
        assert code == 2 and "which is read" in err and (home / "weights/plain" / name).read_bytes() == before


def test_a_missing_folder_is_made_and_the_line_counts_steps(home: Path, fewstep: Fewstep) -> None:
    code, out, _ = fewstep("generate", "weights/plain", "--steps", "1", "--out", "new/folder/x.png")
    assert code == 0 and (home / "new/folder/x.png").is_file()
    assert out == "new/folder/x.png: 1 from plain, 1 step each, seed 0\n"
    _, out, _ = fewstep("generate", "weights/plain", "--steps", "2", "--n", "2", "--out", "x.png")
    assert out == "x.png: 2 from plain, 2 steps each, seeds 0 to 1\n"


# --- what a person may get wrong ---
WRONG = [
    ("generate nope", "nope"),
    ("generate file.txt", "file.txt"),
    ("generate owner/name", "a reachable hub id"),
    ("pairs owner/name --out new --reward distillers.training.reward:greenness", "a reachable hub id"),
    ("generate weights/sar", "fewstep translate"),
    ("generate weights/labelled --label ²", "label"),
    ("generate weights/plain --seed -1", "seed"),
    ("evaluate nope", "fewstep.json"),
    ("evaluate empty", "fewstep.json"),
    ("evaluate weights/sar --samples 1 --pairs empty", "path"),
    ("distill empty", "a TOML file"),
    ("distill file.txt", "valid TOML"),
    ("distill mine.toml teacher=123", "123"),
    ("distill mine.toml data.flip=False", "true or false"),
    ("distill mine.toml name=a/b", "without /"),
    ("distill mine.toml name=..", "without a dot"),
    ("adopt weights/plain new --steps 1,1", "different"),
    ("compare file.txt", ".toml"),
    ("results --weights nope", "weights"),
    ("results --weights weights --readme grey.png", "readme"),
    ("serve --weights weights --port 99999", "port"),
    ("serve --weights file.txt", "weights"),
    ("translate nope new.tif --model weights/sar", "an existing file"),
    ("translate grey.png grey.png --model weights/sar", "which is read"),
    ("demonstration new.tif --seed -1 --side 64", "seed"),
    ("pairs weights/plain --out new --n 1 --steps 1 --reward os:system", "reward"),
    ("benchmark serving weights/nope --unpinned --out x.json", "fewstep.json"),
    ("benchmark soak file.txt --unpinned", "fewstep.json"),
    ("benchmark scene weights/plain --rounds 0", "rounds"),
    ("publish empty new", "a checkpoint"),
    ("merge weights/plain --out new", "one student of a share"),
    ("run --no-serve --weights file.txt", "file.txt"),
]


@pytest.mark.parametrize(("command", "said"), WRONG, ids=[command for command, _ in WRONG])
def test_what_is_wrong_is_one_line(home: Path, fewstep: Fewstep, command: str, said: str) -> None:
    before = contents(home)
    code, _, err = fewstep(*command.split(" "))
    assert code in (1, 2) and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert contents(home) == before and not (home / "new").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [1]}', "\x00"])
def test_a_damaged_report_is_named(home: Path, fewstep: Fewstep, text: str) -> None:
    (home / "others" / "x").mkdir(parents=True)
    (home / "others" / "x" / "fewstep.json").write_text("{}")
    (home / "others" / "x" / "report.json").write_text(text)
    code, _, err = fewstep("results", "--weights", "others")
    assert code == 2 and "report.json" in err and err.count("\n") == 1


# --- pictures to measure with, and the teacher ---
def test_a_folder_without_splits_is_divided_by_names(home: Path) -> None:
    for k, name in enumerate(("cat", "dog", "emu")):
        for i in range((200, 118, 2)[k]):
            save(home / "many" / name / f"{i}.png", noise(k, 8, 8))
    save(home / "many" / "fox" / "only.png", noise(9, 8, 8))
    recipe = Recipe.from_table(RECIPE | {"data": {"kind": "images", "path": "many", "size": 8}})
    with pytest.warns(Notice, match="151 pictures of many are held out"):
        divided = hold_out(recipe)
    assert divided.data["split"] == "train" and hold_out(divided) == divided
    train, test = load_data(divided), load_data(divided, "test")
    assert train.labels == test.labels == ("cat", "dog", "emu", "fox") and len(train) + len(test) == 321
    counts = [np.bincount(data.items(range(len(data)))["label"], minlength=4).tolist() for data in (train, test)]
    assert counts == [[106, 62, 1, 1], [94, 56, 1, 0]]  # a class keeps one to learn from
    before = set(test.files)  # type: ignore[attr-defined]
    save(home / "many" / "cat" / "new.png", noise(1, 8, 8))
    assert len(before - set(load_data(divided, "test").files)) <= 2  # type: ignore[attr-defined]


def test_too_few_pictures_are_said_when_the_training_begins_and_when_it_is_measured(home: Path) -> None:
    recipe = Recipe.from_table(RECIPE | {"data": {"kind": "images", "path": "images"}})
    with pytest.warns(Notice, match="no data are held out, so `fewstep evaluate` will need others by --path"):
        assert hold_out(recipe) == recipe
    student = home / "student"
    untrained(describe(name="student")).save_pretrained(student)
    recipe.write(student / "recipe.toml", {})
    with pytest.raises(BadInput, match="has learnt from all of these"):
        held_out(student)


def test_a_teacher_is_found_beside_the_student_or_where_its_recipe_says(home: Path) -> None:
    student = home / "elsewhere" / "student"
    untrained(describe("image", "consistency", name="student", teacher="plain")).save_pretrained(student)
    assert find_teacher(student) is None
    Recipe.from_table(RECIPE).write(student / "recipe.toml", {})
    assert find_teacher(student) == "weights/plain"
    (home / "elsewhere" / "plain").symlink_to(home / "weights" / "plain")
    assert find_teacher(student) == str(home / "elsewhere" / "plain")
