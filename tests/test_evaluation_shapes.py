"""The reader of colour and form: right on every real picture, with room to spare, and blind to what is none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import tiny
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from distillers.data import open_data
from distillers.data.shapes import COLOURS, SHAPES, CaptionedShapes, Scenes, paint
from distillers.errors import BadInput
from distillers.evaluation import shape_reader as reader
from distillers.evaluation.evaluate import evaluate
from distillers.evaluation.features import load_features
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.shape_reader import READABLE, REASONS, asked_share, measure, read_shape, shares

N = 120


def drawn(what: Scenes, size: int = 32) -> Tensor:
    return torch.from_numpy(paint(what, size).transpose(0, 3, 1, 2) * 2 - 1)


def real(size: int = 32, n: int = N) -> tuple[Tensor, Tensor, Scenes]:
    data = CaptionedShapes(size, split="test", objects=1)
    items = data.items(range(n))
    return items["image"], items["label"], data.scenes(range(n))


def as_form(what: Scenes, form: str) -> Tensor:
    return drawn(replace(what, shape=np.full_like(what.shape, SHAPES.index(form))))


def noise(like: Tensor, deviation: float) -> Tensor:
    return deviation * torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(pictures.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def tinted(pictures: Tensor) -> Tensor:
    """Each channel brighter or darker by 4 % of the range."""
    signs = torch.randint(0, 2, (len(pictures), 3, 1, 1), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return pictures + 0.08 * signs


def ground(what: Scenes, like: Tensor) -> Tensor:
    return torch.from_numpy(what.grey * 2 - 1)[:, None, None, None].expand_as(like)


def left_of_centre(what: Scenes, size: int) -> NDArray[np.bool_]:
    """(B,1,1,size)."""
    return ((np.arange(size) + 0.5) / size < what.centre[:, 0, :1])[:, None, None, :]


# --- what is right


@pytest.mark.parametrize(
    ("size", "n", "overlap", "edge"), [(32, 300, 0.97, 0.08), (24, 200, 0.97, 0.08), (48, 100, 0.99, 0.04),
                                       (64, 100, 0.99, 0.04)],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_picture_is_read_with_room_to_spare(
    size: int, n: int, overlap: float, edge: float, split: str
) -> None:
    items = CaptionedShapes(size, split=split, objects=1).items(range(n))
    reading = read_shape(items["image"])
    assert torch.equal(reading.colour * len(SHAPES) + reading.form, items["label"])
    assert set(reading.reason) == {READABLE} and asked_share(items["image"], items["label"]) == 1
    for part in items["image"].split(128):
        seen = measure(part)
        assert seen.overlap.min() > overlap and seen.edge.max() < edge  # limits: 0.93, 0.24 px
        assert seen.chroma.min() > 0.5 and (seen.regions == 1).all()  # limit: 0.3
        assert max(seen.colour_off.max(), seen.tint.max(), seen.uneven.max()) < 1e-3  # limits: 0.12, 0.12, 0.06


@pytest.mark.parametrize("size", [24, 32, 64])
def test_mild_softness_noise_and_tint_are_forgiven(size: int) -> None:
    pictures, labels, _ = real(size, n=100 if size > 32 else N)
    for soft in (
        pictures + noise(pictures, 0.03),
        blurred(pictures, 0.5),
        tinted(pictures),
        tinted(blurred(pictures, 0.5)) + noise(pictures, 0.03),
    ):
        assert asked_share(soft, labels) == 1
        for part in soft.split(128):
            seen = measure(part)
            assert seen.overlap.min() > 0.945 and seen.edge.max() < 0.15 and seen.uneven.max() < 0.04
            assert seen.colour_off.max() < 0.07 and seen.tint.max() < 0.1


# --- what is wrong


def test_swapped_colours_and_forms_are_not_what_was_asked() -> None:
    pictures, labels, what = real()
    for turn in range(1, len(COLOURS)):
        other = drawn(replace(what, colour=(what.colour + turn) % len(COLOURS)))
        assert shares(*read_shape(other).matches(labels)) == {"asked": 0, "colour": 0, "form": 1}
    for turn in range(1, len(SHAPES)):
        other = drawn(replace(what, shape=(what.shape + turn) % len(SHAPES)))
        assert shares(*read_shape(other).matches(labels)) == {"asked": 0, "colour": 1, "form": 0}
    assert 0 < asked_share(pictures.roll(1, 0), labels) < 0.2  # neighbours share a label now and then


def mutated(kind: str, size: int) -> Tensor:
    pictures, _, what = real(size)
    if kind.startswith("blur"):
        return blurred(pictures, float(kind.split()[1]))
    if kind.startswith("noise"):
        return pictures + noise(pictures, float(kind.split()[1]))
    grey, left = ground(what, pictures), torch.from_numpy(left_of_centre(what, size))
    if kind == "left half erased":
        return torch.where(left, grey, pictures)
    if kind == "right half erased":
        return torch.where(left, pictures, grey)
    if kind == "two objects":
        data = CaptionedShapes(size, split="test", objects=2)
        return data.items([int(i) for i in np.flatnonzero(data.scenes(range(2 * N)).second)])["image"]
    if kind == "doubled":
        shift = size // 5
        return torch.where((pictures - grey).abs().amax(1, keepdim=True) > 0.3, pictures, pictures.roll(shift, 3))
    if kind == "speckled":
        rng = torch.Generator().manual_seed(2)
        hit = torch.rand((len(pictures), 1, size, size), generator=rng) < 0.02
        return torch.where(hit, torch.rand(pictures.shape, generator=rng) * 2 - 1, pictures)
    if kind == "smeared":
        return torch.stack([pictures.roll(k, 3) for k in range(-2, 3)]).mean(0)
    one, other = kind.split(" and ")
    placed = [
        torch.from_numpy(paint(replace(what, shape=np.full_like(what.shape, SHAPES.index(form))), size))
        for form in (one, other)
    ]
    return (placed[0] + placed[1]).permute(0, 3, 1, 2) - 1


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    "kind",
    [
        "blur 2", "blur 3", "noise 0.25", "noise 0.5", "left half erased", "right half erased", "two objects",
        "doubled", "speckled", "smeared", "circle and cross", "circle and square", "triangle and square",
    ],
)  # fmt: skip
def test_what_is_no_form_shows_none(kind: str, size: int) -> None:
    reading = read_shape(mutated(kind, size))
    assert (reading.form == -1).all() and READABLE not in reading.reason
    if kind == "two objects":
        assert (reading.colour == -1).all() and reading.reason.count("several regions") > 0.95 * len(reading.reason)


def test_the_reasons_are_told() -> None:
    pictures, _, what = real(n=8)
    grey, two = ground(what, pictures), CaptionedShapes(split="test", objects=2)
    alone = (pictures - grey).abs().amax(1, keepdim=True) > 1e-3
    orange, bluish = (torch.tensor(colour)[:, None, None] for colour in ((0.96, 0.0, -0.8), (-0.2, -0.2, 0.2)))
    cases = {
        "no coloured region": grey,
        "several regions": two.items([i for i in range(20) if two.scenes([i]).second[0]])["image"],
        "no colour of the palette": torch.where(alone, orange, grey),
        "the background is not grey": torch.where(alone, pictures, grey + bluish),
        "noisy or uneven": pictures + noise(pictures, 0.2),
        "no form fits": blurred(pictures, 1.3),
        READABLE: pictures,
    }
    assert set(cases) == set(REASONS)
    for reason, shown in cases.items():
        assert reason in read_shape(shown).reason, reason
        if reason != "no form fits":  # a blur is uneven as well, where a form is thin
            assert set(read_shape(shown).reason) == {reason}


def test_an_object_that_the_border_cuts_shows_no_form() -> None:
    _, labels, what = real()
    centre = what.centre.copy()
    centre[:, 0, 0] = what.radius[:, 0] * 0.3
    assert (read_shape(drawn(replace(what, centre=centre))).form == -1).all()
    centre[:, 0, 0] = what.radius[:, 0]  # touches it and is whole
    assert asked_share(drawn(replace(what, centre=centre)), labels) == 1


def test_a_picture_is_read_alike_whatever_stands_beside_it() -> None:
    pictures = torch.cat([mutated("blur 2", 32)[:20], real(n=20)[0]])
    whole = read_shape(pictures)
    parts = [read_shape(pictures[i : i + 1]) for i in range(len(pictures))]
    assert whole.form.tolist() == [int(part.form) for part in parts]
    assert whole.reason == tuple(part.reason[0] for part in parts)


def test_values_beyond_the_range_are_cut_as_they_are_seen() -> None:
    bright, cut = (read_shape(pictures) for pictures in (real()[0] * 1.3, (real()[0] * 1.3).clamp(-1, 1)))
    assert torch.equal(bright.form, cut.form) and torch.equal(bright.colour, cut.colour) and bright.reason == cut.reason


def test_bad_input_is_named() -> None:
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 32, 24), (0, 3, 32, 32)):
        with pytest.raises(BadInput, match="pictures"):
            read_shape(torch.zeros(shape))
    with pytest.raises(BadInput, match=r"pictures.*finite"):
        read_shape(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(BadInput, match="labels"):
        asked_share(real(n=4)[0], torch.zeros(3, dtype=torch.int64))


# --- in a report


def test_a_report_has_the_share_for_one_object_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    one, space = open_data("shapes", size=16, split="test", objects=1), load_features("shapes")
    student = tiny("class-to-image", "student", one.labels)
    teacher = tiny("class-to-image", "teacher", one.labels, seed=1)
    report = evaluate(
        student, one, space, EvaluationOptions(n=140, teacher_steps=[2], latency_repeats=0, batch=64), teacher=teacher
    )
    assert report.rows[0].shows == {"asked": 1, "colour": 1, "form": 1}
    assert [row.shows is not None for row in report.rows] == [True] * 4  # real, the teacher, the student at 1 and 2
    assert all(row.shows and row.shows["asked"] == 0 for row in report.rows[1:])  # they have learnt nothing
    assert json.loads(report.to_json())["rows"][0]["shows"]["asked"] == 1
    assert "| shows what was asked, % |" in report.markdown() and "| 100.0 |" in report.markdown()

    def copy(seeds: list[int], steps: int, labels: list[int]) -> Tensor:  # half of the pictures, the rest is grey
        pictures = one.items(at[len(done) : len(done) + len(seeds)])["image"]
        done.extend(seeds)
        return torch.where((torch.tensor(seeds) % 2 == 0)[:, None, None, None], pictures, torch.zeros(()))

    at, done = [int(i) for i in np.linspace(0, len(one) - 1, 140).round()], list[int]()
    monkeypatch.setattr(student, "sample", copy)
    copied = evaluate(student, one, space, EvaluationOptions(n=140, steps=[1], latency_repeats=0, batch=33))
    assert copied.rows[-1].shows == {"asked": 0.5, "colour": 0.5, "form": 0.5}
    monkeypatch.undo()

    part = open_data("shapes", size=16, split="test", objects=1, limit=2000, classes=["red cross", "red circle"])
    assert (
        evaluate(student, part, space, EvaluationOptions(n=140, steps=[1], latency_repeats=0)).rows[0].shows is not None
    )
    for data, model in (
        (open_data("shapes", size=16, split="test"), student),
        (one, tiny("image", "student")),
    ):
        report = evaluate(model, data, space, EvaluationOptions(n=140, steps=[1], latency_repeats=0))
        assert all(row.shows is None for row in report.rows) and "asked" not in report.markdown()


def test_the_limits_are_those_that_the_text_states() -> None:
    palette = np.array(list(COLOURS.values()))
    apart = np.sqrt(np.square(palette[:, None] - palette[None]).mean(2))[~np.eye(len(palette), dtype=bool)]
    assert round(float(apart.min()), 2) == 0.31 > 2 * reader.COLOUR
    assert min(np.ptp(palette, axis=1)) > 0.55 > reader.CHROMA
