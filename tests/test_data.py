"""The data sets: what they draw, how they divide ground into train and test, and which input they refuse."""

import hashlib
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import CAPTION, noise, real, rng, save, save_pair, write_captioned, write_pairs
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import label

from distillers.data import KINDS, open_data
from distillers.data.image_folder import ImageFolder
from distillers.data.preferences import PreferencePairs, Preferred, write_preferences
from distillers.data.sar_optical import MixedPairs, SarOpticalPairs, simulated, varied
from distillers.data.shapes import ALONE, COLOURS, LABELS, RELATIONS, SHADES, SHAPES, SIZES, CaptionedShapes
from distillers.errors import BadInput, Notice
from distillers.models.captions import unpack


def aligned(batch: dict[str, torch.Tensor]) -> bool:
    grey, colour = ((batch[key] + 1) * 127.5 for key in ("sar", "image"))
    expected = torch.cat([grey, 255 - grey, torch.floor(grey.round() / 2)], dim=1)
    return bool(torch.allclose(colour, expected, atol=1e-2))


def split_layout(root: Path) -> Path:
    for split, names in {"train": ("a", "b"), "test": ("c",)}.items():
        for name in names:
            save_pair(root / split / "sar" / f"{name}.webp", root / split / "opt" / f"{name}.webp", ord(name))
    regions = [{"id": "a", "region": "North"}, {"id": "c", "region": "South"}]
    (root / "metadata.json").write_text(json.dumps(regions))
    return root


def class_layout(root: Path) -> Path:
    for k, (kind, roi) in enumerate([("agri", 1), ("agri", 2), ("urban", 2), ("urban", 3), ("urban", 4)]):
        for patch in (1, 2):
            name = f"ROIs1868_summer_{roi}_p{10 * k + patch}.png"
            save_pair(root / kind / "sar" / name, root / kind / "opt" / name, 10 * k + patch)
    return root


def sen12_layout(root: Path) -> Path:
    for k, (season, scene) in enumerate([("ROIs1158_spring", 1), ("ROIs1158_spring", 2), ("ROIs1868_summer", 1)]):
        for patch in (1, 2):
            sar, optical = (f"s{i}_{scene}/{season}_s{i}_{scene}_p{patch}.png" for i in (1, 2))
            save_pair(root / season / sar, root / season / optical, 10 * k + patch)
    return root


PAIR_LAYOUTS = {"split": split_layout, "class": class_layout, "sen12": sen12_layout}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """An image folder with three classes in train, of which test has two."""
    for split, names in {"train": ("forest", "lake", "town"), "test": ("forest", "town")}.items():
        for k, name in enumerate(names):
            for i in range(3):
                save(tmp_path / "land" / split / name / f"{i}.png", noise(100 * k + i))
    return tmp_path / "land"


# --- every kind


@pytest.fixture(params=sorted(set(KINDS) - {"prompts"}))
def data(request: pytest.FixtureRequest, tmp_path: Path, classes: Path):  # type: ignore[no-untyped-def]
    options = {
        "images": {"path": classes, "split": "train", "size": 16},
        "captions": {"path": write_captioned(tmp_path / "captions"), "size": 16, "clause_dropout": 0.5},
        "pairs": {"path": split_layout(tmp_path / "pairs"), "size": 16},
        "shapes": {"size": 16},
        "preferences": {"path": write_pairs(tmp_path / "preferences"), "size": 16},
    }
    if request.param == "mixed-pairs":
        paths = split_layout(tmp_path / "pairs"), class_layout(tmp_path / "classes")
        options["mixed-pairs"] = {"sources": [{"path": p} for p in paths], "size": 16, "radiometry": "amplitude"}
    return open_data(request.param, **options[request.param])


def test_a_batch_has_the_promised_shapes_types_and_range(data) -> None:  # type: ignore[no-untyped-def]
    for batch in (data.draw(5, rng()), data.items([0, 2, 0, 1, 1])):
        expected = {"image": (5, 3, 16, 16)} | ({"label": (5,)} if data.labels else {})
        expected |= {"sar": (5, 1, 16, 16)} if isinstance(data, SarOpticalPairs | MixedPairs) else {}
        expected |= {"loser": (5, 3, 16, 16)} if isinstance(data, PreferencePairs) else {}
        expected |= {"caption": (5, len(CAPTION.format("5")))} if data.captioned else {}
        assert {key: tuple(value.shape) for key, value in batch.items()} == expected
        for key, value in batch.items():
            if key == "caption":
                assert value.dtype == torch.uint8 and all(unpack(value))
                continue
            assert value.dtype == (torch.int64 if key == "label" else torch.float32)
            if key == "label":
                assert value.min() >= 0 and value.max() < len(data.labels)
            else:
                assert -1 <= value.min() < -0.5 and 0.5 < value.max() <= 1


def test_draw_is_a_pure_function_of_the_random_generator(data) -> None:  # type: ignore[no-untyped-def]
    first = data.draw(8, rng(1))
    other = data.draw(8, rng(2))
    data.items([0])
    again = data.draw(8, rng(1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


def test_an_item_does_not_depend_on_its_neighbours(data) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(data.items([4, 1])["image"][1], data.items([1])["image"][0])
    assert not torch.equal(data.items([4])["image"], data.items([1])["image"])


def test_an_index_outside_is_refused(data) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match="index: got -1"):
        data.items([0, -1])
    if not isinstance(data, CaptionedShapes):
        with pytest.raises(BadInput, match=f"0 to {len(data) - 1}"):
            data.items([len(data)])


@pytest.mark.parametrize(
    ("kind", "options", "field", "allowed"),
    [
        ("movies", {}, "data.kind", "images | captions | pairs | mixed-pairs | shapes"),
        ("shapes", {"colour": "red"}, "data.colour", "size, seed, split, shade, limit, objects, captions"),
        ("shapes", {"shade": "black"}, "shade", "dark | mid | light"),
        ("shapes", {"limit": 0}, "limit", "1 or more"),
        ("shapes", {"objects": 3}, "objects", "1 or 2"),
        ("shapes", {"objects": 0}, "objects", "1 or 2"),
        ("captions", {"path": "no/such/folder"}, "path", "existing folder"),
        ("captions", {"path": ".", "clause_dropout": 1}, "clause_dropout", "up to, not including, 1"),
        ("captions", {"path": ".", "clause_dropout": "half"}, "data.clause_dropout", "number"),
        ("preferences", {"path": "no/such/folder"}, "path", "existing folder"),
        ("preferences", {"path": ".", "split": "all"}, "split", "train | test"),
        ("images", {}, "data.path", "needs it"),
        ("images", {"path": "no/such/folder"}, "path", "existing folder"),
        ("pairs", {"path": "no/such/folder"}, "path", "existing folder"),
        ("shapes", {"size": 7}, "size", "8 or more"),
        ("shapes", {"size": "32"}, "data.size", "integer"),
        ("images", {"path": ".", "flip": "False"}, "data.flip", "true or false"),
        ("images", {"path": ".", "dihedral": "no"}, "data.dihedral", "true or false"),
        ("images", {"path": ".", "flip": 0}, "data.flip", "true or false"),
        ("images", {"path": ".", "limit": True}, "data.limit", "integer"),
        ("images", {"path": 12}, "data.path", "string"),
        ("images", {"path": ".", "classes": "cat"}, "data.classes", "a list of names"),
        ("preferences", {"path": ".", "flip": "off"}, "data.flip", "true or false"),
        ("pairs", {"path": ".", "dihedral": "False"}, "data.dihedral", "true or false"),
        ("pairs", {"path": ".", "optical_scale": "1e4"}, "data.optical_scale", "number"),
        ("mixed-pairs", {"sources": [{"path": ".", "nodata": "none"}]}, "data.sources.0.nodata", "number"),
        ("shapes", {"seed": -1}, "seed", "0 or more"),
        ("shapes", {"split": "all"}, "split", "train | test"),
        ("pairs", {"path": ".", "split": "all"}, "split", "train | test"),
        ("pairs", {"path": ".", "radiometry": "phase"}, "radiometry", "amplitude | sentinel1-db"),
        ("pairs", {"path": ".", "radiometry": {"form": "db"}}, "sar", "clip_db"),
        ("pairs", {"path": ".", "units": "watts"}, "units", "auto | db | linear | amplitude | dn | stretched-db"),
        ("mixed-pairs", {}, "data.sources", "needs it"),
        ("mixed-pairs", {"sources": []}, "sources", "one table or more"),
        ("mixed-pairs", {"sources": [{"share": 2}]}, "sources.0", "path, share, bands"),
        ("mixed-pairs", {"sources": [{"path": ".", "size": 16}]}, "sources.0", "path, share, bands"),
        ("mixed-pairs", {"sources": [{"path": "no/such/folder"}]}, "path", "existing folder"),
    ],
)
def test_a_wrong_option_is_named(kind: str, options: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(BadInput) as error:
        open_data(kind, **options)
    assert error.value.field == field
    assert allowed in error.value.allowed


# --- image folders


def test_labels_are_the_class_folders_and_the_same_in_both_splits(classes: Path) -> None:
    train, test = ImageFolder(classes, "train", 16), ImageFolder(classes, "test", 16)
    assert train.labels == test.labels == ("forest", "lake", "town")
    assert train.name == test.name == ImageFolder(classes / "train", size=16).name == "land"
    assert test.items(range(6))["label"].tolist() == [0, 0, 0, 2, 2, 2]  # no lake in test, and town is still 2
    expected = torch.from_numpy(noise(100)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(test.items([3])["image"][0], expected, atol=1e-6)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(0))
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path, size=16)
    assert folder.labels == () and len(folder) == 1 and set(folder.draw(2, rng())) == {"image"}


def test_classes_named_by_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    for k in range(12):
        save(tmp_path / str(k) / "a.png", np.full((16, 16, 3), 20 * k, np.uint8))
    folder = ImageFolder(tmp_path, size=16)
    assert folder.labels == tuple(map(str, range(12)))
    items = folder.items(range(12))
    assert ((items["image"].mean((1, 2, 3)) + 1) * 127.5 / 20).round().tolist() == items["label"].tolist()


@pytest.mark.parametrize("suffix", ["jfif", "gif", "avif", "jp2", "tga", "ppm", "qoi"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGB", (16, 16), (255, 255, 255))
    try:
        picture.save(tmp_path / f"a.{suffix}", {"jfif": "JPEG"}.get(suffix))
    except (KeyError, OSError, ValueError):
        pytest.skip(f"Pillow was built without {suffix}")
    assert ImageFolder(tmp_path, size=16).items([0])["image"].min() > 0.97


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/session1/1.png", "fox/1.png", ".cache/1.png", "loose.png"):
        save(tmp_path / name, noise(0))
    (tmp_path / "cat/3.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gnu").mkdir()
    with (
        pytest.warns(Notice, match=r"no pictures of 2 class folders \(dog, gnu\)"),
        pytest.warns(Notice, match=r"left out 3 files, in 2 folders \(cat, dog\), the first cat/3.png. .*cat, fox"),
    ):
        folder = ImageFolder(tmp_path, size=16)
    assert folder.labels == ("cat", "fox") and len(folder) == 2
    for name in ("cat/3.png", "dog/session1/1.png", "loose.png"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "dog")
    (tmp_path / "gnu").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        ImageFolder(tmp_path, size=16)


def test_files_beside_pairs_are_counted_and_named(tmp_path: Path) -> None:
    root = split_layout(tmp_path / "pairs")
    (root / "train" / "sar" / "a.txt").write_text("not an image")
    with pytest.warns(Notice, match=r"left out 1 file, in 1 folder \(train\), the first train/sar/a.txt"):
        SarOpticalPairs(root, size=16)


def test_a_limit_keeps_a_share_of_every_class(classes: Path) -> None:
    assert ImageFolder(classes, "train", 16, limit=3).items(range(3))["label"].tolist() == [0, 1, 2]
    with pytest.raises(BadInput, match="limit: got 0"):
        ImageFolder(classes, "train", 16, limit=0)


@pytest.mark.parametrize(("options", "count"), [({"flip": False}, 1), ({"flip": True}, 2), ({"dihedral": True}, 8)])
def test_augmentation_shows_each_of_its_views_and_no_other(
    tmp_path: Path, options: dict[str, bool], count: int
) -> None:
    pixels = noise(0)
    save(tmp_path / "one.png", pixels)
    drawn = ((ImageFolder(tmp_path, size=16, **options).draw(200, rng())["image"] + 1) * 127.5).round().byte()
    views = {image.permute(1, 2, 0).numpy().tobytes() for image in drawn}
    group = [np.rot90(p, k) for p in (pixels, pixels[:, ::-1]) for k in range(4)]
    allowed = {1: group[:1], 2: [group[0], group[4]], 8: group}[count]
    assert views == {np.ascontiguousarray(view).tobytes() for view in allowed}
    assert len(views) == count


def test_another_size_is_cropped_to_the_centre_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # the centred square is white, all else black
    save(tmp_path / "wide.png", wide)
    assert ImageFolder(tmp_path, size=16).items([0])["image"].min() == 1
    save(tmp_path / "wide.png", np.tile(np.array([0, 255], np.uint8)[None, :, None], (64, 32, 3)))
    stripes = ImageFolder(tmp_path, size=16).items([0])["image"]
    assert stripes.abs().max() < 0.15  # 1-px stripes become grey; without antialiasing they would stay black or white


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert ImageFolder(tmp_path, size=16).items([0])["image"].min() > 0.97


def corrupt(path: Path, kind: str) -> str:
    """Make `path` a bad image; returns what the refusal must say beside the file's name."""
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return "complete, readable"
    if kind == "not an image":
        path.write_bytes(b"<html>404</html>")
        return "complete, readable"
    if kind == "one pixel":
        Image.new("RGB", (1, 1)).save(path)
        return "1x1 px"
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path)
    return "8-bit"


@pytest.mark.parametrize("kind", ["truncated", "not an image", "one pixel", "16 bits"])
def test_a_bad_image_is_named(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "good.png", noise(0))
    says = corrupt(save(tmp_path / "poor.png", noise(1)), kind)
    with pytest.raises(BadInput, match=r"poor\.png") as error:
        ImageFolder(tmp_path, size=16).draw(1, rng())
    assert says in str(error.value)


def test_a_truncated_jpeg_is_named_even_if_most_of_it_is_there(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-200])
    with pytest.raises(BadInput, match=r"cut\.jpg"):
        ImageFolder(tmp_path).items([0])


def test_a_folder_without_images_is_refused_and_the_split_suggested(tmp_path: Path, classes: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="a folder with images"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(BadInput, match="test, train: give split"):
        ImageFolder(classes)


def test_eurosat_opens() -> None:
    data = open_data("images", path=real("eurosat"), split="test", limit=200)
    assert data.name == "eurosat" and data.size == (64, 64) and len(data.labels) == 10
    assert torch.bincount(data.items(range(200))["label"]).min() >= 10


# --- preferences


def test_pairs_keep_their_pictures_and_numbers(tmp_path: Path) -> None:
    data = PreferencePairs(write_pairs(tmp_path / "liked"), size=16)
    assert (data.name, len(data), data.labels) == ("liked", 5, LABELS)
    batch = data.items(range(5))
    assert batch["label"].tolist() == [0, 3, 6, 9, 12]
    for i in range(5):
        expected = torch.from_numpy(noise(i)).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(batch["image"][i], expected, atol=1e-6)
        assert torch.allclose(batch["loser"][i], -expected, atol=1e-6)
    assert not list(tmp_path.glob(".*")), "nothing is left beside"


@pytest.mark.parametrize(("options", "count"), [({"flip": False}, 1), ({"flip": True}, 2), ({"dihedral": True}, 8)])
def test_both_pictures_of_a_pair_are_turned_alike(tmp_path: Path, options: dict[str, bool], count: int) -> None:
    drawn = PreferencePairs(write_pairs(tmp_path / "liked", count=1), size=16, **options).draw(200, rng())
    assert torch.allclose(drawn["loser"], -drawn["image"], atol=1e-6)
    assert len({picture.numpy().tobytes() for picture in drawn["image"]}) == count


def test_pairs_without_labels_and_in_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        write_pairs(tmp_path / "liked" / split, labels=(), count=count)
    sides = [PreferencePairs(tmp_path / "liked", split, size=16) for split in ("train", "test")]
    assert [len(side) for side in sides] == [3, 2] and {side.name for side in sides} == {"liked"}
    assert set(sides[0].draw(2, rng())) == {"image", "loser"} and sides[0].labels == ()


def test_a_class_of_the_pairs_can_be_chosen(tmp_path: Path) -> None:
    part = open_data("preferences", path=write_pairs(tmp_path / "liked"), size=16, classes=[LABELS[3]])
    drawn = part.draw(4, rng())
    assert len(part) == 1 and drawn["label"].tolist() == [3] * 4 and set(drawn) == {"image", "loser", "label"}


GOOD = {"winner": "winners/000000.png", "loser": "losers/000000.png", "label": LABELS[0], "seed": 7}


@pytest.mark.parametrize(
    ("line", "field", "allowed"),
    [
        ("{", "", "JSON object"),
        ("", "", "JSON object"),
        ("[1]", "", "JSON object"),
        (GOOD | {"winner": None}, ": winner", "path of a picture"),
        (GOOD | {"loser": 3}, ": loser", "path of a picture"),
        (GOOD | {"loser": ""}, ": loser", "path of a picture"),
        (GOOD | {"loser": "losers/none.png"}, ": loser", "existing file"),
        (GOOD | {"loser": "losers"}, ": loser", "existing file"),
        (GOOD | {"loser": "../secret.png"}, ": loser", "stays in"),
        (GOOD | {"winner": "{root}/../secret.png"}, ": winner", "stays in"),
        (GOOD | {"winner": "link.png"}, ": winner", "stays in"),
        (GOOD | {"winner": "a\0b"}, ": winner", "path of a picture"),
        (GOOD | {"winner": "x" * 5000}, ": winner", "path of a picture"),
        (GOOD | {"loser": "winners/000000.png"}, ": loser", "another picture"),
        (GOOD | {"label": "Forest"}, ": label", "red circle"),
        (GOOD | {"label": None}, ": label", "red circle"),
        (GOOD | {"label": [1]}, ": label", "red circle"),
        (GOOD | {"loser": "torn.png"}, ": {root}/torn.png", "readable image"),
    ],
)
def test_what_is_no_pair_is_named_by_file_and_line(tmp_path: Path, line: object, field: str, allowed: str) -> None:
    root = write_pairs(tmp_path / "liked")
    save(tmp_path / "secret.png", noise(9))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    corrupt(save(root / "torn.png", noise(8)), "truncated")
    text = line if isinstance(line, str) else json.dumps(line).replace("{root}", str(root))
    file = root / "pairs.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(BadInput) as error:
        PreferencePairs(root, size=16).draw(1, rng())
    assert error.value.field == f"{file}:2" + field.replace("{root}", str(root))
    assert allowed in error.value.allowed


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", "[1]", '["a", "a"]'])
def test_labels_that_are_no_list_of_names_are_refused(tmp_path: Path, text: str) -> None:
    (write_pairs(tmp_path / "liked") / "labels.json").write_text(text)
    with pytest.raises(BadInput, match=r"labels\.json.*a JSON list of different class names"):
        PreferencePairs(tmp_path / "liked")


def test_labels_need_their_list_and_a_folder_its_pairs(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "liked")
    (root / "labels.json").unlink()
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1: label.*no labels\.json"):
        PreferencePairs(root)
    (root / "pairs.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1: got .*JSON object"):
        PreferencePairs(root)
    (root / "pairs.jsonl").unlink()
    with pytest.raises(BadInput, match=r"pairs\.jsonl.*a readable text file"):
        PreferencePairs(root)


def test_pairs_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield Preferred(winner=noise(0), loser=noise(1))
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="power"):
        write_preferences(tmp_path / "liked", broken(), ())
    with pytest.raises(BadInput, match="pairs: got 0"):
        write_preferences(tmp_path / "liked", iter(()), ())
    assert not list(tmp_path.iterdir())
    write_pairs(tmp_path / "liked")
    with pytest.raises(BadInput, match=r"out: got .*does not exist yet"):
        write_preferences(tmp_path / "liked", iter(()), ())


# --- pairs


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_sar_and_optical_are_cropped_and_turned_alike(tmp_path: Path, layout: str) -> None:
    pairs = SarOpticalPairs(PAIR_LAYOUTS[layout](tmp_path), size=16)
    assert pairs.layout == layout
    drawn = pairs.draw(64, rng())
    assert aligned(drawn) and aligned(pairs.items(range(len(pairs))))
    shifted = {"sar": drawn["sar"].roll(1, -1), "image": drawn["image"]}
    assert not aligned(shifted)  # the check sees one pixel


def test_drawn_crops_are_turned_and_come_from_everywhere(tmp_path: Path) -> None:
    ramp = np.arange(32, dtype=np.uint8)[None, :].repeat(32, 0)  # grey = column
    save(tmp_path / "train/sar/a.png", ramp)
    save(tmp_path / "train/opt/a.png", np.stack([ramp, ramp.T, ramp], axis=2))  # green = row
    crops = (SarOpticalPairs(tmp_path, size=16).draw(400, rng())["image"] + 1) * 127.5
    corners = {tuple(c[:2].amin((1, 2)).round().int().tolist()) for c in crops}
    assert {x for x, _ in corners} == {y for _, y in corners} == set(range(17))
    right, down = (crops[:, :2, 0, 1] - crops[:, :2, 0, 0]).round(), (crops[:, :2, 1, 0] - crops[:, :2, 0, 0]).round()
    assert len({(*a, *b) for a, b in zip(right.tolist(), down.tolist(), strict=True)}) == 8
    still = (SarOpticalPairs(tmp_path, size=16, dihedral=False).draw(50, rng())["image"] + 1) * 127.5
    assert torch.allclose(still[:, 0, :, 1:] - still[:, 0, :, :-1], torch.ones(1), atol=1e-3)


def test_a_pair_is_drawn_as_often_as_its_area(tmp_path: Path) -> None:
    for name, side, value in (("a", 16, 0), ("b", 48, 255)):
        save(tmp_path / f"train/sar/{name}.png", np.full((side, side), value, np.uint8))
        save(tmp_path / f"train/opt/{name}.png", np.full((side, side, 3), value, np.uint8))
    share = (SarOpticalPairs(tmp_path, size=16).draw(1000, rng())["sar"][:, 0, 0, 0] > 0).float().mean()
    assert share == pytest.approx(0.9, abs=0.04)


def test_items_tile_every_scene_once(tmp_path: Path) -> None:
    pairs = SarOpticalPairs(split_layout(tmp_path), "test", size=16)
    assert len(pairs) == 9
    rows = [torch.cat(list(pairs.items(range(3 * r, 3 * r + 3))["sar"][:, 0]), dim=1) for r in range(3)]
    whole = torch.from_numpy(noise(ord("c"), 48, 48, 1)) / 127.5 - 1
    assert torch.allclose(torch.cat(rows), whole, atol=1e-6)


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_train_and_test_share_no_scene_and_lose_none(tmp_path: Path, layout: str) -> None:
    root = PAIR_LAYOUTS[layout](tmp_path)
    opened = {split: SarOpticalPairs(root, split, size=16) for split in ("train", "test")}
    scenes = {split: {pairs.scene_of(i) for i in range(len(pairs))} for split, pairs in opened.items()}
    assert scenes["train"] and scenes["test"] and not scenes["train"] & scenes["test"]
    files = [pair.sar for pairs in opened.values() for pair in pairs.pairs]
    on_disk = {f for f in root.rglob("*.*") if f.parent.name == "sar" or f.parent.name.startswith("s1_")}
    assert len(files) == len(on_disk) and {f.resolve() for f in on_disk} == set(files)


def test_scenes_of_the_class_layout_are_rois_across_classes(tmp_path: Path) -> None:
    root = class_layout(tmp_path)
    both = [SarOpticalPairs(root, split, size=16) for split in ("train", "test")]
    assert {pair.scene for pairs in both for pair in pairs.pairs} == {f"ROIs1868_summer_{k}" for k in (1, 2, 3, 4)}


def test_names_without_a_patch_number_are_divided_by_class(tmp_path: Path) -> None:
    for kind in ("agri", "urban"):
        for name in ("x.png", "y.png"):
            save_pair(tmp_path / kind / "sar" / name, tmp_path / kind / "opt" / name, 1)
    (tmp_path / "docs").mkdir()  # a folder that is no class is no error
    train, test = (SarOpticalPairs(tmp_path, split, size=16) for split in ("train", "test"))
    assert {p.scene for p in train.pairs} | {p.scene for p in test.pairs} == {"agri", "urban"}
    assert len(train.pairs) == len(test.pairs) == 2


def test_a_region_is_read_from_the_metadata(tmp_path: Path) -> None:
    root = split_layout(tmp_path)
    train = SarOpticalPairs(root, "train", size=16)
    assert (train.scene_of(0), train.region_of(0)) == ("a", "North")
    assert (train.scene_of(9), train.region_of(9)) == ("b", None)
    assert SarOpticalPairs(root, "test", size=16).region_of(8) == "South"
    (root / "metadata.json").write_text("{")
    with pytest.raises(BadInput, match=r"metadata\.json"):
        SarOpticalPairs(root, size=16).region_of(0)


def test_sar_with_three_equal_channels_is_one_channel_and_colour_is_refused(tmp_path: Path) -> None:
    root = split_layout(tmp_path)
    grey = SarOpticalPairs(root, size=16).items([0])["sar"]
    file = root / "train/sar/a.webp"
    save(file, noise(ord("a"), 48, 48, 1)[:, :, None].repeat(3, axis=2))
    assert torch.equal(SarOpticalPairs(root, size=16).items([0])["sar"], grey)
    save(file, noise(0, 48, 48))
    with pytest.raises(BadInput, match=r"sar/a\.webp.*colour"):
        SarOpticalPairs(root, size=16).draw(1, rng())


@pytest.mark.parametrize("lost", ["sar", "opt"])
def test_a_missing_partner_is_named(tmp_path: Path, lost: str) -> None:
    root = split_layout(tmp_path)
    (root / "train" / lost / "b.webp").unlink()
    with pytest.raises(BadInput, match=rf"b\.webp: got 'no partner'.*{lost}"):
        SarOpticalPairs(root, size=16)


def test_a_missing_sen12_folder_and_patch_are_named(tmp_path: Path) -> None:
    root = sen12_layout(tmp_path)
    (root / "ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p2.png").unlink()
    with pytest.raises(BadInput, match=r"ROIs1158_spring_s1_1_p2\.png"):
        SarOpticalPairs(root, size=16)
    (root / "ROIs1158_spring/s2_1").rename(root / "elsewhere")
    with pytest.raises(BadInput, match="s2_1"):
        SarOpticalPairs(root, size=16)


def test_pairs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    root = split_layout(tmp_path)
    with pytest.raises(BadInput, match=r"a\.webp.*48x48.*at least the crop size, 64 px"):
        SarOpticalPairs(root, size=64).draw(1, rng())
    save(root / "train/opt/b.webp", noise(0, 40, 48))
    with pytest.raises(BadInput, match=r"sar/b\.webp.*48x48.*48x40 px in .*opt/b\.webp"):
        SarOpticalPairs(root, size=16).draw(1, rng())
    corrupt(root / "train/sar/a.webp", "truncated")
    with pytest.raises(BadInput, match=r"sar/a\.webp"):
        SarOpticalPairs(root, size=16).draw(1, rng())


def test_folders_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"CLASS/\{sar,opt\}"):
        SarOpticalPairs(tmp_path)
    with pytest.raises(BadInput, match=r"layout: got 'tiles'; allowed: auto \| split \| class \| sen12"):
        SarOpticalPairs(tmp_path, layout="tiles")
    save_pair(tmp_path / "agri/sar/R_1_p1.png", tmp_path / "agri/opt/R_1_p1.png", 0)
    with pytest.raises(BadInput, match=r"one scene only \(R_1\)"):
        SarOpticalPairs(tmp_path)
    (tmp_path / "agri/sar/R_1_p1.png").unlink()
    (tmp_path / "agri/opt/R_1_p1.png").unlink()
    with pytest.raises(BadInput, match="with SAR/optical pairs"):
        SarOpticalPairs(tmp_path)


def test_the_real_pairs_open() -> None:
    sentinel = SarOpticalPairs(real("sentinel-pairs"), "test", limit=2)
    assert (sentinel.layout, len(sentinel)) == ("split", 2 * 256)
    assert {sentinel.region_of(0), sentinel.region_of(511)} <= {"California", "Texas"}
    sen12 = [SarOpticalPairs(real("sen12-pairs"), split, size=128) for split in ("train", "test")]
    assert [data.layout for data in sen12] == ["class", "class"] and sum(len(data) for data in sen12) == 80 * 4


@pytest.mark.parametrize("bands", ["HH", "VV,VV", "", "vv"])
def test_bands_that_pictures_cannot_have_are_refused(tmp_path: Path, bands: str) -> None:
    with pytest.raises(BadInput, match="VV, VH or VV,VH") as error:
        SarOpticalPairs(split_layout(tmp_path), bands=bands)
    assert error.value.field == "bands"


# --- pairs in decibels


def ramp_pair(root: Path) -> Path:
    """One pair whose SAR holds every level from 0 to 255, once a row."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(root / "train/sar/a.png", levels)
    save(root / "train/opt/a.png", noise(1))
    return root


def in_decibels(seen: torch.Tensor, low: float) -> NDArray[np.floating]:
    """Back from [-1, 1] by a clip range that ends at 0 dB."""
    return np.asarray((seen.double().numpy() + 1) / 2 * -low + low)


def test_stretched_decibels_are_linear_in_the_levels(tmp_path: Path) -> None:
    root = ramp_pair(tmp_path)
    options = {"size": 16, "radiometry": "sentinel1-db", "units": "stretched-db"}
    seen = SarOpticalPairs(root, bands="VV", **options).items([0])["sar"][0]
    found = in_decibels(seen[0], -25).ravel()
    expected = -5.3 - 7.3 + 20 * (np.arange(256) / 255 - 0.5)
    assert np.allclose(found, np.clip(expected, -25, 0), atol=1e-4) and (seen[1] == 0).all()
    vh = in_decibels(SarOpticalPairs(root, bands="VH", **options).items([0])["sar"][0, 1], -32.5).ravel()
    assert np.allclose(vh, expected - 13 + 5.3, atol=1e-4)  # its white is lower by as much


def test_digital_numbers_are_logarithmic_below_white(tmp_path: Path) -> None:
    pairs = SarOpticalPairs(ramp_pair(tmp_path), size=16, radiometry="sentinel1-db")
    found = in_decibels(pairs.items([0])["sar"][0, 1], -32.5).ravel()
    expected = -13 + 20 * np.log10(np.maximum(np.arange(256), 0.5) / 255)
    assert pairs.units == "dn" and np.allclose(found, np.maximum(expected, -32.5), atol=1e-4)


@pytest.mark.parametrize(("units", "step"), [("stretched-db", 20 / 255), ("dn", 20 * np.log10(255 / 254))])
def test_training_fills_the_steps_and_what_was_clipped(tmp_path: Path, units: str, step: float) -> None:
    pairs = SarOpticalPairs(ramp_pair(tmp_path), size=16, radiometry="sentinel1-db", bands="VV", units=units)
    for level, beyond in ((254, 0.0), (255, 2.0)):
        values = np.full((1, 100, 100), level, np.uint8)
        plain, drawn = pairs._decibels(values, "VV", None), pairs._decibels(values, "VV", rng())
        assert np.ptp(plain) == 0 and len(np.unique(drawn)) > 5000
        assert (drawn - plain).mean() == pytest.approx(beyond, abs=0.08)
        assert (drawn - plain).min() > -0.51 * step
        if not beyond:
            assert (drawn - plain).min() < -0.49 * step and 0.49 * step < (drawn - plain).max() < 0.51 * step


HEARD = rng(9).normal(-12, 3, (4000, 8, 8))


@pytest.mark.parametrize(
    ("bands", "without"),
    [
        (("VH",), {"VV": 0.4, "VH": 0.25}),
        (("VV",), {"VH": 0.4, "VV": 0.25}),
        (("VV", "VH"), {"VV": 0.25, "VH": 0.25}),
    ],
)
def test_a_polarisation_is_left_out_whole_and_never_both(bands: tuple[str, ...], without: dict[str, float]) -> None:
    seen = simulated({band: HEARD for band in bands}, rng())
    assert seen.keys() == without.keys()
    none = {band: np.isnan(values) for band, values in seen.items()}
    for band, share in without.items():
        gone = none[band].all((1, 2))
        assert (gone == none[band].any((1, 2))).all()
        assert gone.mean() == pytest.approx(share, abs=0.03)
    assert not (none["VV"] & none["VH"]).any()


@pytest.mark.parametrize(("real", "other", "ratio"), [("VH", "VV", 7.7), ("VV", "VH", -7.7)])
def test_a_simulated_polarisation_lies_on_its_side_of_the_real_one(real: str, other: str, ratio: float) -> None:
    seen = simulated({real: HEARD}, rng())
    apart = (seen[other] - seen[real])[~np.isnan(seen[other] - seen[real]).any((1, 2))]
    assert apart.mean() == pytest.approx(ratio, abs=0.2)
    assert apart.mean((1, 2)).std() == pytest.approx(2.0, abs=0.15)  # from crop to crop
    within = apart - apart.mean((1, 2), keepdims=True)
    assert 0.5 < within.std() < 3  # speckle of its own
    gain = (seen[real] - HEARD)[~np.isnan(seen[real]).any((1, 2))]
    assert np.ptp(gain, axis=(1, 2)).max() < 1e-9  # one for a crop
    assert gain.mean() == pytest.approx(0, abs=0.1) and gain.std() == pytest.approx(1.5, abs=0.1)


def test_two_real_polarisations_keep_their_ratio() -> None:
    seen = simulated({"VV": HEARD, "VH": HEARD - 5}, rng())
    apart = seen["VV"] - seen["VH"]
    assert np.isnan(apart).any() and np.nanmax(np.abs(apart - 5)) < 1e-9


def test_what_is_simulated_is_a_function_of_the_random_generator() -> None:
    first, again, other = (simulated({"VH": HEARD[:50]}, rng(seed)) for seed in (1, 1, 2))
    for band in ("VV", "VH"):
        assert np.array_equal(first[band], again[band], equal_nan=True)
        assert not np.array_equal(first[band], other[band], equal_nan=True)


# --- levels that are told to be absolute or not


LAND = rng(5).normal(-12, 3, (2000, 8, 8))


@pytest.mark.parametrize("calibrated", [True, False])
def test_levels_vary_by_what_is_known_of_them(calibrated: bool) -> None:
    """Shown as they are: gain and slope; a share is shown as the other kind, calibrated ones at another's white."""
    anchor = np.full(len(LAND), 6.0)
    seen, absolute = varied({"VV": LAND}, calibrated, {"VV": anchor} if calibrated else {}, rng())
    heard, other = ~np.isnan(seen["VV"]).any((1, 2)), (absolute != calibrated)[:, 0, 0]
    assert absolute.shape == (2000, 1, 1) and other.mean() == pytest.approx(0.3, abs=0.04)
    shift = np.median(seen["VV"], (1, 2)) - np.median(LAND, (1, 2))
    as_they_are, as_others = shift[heard & ~other], shift[heard & other]
    assert as_they_are.mean() == pytest.approx(0, abs=0.15) and as_others.std() == pytest.approx(1.5, abs=0.2)
    assert as_they_are.std() == pytest.approx(0.35 if calibrated else 1.5, abs=0.2)  # 0.3, and the added speckle's
    assert as_others.mean() == pytest.approx(6 if calibrated else 0, abs=0.25)


def test_slopes_and_speckle_vary_from_crop_to_crop() -> None:
    even, ramp = np.full((500, 32, 32), -9.0), np.broadcast_to(np.linspace(-20, 0, 32), (500, 32, 32))
    noisy, _ = varied({"VV": even}, True, {"VV": np.zeros(500)}, rng())
    spread = noisy["VV"].std((1, 2))[~np.isnan(noisy["VV"]).any((1, 2))]
    assert spread.min() < 0.2 and 1.2 < spread.max() < 2
    bent, _ = varied({"VV": ramp}, True, {"VV": np.zeros(500)}, rng())
    columns = bent["VV"][~np.isnan(bent["VV"]).any((1, 2))].mean(1)
    slopes = np.polyfit(ramp[0, 0], columns.T, 1)[0]
    assert 0.8 < slopes.min() < 0.9 and 1.1 < slopes.max() < 1.2 and slopes.mean() == pytest.approx(1, abs=0.02)


def test_only_a_model_that_is_told_sees_levels_varied_so(tmp_path: Path) -> None:
    options = {"size": 16, "bands": "VV"}
    one, other = (
        SarOpticalPairs(ramp_pair(tmp_path), **options, radiometry=name).draw(64, rng())["sar"]
        for name in ("sentinel1-db", "sentinel1")
    )
    assert (
        one.shape == (64, 2, 16, 16)
        and other.shape == (64, 3, 16, 16)
        and set(other[:, 2].unique().tolist()) == {-1, 1}
    )
    flat = (other[:, 2].amax((1, 2)) == other[:, 2].amin((1, 2))).all()
    assert flat and (other[:, 2, 0, 0] == 1).float().mean() == pytest.approx(0.3, abs=0.2)
    again = SarOpticalPairs(ramp_pair(tmp_path), **options, radiometry="sentinel1").draw(64, rng())["sar"]
    assert torch.equal(other, again)  # a pure function of the generator
    assert (SarOpticalPairs(ramp_pair(tmp_path), **options, radiometry="sentinel1").items([0])["sar"][:, 2] == -1).all()


# --- one optical scale


def test_colours_are_brought_to_another_scale_and_clipped(tmp_path: Path) -> None:
    root = ramp_pair(tmp_path)
    plain = SarOpticalPairs(root, size=16).scenes[0]
    told = {"gain": [1.4, 1, 0.5], "offset": [0, -20, 80.2]}
    scene = SarOpticalPairs(root, size=16, colours=told).scenes[0]
    expected = np.clip(np.rint(plain[..., 1:] * np.array(told["gain"]) + np.array(told["offset"])), 0, 255)
    assert scene.dtype == np.uint8 and np.array_equal(scene[..., 1:], expected) and expected.max() == 255
    assert np.array_equal(scene[..., 0], plain[..., 0])  # the SAR stays


@pytest.mark.parametrize(
    "colours",
    [{}, {"gain": 2}, {"gain": [1, 1]}, {"gain": [1, 1, "x"]}, {"gain": [1, 1, 1], "gamma": 2}, [1, 1, 1]],
)
def test_colours_that_are_none_are_refused(tmp_path: Path, colours: object) -> None:
    with pytest.raises(BadInput, match="gain = ") as error:
        SarOpticalPairs(ramp_pair(tmp_path), size=16, colours=colours)  # type: ignore[arg-type]
    assert error.value.field == "colours"


# --- balance over land covers


def coast(root: Path) -> Path:
    """A scene of 160 px of which a strip of 8 px, a twentieth, is water."""
    colour = np.full((160, 160, 3), 120, np.uint8) + noise(0, 160, 160) // 8
    colour[:, :8] = (10, 20, 90)
    save(root / "train/sar/a.png", noise(1, 160, 160, 1))
    save(root / "train/opt/a.png", colour)
    return root


def test_rare_ground_is_drawn_by_the_root_of_its_area(tmp_path: Path) -> None:
    root = coast(tmp_path)
    wet = {}
    for balance in (0, 2):
        data = SarOpticalPairs(root, size=8, balance=balance, dihedral=False)
        image = data.draw(4000, rng())["image"]
        wet[balance] = float((image[:, 0, :, 2] < -0.7).float().mean())
        assert torch.equal(
            image, SarOpticalPairs(root, size=8, balance=balance, dihedral=False).draw(4000, rng())["image"]
        )
    tiles, starts, likely = data._ground
    few, many = sorted(np.diff(starts))
    assert len(tiles) == 39 * 39 and few < 0.06 * many
    assert sorted(likely) == pytest.approx([few**0.5 / (few**0.5 + many**0.5), many**0.5 / (few**0.5 + many**0.5)])
    assert wet[0] < 0.06 and 2 * wet[0] < wet[2] < 0.3


def test_balanced_crops_lie_anywhere_in_their_pair(tmp_path: Path) -> None:
    places = SarOpticalPairs(coast(tmp_path), size=8, balance=2)._balanced(4000, rng())
    assert (places[:, 0] == 0).all() and places[:, 1:].min() == 0 and places[:, 1:].max() == 152
    assert len(np.unique(places[:, 1])) > 140  # not only where the tiles stand


def test_mixed_pairs_keep_their_shares_when_balanced(tmp_path: Path) -> None:
    paths = coast(tmp_path / "a"), plain_pairs(tmp_path / "b", 255, (48,))
    sources = [{"path": path, "share": share} for path, share in zip(paths, (3, 1), strict=True)]
    mixed = MixedPairs(sources, size=16, balance=1, radiometry="amplitude")
    drawn = mixed.draw(2000, rng())["image"]
    assert (drawn.amin((1, 2, 3)) == 1).float().mean() == pytest.approx(0.25, abs=0.03)
    with pytest.raises(BadInput, match="balance: got 500"):
        MixedPairs(sources, size=16, balance=500).draw(1, rng())
    with pytest.raises(BadInput, match="balance: got -1"):
        MixedPairs(sources, size=16, balance=-1)


# --- mixed pairs


def plain_pairs(root: Path, value: int, sides: tuple[int, ...] = (16,)) -> Path:
    for k, side in enumerate(sides):
        save(root / f"train/sar/{k}.png", np.full((side, side), value, np.uint8))
        save(root / f"train/opt/{k}.png", np.full((side, side, 3), value, np.uint8))
    return root


def test_sources_are_drawn_by_their_shares(tmp_path: Path) -> None:
    paths = [plain_pairs(tmp_path / name, value, sides) for name, value, sides in (("a", 0, (16,)), ("b", 255, (96,)))]
    sources = [{"path": path, "share": share} for path, share in zip(paths, (3, 1), strict=True)]
    mixed = MixedPairs(sources, size=16, radiometry="amplitude")
    drawn = mixed.draw(2000, rng())
    assert drawn["sar"].shape == (2000, 1, 16, 16) and torch.equal(drawn["sar"][:, 0], drawn["image"][:, 0])
    assert (drawn["sar"][:, 0, 0, 0] < 0).float().mean() == pytest.approx(0.75, abs=0.03)
    assert mixed.name == "a+b" and mixed.draw(0, rng())["image"].shape == (0, 3, 16, 16)
    for share in (0, -1, "half"):
        with pytest.raises(BadInput, match=r"share: .*above 0"):
            MixedPairs([{"path": paths[0], "share": share}], size=16)


def test_items_of_mixed_pairs_are_those_of_the_sources_in_turn(tmp_path: Path) -> None:
    roots = split_layout(tmp_path / "split"), class_layout(tmp_path / "class")
    options = {"split": "test", "size": 16, "radiometry": "sentinel1-db"}
    sources = [{"path": roots[0], "bands": "VH"}, {"path": roots[1], "bands": "VV", "units": "stretched-db"}]
    mixed, parts = MixedPairs(sources, **options), [SarOpticalPairs(**source, **options) for source in sources]
    assert len(mixed) == sum(map(len, parts)) and len(mixed.items([])["sar"]) == 0
    whole = mixed.items(range(len(mixed)))
    for key, values in whole.items():
        assert torch.equal(values, torch.cat([part.items(range(len(part)))[key] for part in parts]))
    chosen = [len(mixed) - 1, 0, len(parts[0]), len(parts[0]) - 1]
    assert all(torch.equal(mixed.items(chosen)[key], whole[key][chosen]) for key in whole)
    assert (whole["sar"][: len(parts[0]), 0] == 0).all() and (whole["sar"][len(parts[0]) :, 1] == 0).all()
    assert mixed.region_of(0) == "split, South"
    assert mixed.region_of(len(mixed) - 1) in ("class, agri", "class, urban")
    (roots[0] / "metadata.json").unlink()
    assert MixedPairs(sources, **options).region_of(0) == "split"


def test_a_mixed_batch_is_as_wide_as_the_model(tmp_path: Path) -> None:
    sources = [
        {"path": split_layout(tmp_path / "a"), "bands": "VH"},
        {"path": class_layout(tmp_path / "b"), "bands": "VV"},
    ]
    drawn = open_data("mixed-pairs", sources=sources, size=16).draw(400, rng())
    assert drawn["sar"].shape == (400, 2, 16, 16) and drawn["sar"].isfinite().all() and drawn["sar"].abs().max() <= 1
    gone = (drawn["sar"] == 0).all((2, 3)).float().mean(0)
    assert 0.2 < gone[0] < 0.45 and 0.2 < gone[1] < 0.45  # both are real in one source and simulated in the other


# --- shapes


def test_items_depend_on_seed_split_and_index_only() -> None:
    first = CaptionedShapes(seed=3).items([5, 123_456_789])["image"]  # endless: far beyond len
    assert torch.equal(first, CaptionedShapes(seed=3).items([5, 123_456_789])["image"])
    for other in (CaptionedShapes(seed=4), CaptionedShapes(seed=3, split="test")):
        assert not torch.equal(first, other.items([5, 123_456_789])["image"])


@pytest.mark.parametrize("shade", SHADES)
def test_a_shade_changes_the_background_alone(shade: str) -> None:
    usual, shaded = CaptionedShapes(), CaptionedShapes(shade=shade)
    what, other = usual.scenes(range(50)), shaded.scenes(range(50))
    assert set(other.shade.tolist()) == {list(SHADES).index(shade)} != set(what.shade.tolist())
    assert np.array_equal(what.centre, other.centre) and np.array_equal(what.colour, other.colour)
    assert all(caption.endswith(f"on a {shade} background") for caption in shaded.captions(range(50)))
    corner = (shaded.draw(50, rng())["image"][:, :, 0, 0] + 1) / 2
    assert (corner - SHADES[shade]).abs().max() < 0.07


def test_a_limit_leaves_a_handful_of_one_class() -> None:
    few, whole = CaptionedShapes(limit=5), CaptionedShapes()
    known = {picture.numpy().tobytes() for picture in whole.items(range(5))["image"]}
    assert len(few) == 5 and {picture.numpy().tobytes() for picture in few.draw(100, rng())["image"]} == known
    with pytest.raises(BadInput, match="0 to 4"):
        few.items([5])
    crosses = open_data("shapes", limit=136, classes=["red cross"])
    assert len(crosses) == 8 and len({p.numpy().tobytes() for p in crosses.draw(100, rng())["image"]}) == 8


def test_captions_agree_with_the_picture() -> None:
    """Read the picture: which palette colours there are, where, and how large; then hold that against the words."""
    data, count, side = CaptionedShapes(64, split="test"), 300, 64
    pictures = (data.items(range(count))["image"].permute(0, 2, 3, 1).numpy() + 1) / 2
    labels, captions = data.items(range(count))["label"], data.captions(range(count))
    related = 0
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        assert caption == data.caption(i)
        body, shade = caption.removesuffix(" background").split(" on a ")
        grey = np.median(picture)  # the background is more than half of every picture
        assert min(SHADES, key=lambda name: abs(SHADES[name] - grey)) == shade, caption
        relation = next((r for r in RELATIONS if f" {r} " in body), None)
        things = body.split(f" {relation} ") if relation else [body]
        size, colour, shape = things[0].split()[1:]
        assert LABELS[labels[i]] == f"{colour} {shape}"
        colours = [thing.split()[2] for thing in things]
        for name in COLOURS:
            assert bool(seen(picture, name).any()) == (name in colours), caption
        if relation and colours[0] != colours[1]:
            related += 1
            ys, xs = (np.array([np.nonzero(seen(picture, c))[axis].mean() for c in colours]) for axis in (0, 1))
            across, down = xs[0] - xs[1], ys[0] - ys[1]
            offset = {"left of": -across, "right of": across, "above": -down, "below": down}[relation]
            assert offset > 0.15 * side and offset > max(abs(across), abs(down)) - 1, caption
            extents = [np.ptp(np.nonzero(seen(picture, c))[1]) for c in colours]
            assert extents[0] > extents[1], caption
        if not relation:
            assert (np.ptp(np.nonzero(seen(picture, colour))[1]) > 0.3 * side) == (size == "large"), caption
    assert related > 80


def seen(picture: NDArray[np.float32], colour: str) -> NDArray[np.bool_]:
    """(H,W): the pixels that are fully of that colour of the palette."""
    return np.asarray(np.abs(picture - np.array(COLOURS[colour], np.float32)).max(axis=-1) < 0.01)


def test_each_shape_covers_its_own_part_of_its_box() -> None:
    """The four shapes are told apart by how much of their bounding box they fill: disc, square, triangle, cross."""
    data = CaptionedShapes(128)
    what = data.scenes(range(80))
    pictures = (data.items(range(80))["image"].permute(0, 2, 3, 1).numpy() + 1) / 2
    filled: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for i in np.flatnonzero(~what.second):
        ys, xs = np.nonzero(seen(pictures[i], list(COLOURS)[what.colour[i, 0]]))
        filled[SHAPES[what.shape[i, 0]]].append(len(xs) / (np.ptp(xs) + 1) / (np.ptp(ys) + 1))
    expected = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 1 - (1 - 0.36) ** 2}
    for shape, shares in filled.items():
        assert shares and np.allclose(shares, expected[shape], atol=0.06), shape


def test_objects_stay_inside_and_apart() -> None:
    what = CaptionedShapes().scenes(range(2000))
    radius = np.array(list(SIZES.values()))[what.size]
    present = np.stack([np.ones_like(what.second), what.second], axis=1)
    room = np.minimum(what.centre, 1 - what.centre).min(axis=2) - radius
    assert room[present].min() > 0
    apart = np.abs(what.centre[:, 0] - what.centre[:, 1]).max(axis=1) - radius.sum(axis=1)
    assert apart[what.second].min() > 1 / 32  # a pixel at least at 32 px
    assert 0.45 < what.second.mean() < 0.55


def test_one_object_stands_alone_is_large_and_keeps_the_margin() -> None:
    data = CaptionedShapes(48, split="test", objects=1)  # the margin is more than a pixel and half an edge
    what = data.scenes(range(1000))
    radius = what.radius[:, 0]
    assert not what.second.any() and ALONE[0] <= radius.min() < 0.25 and 0.41 < radius.max() <= ALONE[1]
    assert (np.minimum(what.centre[:, 0], 1 - what.centre[:, 0]).min(axis=1) - radius).min() > 0.03 - 1e-6
    items, captions = data.items(range(300)), data.captions(range(300))
    pictures = (items["image"].permute(0, 2, 3, 1).numpy() + 1) / 2
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        coloured = np.ptp(picture, axis=2) > 0.01
        assert label(coloured)[1] == 1 and not coloured[[0, -1]].any() and not coloured[:, [0, -1]].any()
        body, shade = caption.removesuffix(" background").split(" on a ")
        size, colour, shape = body.split()[1:]
        assert LABELS[items["label"][i]] == f"{colour} {shape}" and (radius[i] > sum(ALONE) / 2) == (size == "large")
        assert [name for name in COLOURS if seen(picture, name).any()] == [colour]
        assert abs(picture[0, 0, 0] - SHADES[shade]) < 0.07


def test_pictures_of_two_objects_are_what_they_always_were() -> None:
    """The checksum is of the pictures before there was an option, in whole hundredths of the half range."""
    for data in (CaptionedShapes(32), CaptionedShapes(32, objects=2)):
        image = ((data.items(range(8))["image"] + 1) * 100).round().byte()
        assert hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] == "95a094007da8a10a"


def test_every_label_is_drawn_equally_often() -> None:
    labels = CaptionedShapes(8).draw(24_000, rng())["label"]
    assert len(LABELS) == 24 and LABELS[0] == "red circle"
    assert torch.bincount(labels, minlength=24).float().sub(1000).abs().max() < 150


def test_edges_are_antialiased() -> None:
    data = CaptionedShapes(32)
    i = next(i for i, c in enumerate(data.captions(range(100))) if c.startswith("a large red circle on a dark"))
    red = data.items([i])["image"][0, 0]
    assert 10 < int(((red > red.min() + 0.05) & (red < red.max() - 0.05)).sum()) < 60
