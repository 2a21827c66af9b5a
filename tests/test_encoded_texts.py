"""Texts and pictures that are encoded once: what training draws of them, their files, and what is refused."""

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import noise, save, write_captioned
from stock_pipelines import PIPELINES, build
from two_processes import BEGAN, in_two_processes

from distillers.data import ImageData
from distillers.data.captioned import CaptionedFolder, Prompts
from distillers.errors import BadInput, Notice
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.models.codec import Vae
from distillers.models.conditions import Prompt
from distillers.models.denoiser import Denoiser
from distillers.models.text import PromptEncoder
from distillers.teacher import Teacher
from distillers.training.encoded_texts import EncodedTexts
from distillers.training.head import HeadFit
from distillers.training.latents import Latents, encoded_once, tell_unread, texts_drawn
from distillers.training.stored import Stored, check_room, name_of, place_of_encoded
from distillers.training.trainer import begin

TEXTS = ["a red barn", "two small cats", "a red barn", "sea"]


@pytest.fixture(scope="module", params=[name for name in PIPELINES if name in ("sd", "sdxl", "sd3", "flux", "sana")])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("stock") / request.param
    build(request.param, folder)
    return Generator.from_pretrained(folder)


def prompts(tmp_path: Path, size: int = 32, texts: list[str] = TEXTS) -> Prompts:
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    return Prompts(tmp_path / "prompts.txt", size)


def test_what_is_drawn_is_what_the_encoder_says(generator: Generator, tmp_path: Path) -> None:
    condition, data = generator.condition, prompts(tmp_path)
    assert isinstance(condition, Prompt)
    kept = EncodedTexts(data, data.texts, condition, tmp_path / "kept", "cpu")
    kept.encode()
    drawn = kept.draw(6, np.random.default_rng(0))
    again = pickle.loads(pickle.dumps(kept)).draw(6, np.random.default_rng(0))
    assert all(torch.equal(drawn[k], again[k]) for k in drawn)
    plain = data.draw(6, np.random.default_rng(0))
    assert torch.equal(drawn["caption"], plain["caption"])  # rewards read it
    expected = condition.encode_items({**plain, "size": torch.tensor([(32, 32)] * 6)}, "cpu")
    found = condition.encode_items(drawn, "cpu")
    assert set(found) == set(expected) and "text" in found
    attended = expected.get("mask", torch.ones(expected["text"].shape[:2])).bool()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape
        one, other = (v[attended] if name == "text" else v for v in (value, expected[name]))
        torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)
        if not value.is_floating_point():
            assert torch.equal(value, expected[name])
    assert not found["text"][~attended].any()
    network, x = generator.denoiser, torch.randn(6, generator.codec.channels(3), 8, 8)
    told = [{k: v for k, v in one.items() if not k.startswith("null_")} for one in (found, expected)]
    assert condition.encoder is not None
    scale = {"guidance": torch.full((6,), 2.0)} if condition.encoder.family.guided_by == "input" else {}
    answers = [network.output(x, torch.tensor(0.5), {**one, **scale}) for one in told]
    torch.testing.assert_close(answers[0], answers[1], atol=2e-2, rtol=2e-2)


def test_each_text_is_encoded_once_and_never_again(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = list[str](), PromptEncoder.forward

    def counted(self: PromptEncoder, texts: Any, *args: Any, **more: Any) -> Any:
        seen.extend(texts)
        return forward(self, texts, *args, **more)

    monkeypatch.setattr(PromptEncoder, "forward", counted)
    data, condition = prompts(tmp_path), generator.condition
    assert isinstance(condition, Prompt)
    for run in range(2):
        seen.clear()
        kept = EncodedTexts(data, data.texts, condition, tmp_path / "kept", "cpu")
        kept.encode()
        done = len(seen)
        for seed in range(5):
            kept.draw(8, np.random.default_rng(seed))
        assert len(seen) == done  # nothing is encoded while training
        encoded = [text for text in seen if text]
        assert encoded.count("sea") == 1 - run and encoded.count("two small cats") == 1 - run
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    other = prompts(tmp_path, texts=["another text"])
    EncodedTexts(other, other.texts, condition, tmp_path / "kept", "cpu").encode()
    assert not file.exists() and len(list((tmp_path / "kept").rglob("*.safetensors"))) == 1  # what is stale goes


def test_masked_tokens_take_no_room(tmp_path: Path) -> None:
    build("sana", tmp_path / "sana")
    generator = Generator.from_pretrained(tmp_path / "sana")
    condition, data = generator.condition, prompts(tmp_path)
    assert isinstance(condition, Prompt)
    kept = EncodedTexts(data, data.texts, condition, tmp_path / "kept", "cpu")
    whole = condition.encode_items(data.items([0, 1, 3]), "cpu")
    lengths = sorted(whole["mask"].sum(1).tolist())
    assert len(set(lengths)) == 3 and kept.ragged == ("text",)
    assert sorted(len(kept.stored[i]["text"]) for i in range(3)) == lengths
    assert kept.bytes_needed() == 2 * whole["text"].shape[2] * sum(lengths)
    assert kept.stored[0]["text"].dtype == torch.bfloat16
    size = sum(f.stat().st_size for f in (tmp_path / "kept").rglob("*.safetensors"))
    assert kept.bytes_needed() < size < kept.bytes_needed() + 1000  # the estimate is what it takes, and a head


@pytest.mark.filterwarnings("error")
def test_what_an_encoder_does_not_read_is_told(generator: Generator, tmp_path: Path) -> None:
    encoder, condition = generator.prompts, generator.condition
    assert encoder is not None and encoder.unread(TEXTS[0]) == {} == encoder.unread("")
    long = "abcdefghi" * 4 + " xyz" * 300
    for name, end in encoder.unread(long).items():
        kept, letters = long.replace(" ", ""), end.replace(" ", "").replace("▁", "")
        assert letters and kept.endswith(letters) and len(letters) < len(kept), name
    assert set(encoder.unread(long)) == set(encoder.towers)
    clip = [name for name in encoder.towers if encoder.clip(name)]
    assert set(encoder.unread("a" * 30)) == set(clip)
    for name in clip:
        assert encoder.unread("a" * 30)[name].replace(" ", "") == "a" * 12  # of 20 tokens two are the ends
    assert isinstance(condition, Prompt)
    before = condition.encode_items(prompts(tmp_path).items([0]), "cpu")["text"]
    encoder.unread(long)
    assert torch.equal(condition.encode_items(prompts(tmp_path).items([0]), "cpu")["text"], before)


def test_texts_that_are_cut_are_counted_at_the_start(sdxl: Generator, tmp_path: Path) -> None:
    teacher: Any = Opened(sdxl)
    data = prompts(tmp_path, texts=["a" * 18 + "bcd", "a" * 30, "a", "a" * 18])
    with pytest.warns(Notice) as told:
        tell_unread(data, teacher)
    first, second = (str(one.message) for one in told)
    assert first.startswith("text_encoder does not read 2 of 4 texts to their end: of 'aaa")
    assert second.startswith("text_encoder_2 does not read 2 of 4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_unread(prompts(tmp_path), teacher)


# --- pictures


class Opened:
    """What `encoded_once` asks of a teacher."""

    def __init__(self, generator: Generator) -> None:
        self.codec, self.condition = generator.codec, generator.condition


def once(data: ImageData, generator: Generator, *more: Any) -> ImageData:
    teacher: Any = Opened(generator)
    return encoded_once(data, teacher, *more)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("stock") / "sdxl"
    build("sdxl", folder)
    return Generator.from_pretrained(folder)


@pytest.mark.parametrize("buckets", [False, True])
def test_pictures_and_texts_in_files_are_those_of_the_folder(buckets: bool, sdxl: Generator, tmp_path: Path) -> None:
    for i, (height, width) in enumerate([(32, 32), (24, 40), (40, 24), (32, 32), (26, 44)]):
        save(tmp_path / "pictures" / f"{i}.png", noise(i, height, width))
        (tmp_path / "pictures" / f"{i}.txt").write_text(TEXTS[i % 4])
    data = CaptionedFolder(tmp_path / "pictures", size=32, flip=False, buckets=buckets, bucket_step=8)
    kept = once(data, sdxl, tmp_path / "kept", 1.0)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 1 + len(data.sizes)
    again, shapes = once(data, sdxl, tmp_path / "kept", 1.0), set[tuple[int, ...]]()
    for seed in range(8):
        one, other, plain = (d.draw(4, np.random.default_rng(seed)) for d in (kept, again, data))
        assert all(torch.equal(one[k], other[k]) for k in one) and {"latent", "text", "pooled", "ids"} <= set(one)
        torch.testing.assert_close(one["latent"].float(), sdxl.codec.encode(plain["image"]), atol=5e-3, rtol=5e-3)
        size = plain["image"].shape[-2:]
        assert one["ids"].tolist() == [[*size, 0, 0, *size]] * 4  # the size of these pictures, not the published one
        on_the_fly = sdxl.condition.encode_items(plain, "cpu")
        torch.testing.assert_close(one["text"].float(), on_the_fly["text"], atol=2e-2, rtol=1e-2)
        assert torch.equal(on_the_fly["ids"], one["ids"])
        shapes.add(tuple(size))
    assert shapes == set(data.sizes) and len(shapes) == (3 if buckets else 1)
    assert torch.equal(kept.items([1])["image"], data.items([1])["image"])


def test_what_changes_is_encoded_when_drawn(sdxl: Generator, tmp_path: Path) -> None:
    write_captioned(tmp_path / "pictures", side=32)
    turned = once(CaptionedFolder(tmp_path / "pictures", size=32, flip=True), sdxl, tmp_path / "kept", 1.0)
    assert isinstance(turned, EncodedTexts) and isinstance(turned.data, Latents) and turned.data.folder is None
    dropped = CaptionedFolder(tmp_path / "pictures", size=32, flip=False, clause_dropout=0.5)
    assert texts_drawn(dropped) is None and isinstance(once(dropped, sdxl, tmp_path / "kept", 1.0), Latents)
    assert once(dropped, sdxl, tmp_path / "kept", 0.0) is dropped
    alone = prompts(tmp_path)
    assert isinstance(once(alone, sdxl, tmp_path / "kept", 1.0), EncodedTexts)
    assert isinstance(once(dropped, sdxl), Latents) and once(alone, sdxl) is alone


def test_files_above_the_limit_are_refused_before_any_is_made(sdxl: Generator, tmp_path: Path) -> None:
    write_captioned(tmp_path / "pictures", side=32)
    data = CaptionedFolder(tmp_path / "pictures", size=32, flip=False)
    with pytest.raises(BadInput) as error:
        once(data, sdxl, tmp_path / "kept", 1e-6)
    assert error.value.field == "train.cache_gb" and error.value.given == 1e-6
    assert "of latents and" in error.value.allowed and "encoded texts" in error.value.allowed
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    with pytest.raises(BadInput, match=r"30 or more, room for 10.0 GB of latents and 20.0 GB of encoded texts; or 0"):
        check_room({"latents": 1e10, "encoded texts": 2e10}, 20)
    check_room({"latents": 1e10, "encoded texts": 0}, 20)


def test_an_encoder_that_changed_makes_files_anew(sdxl: Generator, tmp_path: Path) -> None:
    assert isinstance(sdxl.codec, Vae) and sdxl.prompts is not None
    before = name_of(["a"], sdxl.prompts)
    assert before == name_of(["a"], sdxl.prompts) and before != name_of(["b"], sdxl.prompts)
    with torch.no_grad():
        next(sdxl.prompts.parameters()).mul_(1.5)
    assert before != name_of(["a"], sdxl.prompts)
    with torch.no_grad():
        next(sdxl.prompts.parameters()).div_(1.5)


def test_trainings_share_a_folder_of_what_they_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a run, what was encoded for other data goes."""
    own = place_of_encoded(tmp_path)
    monkeypatch.setenv("FEWSTEP_ENCODED", str(tmp_path / "shared"))
    shared = place_of_encoded(tmp_path)
    assert (own, shared) == (tmp_path / "encoded", tmp_path / "shared")
    for folder, kept in ((shared, 2), (own, 1)):
        made = list[int]()

        def make(rows: Sequence[int], made: list[int] = made) -> list[dict[str, torch.Tensor]]:
            made.extend(rows)
            return [{"x": torch.zeros(2)} for _ in rows]

        monkeypatch.setenv("FEWSTEP_ENCODED", str(shared) if folder == shared else "")
        for name in ("of-one", "of-other", "of-other"):
            Stored(folder / name, 3, make, on_cpu=True)
        assert made == [0, 1, 2] * 2 and len(list(folder.iterdir())) == kept


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    def make(rows: Any) -> list[dict[str, torch.Tensor]]:
        return [{"a": torch.full((i + 1, 2), float(i)), "b": torch.tensor(i)} for i in rows]

    kept = Stored(tmp_path / "kept-1", 5, make, each=2, ragged=("a",), on_cpu=True)
    assert [len(kept[i]["a"]) for i in range(5)] == [1, 2, 3, 4, 5]
    assert [int(kept[i]["b"]) for i in (4, 0, 3)] == [4, 0, 3] and torch.equal(kept[2]["a"], torch.full((3, 2), 2.0))
    file = tmp_path / "kept-1" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="delete it, and it is made again") as error:
        pickle.loads(pickle.dumps(kept))[2]
    assert error.value.field == str(file)


# --- whole trainings


@pytest.mark.parametrize(("method", "name"), [("boot", "sd"), ("dmd2", "sana")])
def test_a_student_learns_from_prompts_alone(method: str, name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "teacher")
    data = prompts(tmp_path)
    table = {
        "name": "x",
        "method": method,
        "teacher": str(tmp_path / "teacher"),
        "data": {"kind": "prompts", "path": str(tmp_path / "prompts.txt")},
        "train": {"iterations": 3, "batch": 2, "samples": 2, "compile": "never", "tracker": "none"},
    }
    distill(Recipe.from_table(table), tmp_path / "student", "cpu")
    student = Generator.from_pretrained(tmp_path / "student")
    assert student.sample([1], prompts=[data.texts[0]], steps=1).isfinite().all()
    assert list((tmp_path / "student" / "training" / "encoded").rglob("*.safetensors"))
    watched = {**table, "train": {**table["train"], "watch_every": 1}}  # type: ignore[dict-item]
    with pytest.raises(BadInput, match=r"train.watch_every: .* no pictures to compare with"):
        distill(Recipe.from_table(watched), tmp_path / "watched", "cpu")


def test_a_head_is_learnt_on_the_teachers_own_samples_where_there_are_no_pictures(tmp_path: Path) -> None:
    build("sdxl", tmp_path / "teacher")
    teacher = Teacher.from_pretrained(tmp_path / "teacher")
    teacher = replace(teacher, denoiser=Denoiser(teacher.denoiser.network, teacher.denoiser.schedule, "eps"))
    batch = teacher.encode_batch(prompts(tmp_path, teacher.info.size[0]).items([0, 1]), "cpu")
    assert not batch["x0"].any() and batch["x0"].shape[0] == 2

    def loss(x0: torch.Tensor, pictures: bool) -> float:
        torch.manual_seed(0)
        fit = HeadFit(prediction="v", pictures=pictures)
        nets = fit.networks(teacher)
        torch.manual_seed(1)
        ((_, found),) = fit.step(nets, {**batch, "x0": x0}, 0.0)
        return float(found.detach())

    assert loss(batch["x0"], False) == loss(torch.ones_like(batch["x0"]), False)  # it does not look at them
    assert loss(batch["x0"], True) != loss(torch.ones_like(batch["x0"]), True)


def test_shapes_that_the_network_cannot_halve_are_refused(tmp_path: Path) -> None:
    build("sd", tmp_path / "teacher")  # of factor 2, halved once
    write_captioned(tmp_path / "pictures", side=16)
    for step, size, field in ((2, 16, "data.bucket_step"), (4, 18, "data.size")):
        data = {"kind": "captions", "path": str(tmp_path / "pictures"), "size": size, "buckets": True}
        save(tmp_path / "pictures" / "0.png", noise(0, 14, 18))
        table = {
            "name": "x",
            "method": "boot",
            "teacher": str(tmp_path / "teacher"),
            "data": {**data, "bucket_step": step},
        }
        own = Recipe.from_table(table)
        with pytest.raises(BadInput, match="a multiple of 4") as error:
            load_teacher(own, load_data(own))
        assert error.value.field == field


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_on_texts_that_was_stopped_goes_on_to_the_same_bits(dropout: float, tmp_path: Path) -> None:
    build("sd", tmp_path / "teacher")
    write_captioned(tmp_path / "pictures", side=16)
    table = {
        "name": "x",
        "method": "consistency",
        "teacher": str(tmp_path / "teacher"),
        "data": {"kind": "captions", "path": str(tmp_path / "pictures"), "flip": False, "clause_dropout": dropout},
        "train": {"iterations": 4, "batch": 4, "samples": 1, "compile": "never", "tracker": "none"},
    }
    own = Recipe.from_table(table)
    states = []
    for stops in ((4,), (2, 4)):
        out = tmp_path / str(len(stops))
        for stop in stops:
            data, teacher = load_data(own), Teacher.from_pretrained(tmp_path / "teacher")
            drawn = encoded_once(data, teacher, out / "encoded", 1.0, "cpu")
            run = begin(own.distiller(), teacher, own.settings(), out, device="cpu")
            for i in range(run.resume(), stop):
                run.iteration(i, drawn)
            run.save(stop)
            states.append(run.nets["student"].state_dict())
            run.close()
    whole, _, resumed = states
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# --- several processes


@pytest.mark.process
def test_processes_make_files_in_turn_and_read_them_all(tmp_path: Path) -> None:
    in_two_processes(one_of_two_processes, tmp_path)
    for rank in (0, 1):
        made, read = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert made == [[0, 1, 4, 5], [2, 3, 6]][rank] and read == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def one_of_two_processes(folder: str) -> None:
    made = list[int]()

    def make(rows: Any) -> list[dict[str, torch.Tensor]]:
        made.extend(rows)
        return [{"a": torch.tensor(float(i))} for i in rows]

    assert torch.distributed.get_world_size() == 2
    Path(folder, BEGAN).touch()
    kept = Stored(Path(folder, "kept-1"), 7, make, each=2, on_cpu=True)
    read = [float(kept[i]["a"]) for i in range(7)]
    torch.save((made, read), Path(folder, f"rank{torch.distributed.get_rank()}.pt"))
