"""The picture a folder is known by: it fits its own weights in any precision, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from service import LABELS, publish

from distillers.errors import BadInput
from distillers.evaluation.self_check import FILE, check, write_reference
from distillers.generator import Generator
from distillers.weights.manifest import draws, find


@pytest.mark.parametrize("task", ["image", "class-to-image", "sar-to-optical"])
def test_it_fits_its_own_weights_and_no_others(tmp_path: Path, task: str) -> None:
    labels = {"labels": LABELS} if task == "class-to-image" else {}
    publish(tmp_path, "a", task, teacher="t", step_times={1: [999.0]}, **labels)
    folder = tmp_path / "a"
    generator = Generator.from_pretrained(folder)
    check(generator, folder)  # a folder without one is looked at all the same
    write_reference(generator, folder)
    check(generator, folder)
    check(Generator.from_pretrained(folder, dtype=torch.bfloat16), folder)
    torch.manual_seed(1)
    for parameter in generator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with pytest.raises(BadInput, match="another picture"):
        check(generator, folder)
    generator.save_pretrained(folder)
    assert not (folder / FILE).exists()  # it told of the old weights


def test_what_a_folder_may_ask_for_at_its_first_look_is_bounded(tmp_path: Path) -> None:
    publish(tmp_path, "a", "image", default_steps=4)
    folder = tmp_path / "a"
    generator = Generator.from_pretrained(folder)
    for reference in ({"steps": 300, "levels": [[[0, 0, 0]]]}, {"steps": 1, "levels": [[[0] * 3] * 8] * 9}):
        (folder / FILE).write_text(json.dumps(reference))
        with pytest.raises(BadInput, match=FILE):
            check(generator, folder)
    (folder / FILE).unlink()
    generator.info = replace(generator.info, size=(1024, 1024))
    with pytest.raises(BadInput, match="1024 pixels at most"):  # 4 times 16 x 16
        check(generator, folder)


def test_broken_ones_and_weights_that_draw_nothing(tmp_path: Path) -> None:
    publish(tmp_path, "a", "image", teacher="t", step_times={1: [999.0]})
    folder = tmp_path / "a"
    generator = Generator.from_pretrained(folder)
    for text in ("{", "[]", json.dumps({"levels": [1]}), json.dumps({"steps": 1, "levels": [[1, 2]]})):
        (folder / FILE).write_text(text)
        with pytest.raises(BadInput, match=FILE):
            check(generator, folder)
    (folder / FILE).unlink()
    for parameter in generator.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(BadInput, match="no number"):
        check(generator, folder)


PUBLISHED = [folder for folder in find(Path("weights")).values() if draws(folder)]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_folders_draw_what_they_drew(folder: Path) -> None:
    assert (folder / FILE).is_file()
    check(Generator.from_pretrained(folder), folder)
