"""Captions in batches: how texts are packed, read from folders, shortened, and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import CAPTION, noise, real, rng, save, write_captioned

from distillers.data import open_data
from distillers.data.captioned import CaptionedFolder, shortened
from distillers.data.pixels import to_tensor
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput, Notice
from distillers.models.captions import pack, unpack


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
    data = CaptionedFolder(write_captioned(tmp_path / "noise", jsonl=jsonl), size=16, flip=False)
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
    assert (len(train), len(test)) == (170, 150) and not set(train.files) & set(test.files)
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

    refused("a folder with metadata.jsonl, or with pictures and a .txt", "path")
    save(tmp_path / "a.png", noise(0))
    refused("a folder with metadata.jsonl, or with pictures and a .txt", "path")
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
