"""Captions in batches: how texts are packed, read from folders, shortened, and refused."""

import importlib.util
import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import CAPTION, noise, real, rng, save, write_captioned
from PIL import ExifTags, Image

from distillers.data import captioned, open_data
from distillers.data.captioned import CaptionedFolder, Prompts, bucket_sizes, shortened
from distillers.data.pixels import to_tensor
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput, Notice
from distillers.jobs.inputs import load_teacher
from distillers.jobs.recipe import Recipe
from distillers.models.captions import pack, unpack
from distillers.training.batches import Batches
from distillers.training.settings import TrainSettings


def test_texts_come_back_from_their_tensor() -> None:
    texts = ["a red circle", "", "ein größerer Kreis, 東京 🙂", "a"]
    packed = pack(texts)
    assert packed.dtype == torch.uint8 and packed.shape == (4, len(texts[2].encode()))
    assert unpack(packed) == texts
    assert unpack(pack(texts, 64)) == texts and pack(texts, 64).shape == (4, 64)
    assert unpack(pack([])) == [] and unpack(pack([""])) == [""]
    assert unpack(torch.cat([pack(texts, 64)[2:], pack(["b"], 64)])) == [*texts[2:], "b"]


def test_what_does_not_fit_a_tensor_is_refused() -> None:
    with pytest.raises(BadInput, match="the character 0"):
        pack(["a\0b"])
    with pytest.raises(BadInput, match="caption: got '4 bytes'; allowed: 3 bytes at most"):
        pack(["größ"[:3]], 3)


@pytest.mark.parametrize("jsonl", [True, False])
def test_every_picture_has_its_own_text(jsonl: bool, tmp_path: Path) -> None:
    data = CaptionedFolder(write_captioned(tmp_path / "noise", jsonl=jsonl), size=16)  # nothing is mirrored
    assert (data.name, len(data), data.labels, data.captioned) == ("noise", 5, (), True)
    for batch in (data.items(range(5)), data.draw(20, rng())):
        for picture, text in zip(batch["image"], unpack(batch["caption"]), strict=True):
            number = int(text.split()[1].strip(","))
            assert text == CAPTION.format(number)
            assert torch.equal(picture, to_tensor(noise(number)[None])[0])
    assert unpack(data.items([3, 1])["caption"]) == [CAPTION.format(3), CAPTION.format(1)]


def test_clauses_are_lost_at_random_and_one_stays(tmp_path: Path) -> None:
    data = CaptionedFolder(write_captioned(tmp_path / "noise"), size=16, clause_dropout=0.5)
    whole = CaptionedFolder(tmp_path / "noise", size=16)
    drawn, plain = data.draw(400, rng(1)), whole.draw(400, rng(1))
    assert torch.equal(drawn["image"], plain["image"])  # the clauses are drawn after the pictures
    counts = np.zeros(4)
    for short, full in zip(unpack(drawn["caption"]), unpack(plain["caption"]), strict=True):
        kept, clauses = short.split(", "), full.split(", ")
        assert kept == [clause for clause in clauses if clause in kept] and kept != [""]
        counts[len(kept)] += 1
    assert counts[0] == 0 and np.allclose(counts[1:] / 400, [4 / 8, 3 / 8, 1 / 8], atol=0.08)
    assert unpack(data.items(range(5))["caption"]) == [CAPTION.format(i) for i in range(5)]
    assert drawn["caption"].shape == plain["caption"].shape  # parts of batches are joined


def test_a_clause_is_lost_with_the_given_probability() -> None:
    random = rng(3)
    kept = [len(shortened(", ".join("abcdefgh"), 0.25, random).split(", ")) for _ in range(2000)]
    assert abs(np.mean(kept) - 6) < 0.15
    assert {shortened("a, b", 0.999, random) for _ in range(50)} == {"a", "b"}
    assert shortened("one clause", 0.9, random) == "one clause"


def test_a_folder_without_splits_is_divided_and_no_picture_is_in_both(tmp_path: Path) -> None:
    write_captioned(tmp_path / "noise", 320, 8)
    train, test = (CaptionedFolder(tmp_path / "noise", split, 8) for split in ("train", "test"))
    assert (len(train), len(test)) == (170, 150) and not set(train.found) & set(test.found)
    assert sorted(train.texts + test.texts) == sorted(CAPTION.format(i) for i in range(320))


def test_a_limit_spreads_and_splits_are_folders(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        write_captioned(tmp_path / "noise" / split, count)
    assert CaptionedFolder(tmp_path / "noise", "train", 16, limit=3).texts == [CAPTION.format(i) for i in (0, 2, 4)]
    test = CaptionedFolder(tmp_path / "noise", "test", 16)
    assert len(test) == 3 and test.name == "noise"
    with pytest.raises(BadInput, match="give split"):
        CaptionedFolder(tmp_path / "noise", size=16)


def test_pictures_in_folders_are_named_by_their_path(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "b.png", noise(1))
    save(tmp_path / "a.png", noise(0))
    lines = [{"file_name": "deep/b.png", "text": "b"}, {"file_name": "./a.png", "text": " a\u2028c "}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "notes.md").write_text("notes")
    with pytest.warns(Notice, match=r"left out 1 file, the first notes.md"):
        data = CaptionedFolder(tmp_path, size=16)
    assert data.texts == ["a\u2028c", "b"]


@pytest.mark.parametrize("jsonl", [True, False])
def test_pictures_without_captions_and_captions_without_pictures_are_counted(jsonl: bool, tmp_path: Path) -> None:
    write_captioned(tmp_path, 10, jsonl=jsonl)
    for i in range(8):
        (tmp_path / f"{i}.png").rename(tmp_path / f"other-{i}.png")
    with pytest.raises(BadInput) as error:
        CaptionedFolder(tmp_path, size=16)
    told = error.value.given
    assert "8 pictures (other-0.png, other-1.png, other-2.png, other-3.png, other-4.png, other-5.png, ...)" in told
    assert f"8 captions (0.{'png' if jsonl else 'txt'}," in told and "without a picture" in told


def test_mixed_up_texts_are_refused_by_name(tmp_path: Path) -> None:
    def refused(match: str, field: str | None = None) -> None:
        with pytest.raises(BadInput, match=match) as error:
            CaptionedFolder(tmp_path, size=16)
        assert field is None or error.value.field == field

    refused("a folder with metadata.jsonl, with pictures and a .txt", "path")
    save(tmp_path / "a.png", noise(0))
    refused("a folder with metadata.jsonl, with pictures and a .txt", "path")
    text = tmp_path / "a.txt"
    text.write_bytes("größer".encode("latin-1"))
    refused("readable text file in UTF-8", str(text))
    text.write_text(" \n")
    refused(r"1 empty caption \(a.png\)")
    text.write_text("a\0b")
    refused("the character 0", str(text))
    text.write_text("noise")
    save(tmp_path / "a.webp", noise(0))
    refused("whose name another has")
    (tmp_path / "a.webp").unlink()
    metadata = tmp_path / "metadata.jsonl"
    for line, match in {
        "{": "a JSON object",
        "[1]": '"file_name" and "text"',
        '{"file_name": "a.png"}': '"file_name" and "text"',
        '{"file_name": "a.png", "text": 3}': '"file_name" and "text"',
        '{"file_name": "a.png", "text": "a\\u0000"}': "the character 0",
        '{"file_name": "../a.png", "text": "a"}': "a file in the folder",
    }.items():
        metadata.write_text(line)
        refused(match)
    metadata.write_text('{"file_name": "a.png", "text": "a"}\n' * 2)
    refused("one line a picture", f"{metadata}:2: file_name")
    metadata.write_text('{"file_name": "a.png", "text": ""}')
    refused(r"1 empty caption \(a.png\)")


@pytest.mark.parametrize("objects", [1, 2])
def test_shapes_say_what_they_show(objects: int) -> None:
    data, plain = CaptionedShapes(captions=True, objects=objects), CaptionedShapes(objects=objects)
    batch = data.items(range(40))
    assert unpack(batch["caption"]) == [data.caption(i) for i in range(40)]
    assert batch["caption"].shape[1] == data.draw(3, rng())["caption"].shape[1]
    assert (data.captioned, plain.captioned) == (True, False) and "caption" not in plain.draw(2, rng())
    assert all(len(text) <= batch["caption"].shape[1] for text in unpack(data.draw(2000, rng())["caption"]))
    limited = open_data("shapes", captions=True, limit=5).draw(50, rng())
    assert set(unpack(limited["caption"])) == {CaptionedShapes().caption(i) for i in range(5)}


def test_a_class_of_captioned_shapes_keeps_its_captions() -> None:
    part = open_data("shapes", captions=True, classes=["red circle"])
    texts = unpack(part.draw(30, rng())["caption"])
    assert part.captioned and all(" red circle " in text for text in texts)


def test_real_avatars() -> None:
    data = open_data("captions", path=str(real("avatars")), split="test", size=32, limit=20)
    texts = unpack(data.items(range(20))["caption"])
    assert all(text.startswith("a ") and "background" in text for text in texts)
    assert len(open_data("captions", path=str(real("avatars")), split="train", size=32)) == 13_786


# --- archives


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            head = tarfile.TarInfo(name)
            head.size = len(content)
            archive.addfile(head, io.BytesIO(content))
    return file


def png(seed: int, height: int = 16, width: int = 16) -> bytes:
    made = io.BytesIO()
    Image.fromarray(noise(seed, height, width)).save(made, "PNG")
    return made.getvalue()


def samples(*numbers: int) -> dict[str, bytes]:
    found = {f"deep/{i:04d}.seen.png": png(i) for i in numbers} | {f"deep/{i:04d}.json": b"{}" for i in numbers}
    return found | {f"deep/{i:04d}.txt": CAPTION.format(i).encode() for i in numbers}


def write_parquet(file: Path, numbers: list[int], struct: bool = True, **changes: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow: pip install 'fewstep[parquet]'")
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": png(i), "path": f"{i}.png"} if struct else png(i) for i in numbers]
    columns = {"image": pictures, "text": [CAPTION.format(i) for i in numbers], **changes}
    parquet.write_table(pyarrow.table({k: v for k, v in columns.items() if v}), file, row_group_size=2)
    return file


def shows_what_it_says(data: CaptionedFolder, numbers: set[int]) -> None:
    batch = data.draw(40, rng())
    seen = set()
    for picture, text in zip(batch["image"], unpack(batch["caption"]), strict=True):
        seen.add(number := int(text.split()[1].strip(",")))
        assert torch.equal(picture, to_tensor(noise(number)[None])[0])
    assert seen == numbers


@pytest.mark.parametrize("kept", [True, False])
def test_tars_of_webdataset(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(captioned, "KEPT_BYTES", 100)
    write_tar(tmp_path / "some" / "a-0.tar", samples(0, 1, 2))
    write_tar(tmp_path / "some" / "a-1.tar", samples(3, 4))
    data = CaptionedFolder(tmp_path / "some", size=16)
    assert len(data) == 5 and (data._kept is not None) == kept
    shows_what_it_says(data, set(range(5)))
    again = pickle.loads(pickle.dumps(data))
    shows_what_it_says(again, set(range(5)))


def test_parquet_of_bytes_and_text(tmp_path: Path) -> None:
    for split, numbers in (("train", [0, 1, 2, 3, 4]), ("test", [5, 6])):
        write_parquet(tmp_path / "some" / f"{split}-00000-of-00001.parquet", numbers, struct=split == "train")
    train, test = (CaptionedFolder(tmp_path / "some", split, 16, False) for split in ("train", "test"))
    shows_what_it_says(train, set(range(5)))
    shows_what_it_says(test, {5, 6})
    assert len(CaptionedFolder(tmp_path / "some", size=16)) == 7


def test_archives_that_are_wrong_are_named(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(BadInput, match=match):
            CaptionedFolder(tmp_path, size=16).draw(1, rng())

    file = tmp_path / "a.tar"
    every = samples(0, 1, 2)
    write_tar(file, {k: v for k, v in every.items() if "0001.txt" not in k and "0002.seen" not in k})
    refused(r"1 picture \(deep/0001.seen.png\) without a caption; 1 caption \(deep/0002.txt\) without a picture")
    write_tar(file, {**samples(0), "deep/0000.txt": "größer".encode("latin-1")})
    refused("0000.txt: got .*; allowed: a readable text file in UTF-8")
    write_tar(file, {**samples(0), "deep/0000.webp": png(1)})
    refused("two pictures of one key")
    write_tar(file, {**samples(0), "deep/0000.seen.png": png(0)[:50]})
    refused("0000.seen.png: got .*; allowed: a complete, readable image")
    file.write_bytes(b"no tar")
    refused("a complete, uncompressed tar")
    file.unlink()
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    if importlib.util.find_spec("pyarrow") is None:
        refused(r"pip install 'fewstep\[parquet\]'")
        return
    refused("a complete, readable Parquet file")
    write_parquet(tmp_path / "a.parquet", [0], text=[])
    refused("columns image")
    write_parquet(tmp_path / "a.parquet", [0], image=["a.png"])
    refused(r"image \(bytes, or a struct with bytes\) and text")
    write_parquet(tmp_path / "a.parquet", [0, 1, 2], text=["a", None, "b"])
    refused("1 empty caption")


# --- shapes of pictures


def write_shapes(root: Path) -> dict[str, tuple[int, int]]:
    """Pictures of several shapes, whose caption is their size."""
    sizes = {f"{h}x{w}": (h, w) for h, w in ((64, 64), (60, 66), (40, 80), (80, 40), (90, 45), (20, 120))}
    for name, (height, width) in sizes.items():
        save(root / f"{name}.png", noise(height, height, width))
        (root / f"{name}.txt").write_text(name)
    return sizes


def test_buckets_keep_shapes_and_every_batch_has_one(tmp_path: Path) -> None:
    given = write_shapes(tmp_path)
    data = CaptionedFolder(tmp_path, size=64, buckets=True, bucket_step=16)
    assert all(h * w <= 64 * 64 and h % 16 == w % 16 == 0 and max(h, w) <= 2 * min(h, w) for h, w in data.sizes)
    seen = dict[str, tuple[int, ...]]()
    for seed in range(60):
        batch = data.draw(4, rng(seed))
        texts = unpack(batch["caption"])
        seen |= {text: tuple(batch["image"].shape[2:]) for text in texts}
        assert torch.equal(data.draw(4, rng(seed))["image"], batch["image"])
    assert set(seen) == set(given)
    for text, size in seen.items():
        gaps = {
            bucket: abs(np.log(np.divide(*bucket) / np.divide(*given[text]))) for bucket in bucket_sizes((64, 64), 16)
        }
        assert gaps[size] == min(gaps.values())
    assert data.items(range(6))["image"].shape == (6, 3, 64, 64)


def test_shapes_are_as_frequent_as_their_pictures_and_the_same_in_all_processes(tmp_path: Path) -> None:
    write_shapes(tmp_path)
    data = CaptionedFolder(tmp_path, size=64, buckets=True, bucket_step=16)
    settings = TrainSettings(iterations=200, batch=2, seed=3)
    loads = [Batches(settings, process, [1] * 200, pin_memory=False) for process in (0, 1)]
    counts = Counter[tuple[int, ...]]()
    for i in range(200):
        one, other = (load.draw_ahead(data, i) for load in loads)
        assert one["image"].shape == other["image"].shape
        counts[tuple(one["image"].shape[2:])] += 1
    for load in loads:
        load.close()
    for shape, size in enumerate(data.sizes):
        assert abs(counts[size] / 200 - len(data.places(shape)) / 6) < 0.1
    assert not torch.equal(one["image"], other["image"])


def test_a_picture_that_lies_on_its_side_is_sorted_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(0, 40, 80)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    assert CaptionedFolder(tmp_path, size=64, buckets=True, bucket_step=8).sizes == [(80, 48)]


def test_buckets_that_cannot_be_are_refused(tmp_path: Path) -> None:
    write_shapes(tmp_path)
    for options, match in (
        ({"bucket_step": 128}, "data.bucket_step: got 128; allowed: a step that divides pictures of 64 x 64 px"),
        ({"bucket_step": 0}, "bucket_step: got 0"),
        ({"dihedral": True}, "data.buckets: got True; allowed: false with dihedral"),
    ):
        with pytest.raises(BadInput, match=match):
            CaptionedFolder(tmp_path, size=64, buckets=True, **options)


# --- prompts without pictures


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "wishes.txt"
    file.write_text("a red circle, small\n ein größerer Kreis \na square")
    data = open_data("prompts", path=str(file), size=16)
    assert (data.name, len(data), data.size, data.captioned, data.pictured) == ("wishes", 3, (16, 16), True, False)
    batch = data.draw(40, rng())
    assert set(batch) == {"caption"} and set(unpack(batch["caption"])) == set(data.texts)
    assert unpack(data.items([2, 0])["caption"]) == ["a square", "a red circle, small"]
    short = open_data("prompts", path=str(file), clause_dropout=0.5).draw(40, rng())
    assert {"a red circle", "small"} < set(unpack(short["caption"]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a\n\nb\n \n", r"2 empty lines \(2, 4\)"),
        (b"", r"1 empty line \(1\)"),
        ("größer".encode("latin-1"), "UTF-8"),
        ("a\nb".encode("utf-16"), "UTF-8"),
        (b"a\0b", "the character 0"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=match):
        Prompts(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="a text file, one prompt a line"):
        Prompts(tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "learns"),
    [
        ("boot", {}, True),
        ("disback", {}, True),
        ("dmd2", {}, True),
        ("dmd2", {"gan_weight": 1e-3}, False),
        ("pso", {"mode": "online", "reward": "a"}, True),
        ("pso", {}, False),
        ("consistency", {}, False),
        ("hyper_sd", {}, False),
        ("scm", {}, False),
        ("multi_student", {}, True),
        ("multi_student", {"network": {"layers_per_block": 1}}, False),
        ("multi_student", {"base": "consistency"}, False),
    ],
)
def test_methods_that_learn_from_pictures_refuse_prompts(
    method: str, options: dict[str, Any], learns: bool, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb")
    data = {"kind": "prompts", "path": str(tmp_path / "prompts.txt"), "size": 16}
    recipe = Recipe.from_table(
        {"name": "x", "method": method, "teacher": "no/such/teacher", "data": data, method: options}
    )
    with pytest.raises(BadInput) as error:
        load_teacher(recipe, open_data(**data))
    assert (error.value.field == "data.kind") != learns
    if not learns:
        assert error.value.allowed == f"data with pictures: {method} learns from them"
