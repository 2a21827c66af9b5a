"""The layouts of SAR/optical pairs: as they are published, divided by scene or ground, refused where they leak."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import noise, real, rng, save, save_pair
from numpy.typing import NDArray

from distillers.data.layouts import LAYOUTS, find_pairs
from distillers.data.pair_rasters import on_one_map
from distillers.data.sar_optical import SarOpticalPairs
from distillers.errors import BadInput, Notice

rasterio = pytest.importorskip("rasterio")

PIXEL = 10.0  # metres
UTM = "EPSG:32631"


def raster(
    path: Path,
    values: NDArray[Any],
    at: tuple[float, float] = (500_000, 4_800_000),
    crs: str | None = UTM,
    names: tuple[str, ...] = (),
    nodata: float | None = None,
) -> Path:
    """A GeoTIFF of (H,W,C) whose north-west corner is `at`, in metres."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = values.shape
    grid = rasterio.transform.from_origin(*at, PIXEL, PIXEL)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": values.dtype}
    with rasterio.open(path, "w", **profile, crs=crs, transform=grid, nodata=nodata) as out:
        out.write(values.transpose(2, 0, 1))
        if names:
            out.descriptions = names
    return path


def backscatter(seed: int, bands: int = 2, side: int = 32) -> NDArray[np.float32]:
    """Decibels of land, the second band 7 dB lower."""
    return (rng(seed).normal(-12, 3, (side, side, bands)) - 7 * np.arange(bands)).astype(np.float32)


def raster_pair(root: Path, name: str, east: float = 0, **how: Any) -> None:
    """At `east` metres from the others; names of 8 letters or fewer seed it."""
    seed = int.from_bytes(name.encode(), "little") % 2**31
    raster(root / f"sar/{name}.tif", backscatter(seed), (500_000 + east, 4_800_000), **how)
    raster(root / f"opt/{name}.tif", noise(seed, 32, 32), (500_000 + east, 4_800_000), **how)


# --- the layouts, as published


def split(root: Path) -> set[str]:
    for part, names in {"train": ("a_p1", "a_p2", "b"), "test": ("c",)}.items():
        for k, name in enumerate(names):
            save_pair(root / f"{part}/sar/{name}.png", root / f"{part}/opt/{name}.png", 10 * k + len(part), 16)
    return {"a", "b", "c"}


def of_class(root: Path) -> set[str]:
    for k, name in enumerate(("agri/sar/ROIs1868_summer_1_p1", "agri/sar/ROIs1868_summer_2_p7", "urban/sar/x")):
        save_pair(root / f"{name}.png", root / f"{name.replace('sar', 'opt')}.png", k, 16)
    return {"ROIs1868_summer_1", "ROIs1868_summer_2", "urban"}


def sen12(root: Path) -> set[str]:
    for k, (season, scene) in enumerate([("ROIs1158_spring", 1), ("ROIs1158_spring", 106), ("ROIs1868_summer", 1)]):
        for patch in (30, 31):
            sar, opt = (f"{season}/s{i}_{scene}/{season}_s{i}_{scene}_p{patch}.png" for i in (1, 2))
            save_pair(root / sar, root / opt, 100 * k + patch, 16)
    return {"ROIs1158_spring/s1_1", "ROIs1158_spring/s1_106", "ROIs1868_summer/s1_1"}


def sen12ms(root: Path) -> set[str]:
    for k, (season, scene) in enumerate([("ROIs1158_spring", 1), ("ROIs1970_fall", 1), ("ROIs2017_winter", 8)]):
        for patch in (30, 31):
            sar, opt, cover = (
                root / f"{season}/{kind}_{scene}/{season}_{kind}_{scene}_p{patch}.tif" for kind in ("s1", "s2", "lc")
            )
            raster(sar, backscatter(10 * k + patch))
            raster(opt, rng(k).integers(1, 4000, (32, 32, 13), dtype=np.uint16))
            raster(cover, np.ones((32, 32, 4), np.uint16))
    return {"ROIs1158_spring/s1_1", "ROIs1970_fall/s1_1", "ROIs2017_winter/s1_8"}


def qxs(root: Path) -> set[str]:
    for number in (1, 499, 500, 777, 1000, 19_999):
        save_pair(root / f"sar_256_oc_0.2/{number}.png", root / f"opt_256_oc_0.2/{number}.png", number, 16)
    return {"block 0", "block 1", "block 2", "block 39"}


def sar2opt(root: Path) -> set[str]:
    """The published split cuts scene 1 between rows 240 and 480, of patches that are 600 px high."""
    published = {"train": ("1_0_0", "1_240_0", "2_0_0", "2_0_240"), "test": ("1_480_0", "13_3360_960")}
    for part, names in published.items():
        for k, name in enumerate(names):
            save_pair(root / f"{part}A/{name}.png", root / f"{part}B/{name}.png", 10 * k + len(part), 16)
    return {"1", "2", "13"}


def geotiff(root: Path) -> set[str]:
    """Three stretches of ground: a, b and c in a row, d that overlaps e, f alone."""
    for name, east in {"a": 0, "b": 320, "c": 640, "d": 5000, "e": 5100, "f": 9000}.items():
        raster_pair(root, name, east)
    return {"a", "d", "f"}


PUBLISHED = {
    "split": split, "class": of_class, "sen12": sen12, "sen12ms": sen12ms, "qxs": qxs, "sar2opt": sar2opt,
    "geotiff": geotiff,
}  # fmt: skip


def test_every_layout_is_tried_here() -> None:
    assert PUBLISHED.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_layout_is_recognised_and_divided_by_scene_without_a_loss(tmp_path: Path, layout: str) -> None:
    scenes = PUBLISHED[layout](tmp_path)
    for name in ("auto", layout):
        found = {part: find_pairs(tmp_path, part, name) for part in ("train", "test")}
        assert {kind for kind, _ in found.values()} == {layout}
        named = {part: {pair.scene for pair in pairs} for part, (_, pairs) in found.items()}
        assert named["train"] | named["test"] == scenes and not named["train"] & named["test"]
        files = [file for _, pairs in found.values() for pair in pairs for file in (pair.sar, pair.optical)]
        on_disk = {f for f in tmp_path.rglob("*.*") if f.is_file() and "_lc_" not in f.name}
        assert len(files) == len(on_disk) and set(files) == on_disk
    again = find_pairs(tmp_path, "test", layout)
    assert again == found["test"]


@pytest.mark.parametrize("layout", PUBLISHED)
def test_pairs_of_every_layout_are_drawn(tmp_path: Path, layout: str) -> None:
    PUBLISHED[layout](tmp_path)
    pairs = SarOpticalPairs(tmp_path, size=16, radiometry="sentinel1-db")
    for batch in (pairs.draw(8, rng()), pairs.items([0])):
        assert batch["sar"].shape[1:] == (2, 16, 16) and batch["image"].shape[1:] == (3, 16, 16)
        for values in batch.values():
            assert values.isfinite().all() and values.abs().max() <= 1 and values.std() > 0.05
    assert pairs.units == ("db" if layout in ("sen12ms", "geotiff") else "dn")


@pytest.mark.parametrize("merged", [False, True])
def test_sen12ms_cr_is_read_as_it_unpacks_and_its_clouds_are_left_alone(tmp_path: Path, merged: bool) -> None:
    for k, (season, scene) in enumerate([("ROIs1158_spring", 1), ("ROIs1158_spring", 2), ("ROIs1970_fall", 1)]):
        for kind in ("s1", "s2", "s2_cloudy"):
            folder = tmp_path / (season if merged else f"{season}_{kind}") / f"{kind}_{scene}"
            values = backscatter(k) if kind == "s1" else rng(k).integers(1, 4000, (32, 32, 13), dtype=np.uint16)
            raster(folder / f"{season}_{kind}_{scene}_p30.tif", values)
    with pytest.warns(Notice, match="left out 3 files"):
        layout, pairs = find_pairs(tmp_path, "train")
    pairs += find_pairs(tmp_path, "test")[1]
    assert layout == "sen12ms" and len(pairs) == 3
    assert {pair.scene for pair in pairs} == {"ROIs1158_spring/s1_1", "ROIs1158_spring/s1_2", "ROIs1970_fall/s1_1"}
    assert all("_s1_" in pair.sar.name and "_s2_" in pair.optical.name for pair in pairs)
    shutil.rmtree(next(tmp_path.rglob("s2_2")))
    with pytest.raises(BadInput, match=r"s1_2.*no partner.*s2_2 of ROIs1158_spring"):
        find_pairs(tmp_path, "train")


def test_ground_is_one_across_the_antimeridian_and_whichever_way_longitudes_count() -> None:
    def quad(west: float, wide: float = 1.0) -> NDArray[np.float64]:
        return np.array([(west, 1), (west + wide, 1), (west + wide, 0), (west, 0)], np.float64)

    x = on_one_map([quad(179.5), quad(-179.8), quad(180.2), quad(-170.0)], ["EPSG:4326"] * 4)[..., 0]
    assert np.allclose(x[:, 0] - x[0, 0], [0, 0.7, 0.7, 10.5]) and np.allclose(np.ptp(x, axis=1), 1)
    zones = [(829_000.0, "EPSG:32660"), (170_000.0, "EPSG:32601"), (500_000.0, "EPSG:32660")]
    corners = [np.array([(e, 6e5), (e + 8e3, 6e5), (e + 8e3, 59e4), (e, 59e4)]) for e, _ in zones]
    x = on_one_map(corners, [rasterio.crs.CRS.from_string(zone) for _, zone in zones])[..., 0]
    assert (np.ptp(x, axis=1) < 0.1).all() and 0 < x[0].mean() - x[2].mean() < 3.2 and abs(x[0] - x[1]).max() < 0.2
    local = rasterio.crs.CRS.from_wkt('LOCAL_CS["site grid",UNIT["metre",1]]')
    with pytest.raises(BadInput, match="lead to degrees"):
        on_one_map(corners[:2], [rasterio.crs.CRS.from_epsg(32660), local])


def test_sar2opt_with_other_names_keeps_its_own_split(tmp_path: Path) -> None:
    for part, name in (("train", "north"), ("test", "south")):
        save_pair(tmp_path / f"{part}A/{name}.png", tmp_path / f"{part}B/{name}.png", len(part), 16)
    assert [pair.sar.stem for pair in find_pairs(tmp_path, "test")[1]] == ["south"]
    shutil.rmtree(tmp_path / "testB")
    with pytest.raises(BadInput, match="testB"):
        find_pairs(tmp_path, "test")


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"ROIsXXXX_season.*trainA|sar_256_oc_0\.2"):
        find_pairs(tmp_path, "train")
    with pytest.raises(BadInput, match=r"layout: got 'tiles'; allowed: auto \| split .*geotiff"):
        find_pairs(tmp_path, "train", "tiles")
    qxs(tmp_path)
    (tmp_path / "opt_256_oc_0.2/777.png").unlink()
    with pytest.raises(BadInput, match=r"777\.png.*no partner"):
        find_pairs(tmp_path, "train")
    for folder in ("sar", "opt"):
        (tmp_path / f"{folder}_256_oc_0.2/500.png").rename(tmp_path / f"{folder}_256_oc_0.2/ship.png")
    (tmp_path / "sar_256_oc_0.2/777.png").unlink()
    with pytest.raises(BadInput, match=r"ship\.png.*a number"):
        find_pairs(tmp_path, "train")


# --- leaks


def refused(root: Path, one: str, other: str, why: str) -> None:
    """Both splits are, and the error names both files."""
    for part in ("train", "test"):
        with pytest.raises(BadInput) as error:
            find_pairs(root, part)
        assert error.value.field == "split" and why in str(error.value)
        assert str(root / one) in error.value.given and str(root / other) in error.value.given


def two(root: Path, test: str = "b") -> Path:
    save_pair(root / "train/sar/a.png", root / "train/opt/a.png", 1, 16)
    save_pair(root / f"test/sar/{test}.png", root / f"test/opt/{test}.png", 2, 16)
    return root


def test_a_scene_in_both_splits_is_refused(tmp_path: Path) -> None:
    assert len(find_pairs(two(tmp_path / "whole"), "train")[1]) == 1
    refused(two(tmp_path / "same", "a"), "train/sar/a.png", "test/sar/a.png", "one scene, a")
    for part, patch in (("train", 1), ("test", 2)):
        name = f"ROIs1868_summer_59_p{patch}.png"
        save_pair(tmp_path / f"roi/{part}/sar/{name}", tmp_path / f"roi/{part}/opt/{name}", patch, 16)
    names = [f"{part}/sar/ROIs1868_summer_59_p{patch}.png" for part, patch in (("train", 1), ("test", 2))]
    refused(tmp_path / "roi", *names, "one scene, ROIs1868_summer_59")


@pytest.mark.parametrize("kind", ["sar", "opt"])
def test_a_file_in_both_splits_is_refused_whatever_its_name(tmp_path: Path, kind: str) -> None:
    root = two(tmp_path)
    shutil.copy(root / f"train/{kind}/a.png", root / f"test/{kind}/b.png")
    refused(root, f"train/{kind}/a.png", f"test/{kind}/b.png", "the same bytes")


def test_files_of_one_size_and_one_middle_are_still_two(tmp_path: Path) -> None:
    """Uncompressed pictures are alike in size; these differ in one corner, 12 kB from the middle."""
    for part, name, corner in (("train", "a", 0), ("test", "b", 255)):
        sar, optical = np.full((160, 160), 90, np.uint8), np.full((160, 160, 3), 90, np.uint8)
        sar[-1, -1] = optical[-1, -1] = corner
        save(tmp_path / f"{part}/sar/{name}.bmp", sar)
        save(tmp_path / f"{part}/opt/{name}.bmp", optical)
    assert len(find_pairs(tmp_path, "test")[1]) == 1
    shutil.copy(tmp_path / "train/opt/a.bmp", tmp_path / "test/opt/b.bmp")
    refused(tmp_path, "train/opt/a.bmp", "test/opt/b.bmp", "the same bytes")


def corners(left: float, top: float, side: float = 160) -> list[list[float]]:
    return [[left, top], [left + side, top], [left + side, top - side], [left, top - side]]


@pytest.mark.parametrize(
    ("other", "system", "leaks"),
    [
        (corners(160, 0), 3395, False),  # an edge in common
        (corners(160, 160), 3395, False),  # a corner
        (corners(150, 0), 3395, True),  # one pixel of ten metres
        (corners(40, -40, 20), 3395, True),  # wholly inside
        ([[170, 60], [230, 0], [170, -60], [110, 0]], 3395, True),  # turned, and over the middle of an edge
        ([[180, 60], [240, 0], [180, -60], [161, 0]], 3395, False),  # its box overlaps no more than its corner
        ([[0.0012, 0.0], [0.003, 0.0], [0.003, -0.001], [0.0012, -0.001]], 4326, True),  # degrees of 111 km
        ([[0.0016, 0.0], [0.003, 0.0], [0.003, -0.001], [0.0016, -0.001]], 4326, False),
    ],
)
def test_ground_that_metadata_puts_in_both_splits_is_refused(
    tmp_path: Path, other: list[list[float]], system: int, leaks: bool
) -> None:
    root = two(tmp_path)
    about = [{"id": "a", "corners_epsg3395": corners(0, 0)}, {"id": "b", f"corners_epsg{system}": other}]
    (root / "metadata.json").write_text(json.dumps(about))
    if leaks:
        refused(root, "train/sar/a.png", "test/sar/b.png", "overlapping ground")
    else:
        assert len(find_pairs(root, "train")[1]) == len(find_pairs(root, "test")[1]) == 1


@pytest.mark.parametrize("told", [[[0, 0], [1, 1]], "here", None])
def test_corners_that_are_none_are_refused(tmp_path: Path, told: object) -> None:
    root = two(tmp_path)
    (root / "metadata.json").write_text(json.dumps([{"id": "b", "corners_epsg3395": told}]))
    with pytest.raises(BadInput, match=r"b\.corners_epsg3395.*four corners"):
        find_pairs(root, "train")


def test_ground_in_both_splits_of_rasters_is_refused(tmp_path: Path) -> None:
    raster_pair(tmp_path / "train", "a")
    raster_pair(tmp_path / "train", "b", 320)
    raster_pair(tmp_path / "test", "c", 640)  # touches b
    assert len(find_pairs(tmp_path, "train")[1]) == 2
    raster_pair(tmp_path / "test", "d", 600)
    refused(tmp_path, "train/sar/b.tif", "test/sar/d.tif", "overlapping ground")


def test_ground_is_compared_across_map_projections(tmp_path: Path) -> None:
    """An easting of 745 km in zone 31 is 6 degrees east, where zone 32 begins: one place with two eastings."""
    raster_pair(tmp_path / "train", "a", 245_600)  # zone 31
    x, y = rasterio.warp.transform(UTM, "EPSG:32632", [745_700], [4_799_900])
    for kind, values in (("sar", backscatter(3)), ("opt", noise(3, 32, 32))):
        raster(tmp_path / f"test/{kind}/b.tif", values, (x[0], y[0]), crs="EPSG:32632")
    refused(tmp_path, "train/sar/a.tif", "test/sar/b.tif", "overlapping ground")
    for kind, values in (("sar", backscatter(3)), ("opt", noise(3, 32, 32))):
        raster(tmp_path / f"test/{kind}/b.tif", values, (x[0] + 400, y[0]), crs="EPSG:32632")
    assert len(find_pairs(tmp_path, "test")[1]) == 1


def test_rasters_of_two_projections_are_grouped_by_ground(tmp_path: Path) -> None:
    x, y = rasterio.warp.transform(UTM, "EPSG:32632", [745_700], [4_799_900])
    for name, at, crs in (
        ("a", (745_600, 4_800_000), UTM), ("b", (x[0], y[0]), "EPSG:32632"), ("c", (500_000, 4_800_000), "EPSG:32632"),
    ):  # fmt: skip
        raster(tmp_path / f"sar/{name}.tif", backscatter(ord(name)), at, crs)
        raster(tmp_path / f"opt/{name}.tif", noise(ord(name), 32, 32), at, crs)
    found = [pair for part in ("train", "test") for pair in find_pairs(tmp_path, part)[1]]
    assert {pair.sar.stem: pair.scene for pair in found} == {"a": "a", "b": "a", "c": "c"}


def test_the_real_pairs_do_not_leak_and_open_at_once() -> None:
    root = real("sentinel-pairs")
    started = time.process_time()
    both = {part: find_pairs(root, part) for part in ("train", "test")}
    assert time.process_time() - started < 20  # a tenth on a quiet machine
    assert {layout for layout, _ in both.values()} == {"split"} and sum(len(pairs) for _, pairs in both.values()) == 90


def test_a_real_scene_that_is_moved_onto_another_is_found(tmp_path: Path) -> None:
    root = real("sentinel-pairs")
    about = json.loads((root / "metadata.json").read_text())
    chosen = [next(entry for entry in about if entry["split"] == part) for part in ("train", "test")]
    for entry in chosen:
        for kind in ("sar", "opt"):
            (tmp_path / entry["split"] / kind).mkdir(parents=True)
            name = f"{entry['split']}/{kind}/{entry['id']}.webp"
            (tmp_path / name).symlink_to(root / name)
    (tmp_path / "metadata.json").write_text(json.dumps(chosen))
    assert find_pairs(tmp_path, "test")[0] == "split"
    chosen[1]["corners_epsg3395"] = (np.array(chosen[0]["corners_epsg3395"]) + 500).tolist()
    (tmp_path / "metadata.json").write_text(json.dumps(chosen))
    with pytest.raises(BadInput, match="overlapping ground"):
        find_pairs(tmp_path, "test")


# --- rasters


def test_a_raster_pair_that_does_not_lie_on_itself_is_refused(tmp_path: Path) -> None:
    geotiff(tmp_path)
    at, pixels = (509_000.0, 4_800_000.0), noise(0, 32, 32)
    raster(tmp_path / "opt/f.tif", pixels, (at[0] + 0.05, at[1]))  # half a hundredth of a pixel is a rounding
    assert find_pairs(tmp_path, "train")[0] == "geotiff"
    for wrong in (
        {"at": (at[0] + 5, at[1])}, {"at": at, "crs": "EPSG:32632"}, {"at": at, "crs": None},
        {"at": at, "values": noise(0, 32, 31)},
    ):  # fmt: skip
        raster(tmp_path / "opt/f.tif", **{"values": pixels, **wrong})  # type: ignore[arg-type]
        with pytest.raises(
            BadInput, match=r"sar/f\.tif.*EPSG:32631, 32x32 px.*opt/f\.tif.*one CRS, size and transform"
        ):
            find_pairs(tmp_path, "train")


def test_rasters_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    for name, east in (("a", 0), ("b", 320)):
        raster_pair(tmp_path / "near", name, east)
        raster_pair(tmp_path / "nowhere", name, east, crs=None)
    with pytest.raises(BadInput, match=r"all touch each other.*train/ and test/"):
        find_pairs(tmp_path / "near", "train")
    with pytest.raises(BadInput, match=r"sar/a\.tif.*no CRS.*train/ and test/"):
        find_pairs(tmp_path / "nowhere", "train")
    (tmp_path / "nowhere").rename(tmp_path / "whole")
    for part, name in (("train", "a"), ("test", "b")):
        for kind in ("sar", "opt"):
            (tmp_path / f"whole/{part}/{kind}").mkdir(parents=True)
            (tmp_path / f"whole/{kind}/{name}.tif").rename(tmp_path / f"whole/{part}/{kind}/{name}.tif")
    assert len(find_pairs(tmp_path / "whole", "test")[1]) == 1  # divided by the user, who knows where they are


def test_without_rasterio_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geotiff(tmp_path / "rasters")
    split(tmp_path / "pictures")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(BadInput, match=r"a\.tif.*pip install 'fewstep\[raster\]'"):
        SarOpticalPairs(tmp_path / "rasters")
    assert len(SarOpticalPairs(tmp_path / "pictures", size=16)) == 3


def test_a_file_that_is_no_raster_is_named(tmp_path: Path) -> None:
    geotiff(tmp_path)
    whole = (tmp_path / "sar/f.tif").read_bytes()
    (tmp_path / "sar/f.tif").write_bytes(b"<html>404</html>")
    with pytest.raises(BadInput, match=r"sar/f\.tif.*readable raster"):
        find_pairs(tmp_path, "train")
    (tmp_path / "sar/f.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"sar/f\.tif.*readable raster"):
        for part in ("train", "test"):
            SarOpticalPairs(tmp_path, part, size=16).items([0])


def folder(root: Path, sar: NDArray[Any], optical: NDArray[Any], sar_how: Any = None, optical_how: Any = None) -> Path:
    """One raster pair for training, another for testing."""
    for part, east in (("train", 0), ("test", 5000)):
        raster(root / part / f"sar/{part}.tif", np.roll(sar, east, 0), (500_000 + east, 4.8e6), **(sar_how or {}))
        raster(
            root / part / f"opt/{part}.tif", np.roll(optical, east, 0), (500_000 + east, 4.8e6), **(optical_how or {})
        )
    return root


def opened(root: Path, **options: Any) -> SarOpticalPairs:
    return SarOpticalPairs(root, **{"size": 32, "radiometry": "sentinel1-db", **options})


def test_decibels_reach_the_model_by_band(tmp_path: Path) -> None:
    sar = backscatter(1)
    pairs = opened(folder(tmp_path, sar[..., ::-1], noise(1, 32, 32), {"names": ("VH", "VV")}))
    assert (pairs.bands, pairs.units, pairs.scenes[0].dtype) == (("VV", "VH"), "db", np.float16)
    seen = pairs.items([0])
    for i, (low, high) in enumerate(((-25, 0), (-32.5, 0))):
        expected = np.clip((sar[..., i] - low) / (high - low) * 2 - 1, -1, 1)
        assert np.abs(seen["sar"][0, i].numpy() - expected).max() < 2e-3
    assert torch.equal(seen["image"][0], torch.from_numpy(noise(1, 32, 32)).permute(2, 0, 1) / 127.5 - 1)
    drawn = pairs.draw(200, rng())["sar"]
    assert 0.1 < (drawn[:, 0] == 0).all((1, 2)).float().mean() < 0.4  # VV is left out now and then


@pytest.mark.parametrize("units", ["linear", "amplitude"])
def test_power_and_amplitude_become_the_same_decibels(tmp_path: Path, units: str) -> None:
    sar = backscatter(1)
    numbers = (10 ** (sar / (10 if units == "linear" else 20))).astype(np.float32)
    told, plain = folder(tmp_path / "told", numbers, noise(1, 32, 32)), folder(tmp_path / "db", sar, noise(1, 32, 32))
    pairs = opened(told, units=units)
    assert pairs.units == units
    assert (pairs.items([0])["sar"] - opened(plain).items([0])["sar"]).abs().max() < 3e-3
    assert units == "amplitude" or opened(told).units == "linear"


def test_digital_numbers_are_put_at_the_models_white(tmp_path: Path) -> None:
    sar = backscatter(1)
    one = folder(tmp_path / "one", np.round(10 ** (sar / 20 + 3.2)).astype(np.uint16), noise(1, 32, 32))
    other = folder(tmp_path / "other", np.round(10 ** (sar / 20 + 3.8)).astype(np.uint16), noise(1, 32, 32))
    pairs = opened(one)
    assert pairs.units == "dn"
    assert np.nanquantile(pairs.scenes[0][..., 0].astype(float), 0.99) == pytest.approx(-5.3, abs=0.1)
    assert (pairs.items([0])["sar"] - opened(other).items([0])["sar"]).abs().max() < 0.02  # no factor matters


def test_an_amplitude_model_takes_one_band_of_any_raster(tmp_path: Path) -> None:
    pairs = opened(folder(tmp_path, backscatter(1), noise(1, 32, 32), {"names": ("VV", "VH")}), radiometry="amplitude")
    seen = pairs.items([0])["sar"]
    assert pairs.bands == ("VH",) and seen.shape == (1, 1, 32, 32)
    vh = backscatter(1)[..., 1]
    expected = np.minimum(10 ** ((vh - np.quantile(vh, 0.99)) / 20), 1) * 2 - 1
    assert np.abs(seen[0, 0].numpy() - expected).max() < 4e-3
    assert pairs.draw(4, rng())["sar"].shape == (4, 1, 32, 32)


def test_8_bit_rasters_are_drawn_as_pictures_are(tmp_path: Path) -> None:
    grey, colour = noise(1, 48, 48, 1), noise(2, 48, 48)
    rasters = folder(tmp_path / "rasters", grey[..., None], colour)
    save(tmp_path / "pictures/train/sar/a.png", grey)
    save(tmp_path / "pictures/train/opt/a.png", colour)
    for options in ({"radiometry": "amplitude"}, {"bands": "VH"}, {"bands": "VH", "units": "stretched-db"}):
        one, other = (opened(root, **options).draw(8, rng(3)) for root in (rasters, tmp_path / "pictures"))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("count", "names", "order"),
    [
        (13, (), (4, 3, 2)),
        (12, (), (4, 3, 2)),
        (3, (), (1, 2, 3)),
        (4, ("B02", "B03", "B04", "B08"), (3, 2, 1)),
        (4, ("blue", "green", "red", "nir"), (3, 2, 1)),
    ],
)
def test_reflectance_is_shown_in_red_green_and_blue(
    tmp_path: Path, count: int, names: tuple[str, ...], order: tuple[int, int, int]
) -> None:
    numbers = rng(0).integers(1, 4000, (32, 32, count), dtype=np.uint16)
    root = folder(tmp_path, backscatter(1), numbers, optical_how={"names": names})
    levels = (opened(root).items([0])["image"][0].permute(1, 2, 0).numpy() + 1) * 127.5
    chosen = numbers[..., [i - 1 for i in order]]
    assert np.abs(levels - np.clip(chosen / 3000, 0, 1) * 255).max() < 0.51 and levels.max() > 254
    moved = opened(root, optical_offset=1000).items([0])["image"][0].permute(1, 2, 0).numpy()
    assert np.abs((moved + 1) * 127.5 - np.clip((chosen - 1000.0) / 3000, 0, 1) * 255).max() < 0.51


def test_optical_bands_and_scales_that_are_unclear_are_refused(tmp_path: Path) -> None:
    numbers = rng(0).integers(1, 4000, (32, 32, 4), dtype=np.uint16)
    with pytest.raises(BadInput, match=r"opt/train\.tif.*4 bands.*B04, B03, B02"):
        opened(folder(tmp_path / "four", backscatter(1), numbers)).items([0])
    share = folder(tmp_path / "share", backscatter(1), (numbers[..., :3] / 10_000).astype(np.float32))
    with pytest.raises(BadInput, match=r"opt/train\.tif.*optical_scale = 1"):
        opened(share).items([0])
    bright = opened(share, optical_scale=1).items([0])["image"]
    assert bright.max() == 1 and -0.5 < bright.mean() < 0.5
    with pytest.raises(BadInput, match="optical_scale: got 0"):
        opened(share, optical_scale=0)


def test_the_scale_in_the_file_wins(tmp_path: Path) -> None:
    numbers = rng(0).integers(1000, 4000, (32, 32, 3), dtype=np.uint16)
    root = folder(tmp_path, np.round(backscatter(1) * 100).astype(np.int16), numbers)
    for name, scale, offset in (("opt", 1e-4, -0.1), ("sar", 0.01, 0.0)):
        with rasterio.open(root / f"train/{name}/train.tif", "r+") as file:
            file.scales, file.offsets = [scale] * file.count, [offset] * file.count
    seen = opened(root).items([0])
    levels = (seen["image"][0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(levels - np.clip((numbers - 1000.0) / 3000, 0, 1) * 255).max() < 0.51
    expected = np.clip((backscatter(1)[..., 0] + 25) / 25, 0, 1) * 2 - 1
    assert np.abs(seen["sar"][0, 0].numpy() - expected).max() < 3e-3


def test_sar_whose_units_or_bands_are_unclear_is_refused(tmp_path: Path) -> None:
    colour = noise(1, 32, 32)
    with pytest.raises(BadInput, match=r"units: .*--units db"):
        opened(folder(tmp_path / "scaled", np.round(backscatter(1) * 100).astype(np.int16), colour)).items([0])
    with pytest.raises(BadInput, match=r"sar/train\.tif: bands.*3 bands"):
        opened(folder(tmp_path / "three", backscatter(1, 3), colour))
    with pytest.raises(BadInput, match=r"sar/train\.tif.*units stretched-db"):
        opened(folder(tmp_path / "db", backscatter(1), colour), units="stretched-db").items([0])
    assert opened(folder(tmp_path / "chosen", backscatter(1, 3), colour), bands="VV=3").bands == ("VV",)


def test_one_raster_of_another_kind_is_named(tmp_path: Path) -> None:
    for name, east in (("a", 0), ("b", 5000), ("c", 9000)):
        raster_pair(tmp_path / "train", name, east)
    raster_pair(tmp_path / "test", "d", 20_000)
    wrong = tmp_path / "train/sar/b.tif"
    whole = opened(tmp_path).items([0])  # all in decibels
    at = (505_000, 4_800_000)
    raster(wrong, (10 ** (backscatter(2) / 10)).astype(np.float32), at)
    with pytest.raises(BadInput, match=r"sar/b\.tif.*units db.*one kind"):
        opened(tmp_path).items([0])
    raster(wrong, noise(2, 32, 32, 1)[..., None].repeat(2, 2), at)
    with pytest.raises(BadInput, match=r"sar/b\.tif.*uint8.*8 bits in all or none"):
        opened(tmp_path, units="db").items([0])
    raster(wrong, backscatter(2, 1), at)
    with pytest.raises(BadInput, match=r"sar/b\.tif.*'VV'.*VV, VH, as in"):
        opened(tmp_path, units="db").items([0])
    raster(wrong, np.where(backscatter(2) > -9, -9999, backscatter(2)).astype(np.float32), at)
    with pytest.raises(BadInput, match=r"sar/b\.tif.*-9999.*nodata"):
        opened(tmp_path, units="db").items([0])
    known = opened(tmp_path, units="db", nodata=-9999)
    share = float(((backscatter(2) > -9).any(2)).mean())
    assert share > 0.1 and len(known) == 2  # b is too full of holes
    assert torch.equal(known.items([0])["sar"], whole["sar"])
    raster(wrong, backscatter(2)[..., ::-1], at, names=("VH", "VV"))
    turned = opened(tmp_path).items([1])["sar"]
    raster(wrong, backscatter(2), at)
    assert torch.equal(opened(tmp_path).items([1])["sar"], turned)


def test_a_raster_whose_units_are_unclear_is_named_among_others(tmp_path: Path) -> None:
    for name, east in (("a", 0), ("b", 5000), ("c", 9000)):
        raster_pair(tmp_path / "train", name, east)
    raster_pair(tmp_path / "test", "d", 20_000)
    for name, east in (("b", 5000), ("c", 9000)):  # hundreds of decibels outnumber the others
        numbers = np.round(backscatter(2) * 100).astype(np.float32)
        raster(tmp_path / f"train/sar/{name}.tif", numbers, (500_000 + east, 4_800_000))
    with pytest.raises(BadInput, match=r"sar/b\.tif: units: .*beyond decibels"):
        opened(tmp_path).items([0])
    with pytest.raises(BadInput, match=r"sar/b\.tif.*one kind in all rasters"):
        opened(tmp_path, units="db").items([0])
    ambiguous, dates = tmp_path / "train/sar/b.tif", ("VV_asc", "VH_asc", "VV_desc", "VH_desc")
    raster(ambiguous, backscatter(2, 4), (505_000, 4_800_000), names=dates)
    with pytest.raises(BadInput, match=rf"{ambiguous}: bands.*band 1 \(VV_asc\) and band 3.*VV=1,VH=2"):
        opened(tmp_path, units="db").items([0])


def test_noise_in_one_raster_is_clamped_and_what_cannot_be_is_a_hole(tmp_path: Path) -> None:
    sar, colour = backscatter(1), noise(1, 32, 32)
    sar[3, 4], sar[5, 6, 1] = -101.3, -9999
    for units in ("auto", "db"):
        pairs = opened(folder(tmp_path, sar, colour), units=units)
        scene = pairs.scenes[0].astype(float)
        assert np.argwhere(np.isnan(scene).any(2)).tolist() == [[5, 6]] and np.isnan(scene[5, 6]).all()
        assert (scene[3, 4, :2] == -80).all() and (pairs.items([0])["sar"][0, :, 3, 4] == -1).all()


def test_a_border_of_zeros_is_a_hole_as_if_the_file_said_so(tmp_path: Path) -> None:
    power, colour = (10 ** (backscatter(1, side=64) / 10)).astype(np.float32), noise(1, 64, 64)
    power[:, :20] = 0
    with pytest.warns(Notice, match=r"sar/train\.tif: polarisation assumed: two bands without names"):
        opened(folder(tmp_path / "found", power, colour), size=16)
    with pytest.warns(Notice, match=r"nodata = 0 says, in 1 of 1 SAR rasters, the first .*sar/train\.tif"):
        found = opened(folder(tmp_path / "found", power, colour), size=16).items([0, 1])
    told = opened(folder(tmp_path / "told", power, colour, {"nodata": 0})).scenes[0]
    found_scene = opened(tmp_path / "found").scenes[0]
    assert np.array_equal(found_scene, told, equal_nan=True) and np.isnan(told[:, :20]).all()
    assert set(found) == {"sar", "image"}


def test_a_stored_zero_of_scaled_reflectance_is_no_data(tmp_path: Path) -> None:
    numbers = rng(0).integers(1000, 4000, (32, 32, 3), dtype=np.uint16)
    numbers[2, 3] = 0
    root = folder(tmp_path, backscatter(1), numbers)
    with rasterio.open(root / "train/opt/train.tif", "r+") as file:
        file.scales, file.offsets = [1e-4] * 3, [-0.1] * 3
    assert np.argwhere(np.isnan(opened(root).scenes[0]).any(2)).tolist() == [[2, 3]]


def test_holes_are_zero_to_the_model_and_poor_crops_are_left_out(tmp_path: Path) -> None:
    sar = backscatter(1, side=64)
    sar[:, 32:] = -99  # the right half is a hole, and a few pixels on the left
    sar[3, 5] = -99
    colour = rng(5).integers(1, 4000, (64, 64, 3), dtype=np.uint16)
    colour[40:44, 2] = 0
    pairs = opened(folder(tmp_path, sar, colour, {"nodata": -99.0}), size=16)
    assert len(pairs) == 4 * 2
    tile = pairs.items([0])["sar"][0]
    assert (tile[:, 3, 5] == 0).all() and (tile[:, 3, 6] != 0).all() and tile.isfinite().all()
    assert (pairs.items([4])["image"][0][:, 8:12, 2] == -1).all()
    assert (pairs.items([4])["sar"][0][:, 8:12, 2] == 0).all()  # no data in one is none in both
    drawn, again = pairs.draw(200, rng(2)), pairs.draw(200, rng(2))
    assert torch.equal(drawn["sar"], again["sar"]) and torch.equal(drawn["image"], again["image"])
    crops, _ = pairs._crops(500, rng(2))  # before they are sorted out
    assert (np.isnan(crops).any(-1).mean((1, 2)) > 0.1).mean() > 0.3
    heard = [picture for picture in drawn["sar"] if (picture != 0).any((1, 2)).all()]  # both bands left in
    assert len(heard) > 50 and max(float((picture == 0).all(0).float().mean()) for picture in heard) <= 0.1
    sar[:] = -99
    sar[0, 0] = -10
    with pytest.raises(BadInput, match="16 x 16 px of data"):
        opened(folder(tmp_path / "none", sar, colour, {"nodata": -99.0}), size=16, units="db").draw(1, rng())


def test_8_bit_rasters_keep_their_holes(tmp_path: Path) -> None:
    grey, colour = np.maximum(noise(1, 32, 32, 1), 1)[..., None], noise(2, 32, 32)
    grey[4, 7] = 0
    opaque = np.full((32, 32, 1), 255, np.uint8)  # a fourth band beside the colours
    root = folder(tmp_path, grey, np.concatenate([colour, opaque], 2), {"nodata": 0})
    for radiometry in ("amplitude", "sentinel1-db"):
        pairs = opened(root, radiometry=radiometry, bands="VH")
        seen = pairs.items([0])["sar"][0]
        assert pairs.scenes[0].dtype == np.float16 and (seen[:, 4, 7] == 0).all() and (seen[-1, 4, 8] != 0).all()
        colours = torch.from_numpy(colour).permute(2, 0, 1) / 127.5 - 1
        colours[:, 4, 7] = -1
        assert torch.equal(pairs.items([0])["image"][0], colours)


def test_real_rasters_train_as_they_come(tmp_path: Path) -> None:
    source = real("geotiff")
    for sar in source.glob("terramesh_*_s1rtc.tif"):
        name = sar.name.removesuffix("_s1rtc.tif")
        for kind, file in (("sar", sar), ("opt", source / f"{name}_s2rgb.tif")):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{name}.tif").symlink_to(file)
    both = [opened(tmp_path, split=part, size=64) for part in ("train", "test")]
    assert sorted(len(pairs.pairs) for pairs in both) == [1, 2]
    for pairs in both:
        assert (pairs.layout, pairs.units, pairs.bands) == ("geotiff", "db", ("VV", "VH"))
        assert len(pairs) == 9 * len(pairs.pairs) and pairs.draw(4, rng())["sar"].shape == (4, 2, 64, 64)


# --- calibrated rasters beside pictures, as desert-pairs has them


def test_a_raster_of_sar_beside_a_picture(tmp_path: Path) -> None:
    """Hundredths of decibels, scaled as the file says, -32768 where there are none; the picture as it is."""
    numbers = np.round(backscatter(1, 1) * 100).astype(np.int16)
    numbers[0, :5] = -32768
    colour = noise(1, 32, 32)
    raster(tmp_path / "train/sar/a-01.tif", numbers, (0.0, 0.0), names=("VV",), nodata=-32768)
    with rasterio.open(tmp_path / "train/sar/a-01.tif", "r+") as file:
        file.scales, file.offsets = [0.01], [0.0]
    save(tmp_path / "train/opt/a-01.webp", colour)
    pairs = opened(tmp_path, radiometry="sentinel1")
    assert (pairs.layout, pairs.units, pairs.bands, pairs.calibrated) == ("geotiff", "db", ("VV",), True)
    seen = pairs.items([0])
    found = (seen["sar"][0, 0].numpy() + 1) * 12.5 - 25
    assert np.abs(found - np.clip(numbers[..., 0] / 100, -25, 0))[1:].max() < 0.01
    assert (seen["sar"][0, 0, 0, :5] == 0).all() and (seen["sar"][0, 1] == 0).all() and (seen["sar"][0, 2] == 1).all()
    assert torch.equal(seen["image"][0, :, 1:], torch.from_numpy(colour).permute(2, 0, 1)[:, 1:] / 127.5 - 1)
    save(tmp_path / "train/opt/a-01.webp", colour[:-1])
    with pytest.raises(BadInput, match="SAR and optical of the same size"):
        opened(tmp_path).items([0])


def test_the_real_desert_opens_in_decibels() -> None:
    pairs = opened(real("desert-pairs"), size=128, limit=4)
    assert (pairs.layout, pairs.units, pairs.bands, len(pairs)) == ("geotiff", "db", ("VV",), 16)
    levels = np.concatenate([scene[..., 0].ravel() for scene in pairs.scenes]).astype(float)
    assert -20 < np.nanmedian(levels) < -8


def test_a_calibrated_pair_shown_as_another_kind_hangs_on_its_own_white(tmp_path: Path) -> None:
    """Two scenes 8 dB apart: they differ where levels are absolute, and have one white where they are not."""
    found: dict[int, list[float]] = {}
    for name, level in (("dim", -20.0), ("bright", -12.0)):
        sar = (level + rng(1).normal(0, 1, (32, 32, 1))).astype(np.float32)
        pairs = opened(folder(tmp_path / name, sar, noise(1, 32, 32), {"names": ("VV",)}), radiometry="sentinel1")
        drawn = pairs.draw(600, rng())["sar"]
        heard = drawn[(drawn[:, 0] != 0).all((1, 2))]
        for plane in (1, -1):
            crops = heard[heard[:, 2, 0, 0] == plane][:, 0]
            found.setdefault(plane, []).append(float(crops.mean()) * 12.5 - 12.5)
    assert found[1] == pytest.approx([-20, -12], abs=0.3)
    assert found[-1] == pytest.approx([-5.3 - 2.3] * 2, abs=0.5)  # the 99 % quantile lies 2.3 deviations above
