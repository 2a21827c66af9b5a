"""Whole scenes: what goes in comes out on the same grid, seamless, equal for equal seeds, whole or not at all."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Popen, run
from scipy.ndimage import uniform_filter
from scipy.stats import kstest
from torch import nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.band import Band
from distillers.models.codec import PixelUnshuffle
from distillers.models.denoiser import Denoiser
from distillers.models.radiometry import SENTINEL1_DB
from distillers.models.schedule import VariancePreserving
from distillers.sar.demonstration import demonstration
from distillers.sar.options import SceneOptions
from distillers.sar.part import Part, find_part
from distillers.sar.tiles import Axis, NoiseField, axis, ground_corner
from distillers.sar.translate import COLOURS, HOLE, SCALE, STATISTICS, translate, uncertainty_path
from distillers.teacher import Teacher
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

rasterio = pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")
from rasterio import warp, windows  # noqa: E402
from rasterio._env import get_gdal_config  # noqa: E402
from rasterio.transform import Affine, from_gcps, from_origin  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data" / "geotiff"
WEIGHTS = Path(os.environ.get("FEWSTEP_WEIGHTS", Path(__file__).parents[1] / "weights"))
UTM = from_origin(565_000.5, 5_335_000.25, 10.0, 10.0)
NETWORK = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "add_attention": False,
}


def info(**more: Any) -> Info:
    times = {k: lcm_times(VariancePreserving.from_betas(), k) for k in (1, 2, 4)}
    return Info(
        name="tiny", task="sar-to-optical", method="test", role="student", data="d", sampler="consistency",
        size=(64, 64), step_times=times, patch=2, sar=SENTINEL1_DB.to_dict(), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A true U-Net, untrained: its pictures are noise that depends on SAR, seed and place."""
    torch.manual_seed(0)
    schedule = VariancePreserving.from_betas()
    teacher = Teacher.random(info(), NETWORK, schedule.to_config(), "x0", PixelUnshuffle(2))
    return Generator(teacher.denoiser, teacher.codec, teacher.info).eval()


class Local(nn.Module):
    """A network that sees two positions to each side, and nothing of the rest: tiles cannot change what it says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(20, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 12, 3, padding=1))
        self.config = type("config", (dict,), {"__getattr__": dict.__getitem__})(block_out_channels=(8, 8))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> Any:
        return type("out", (), {"sample": self.body(x)})


@pytest.fixture(scope="module")
def local() -> Generator:
    return Generator(Denoiser(Local(), VariancePreserving.from_betas(), "x0"), PixelUnshuffle(2), info()).eval()


def backscatter(height: int, width: int, bands: int = 2, seed: int = 0) -> np.ndarray:
    levels = np.array([-12.0, -19.0], dtype=np.float32)[:bands, None, None]
    return levels + np.random.default_rng(seed).normal(0, 2, (bands, height, width)).astype(np.float32)


def write(path: Path, values: np.ndarray, names: tuple[str, ...] | None = ("VV", "VH"), **profile: Any) -> Path:
    options = {"crs": "EPSG:32632", "transform": UTM, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, **options,
    ) as raster:  # fmt: skip
        raster.write(values)
        if names:
            raster.descriptions = names[: len(values)]
    return path


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as raster:
        return raster.read()


# --- the grid


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32632", UTM),
        ("EPSG:4326", from_origin(11.123456789012345, 48.1, 1e-4, 9e-5)),
        ("EPSG:3395", Affine(10.000276825539913, 0.0, -13255424.20935286, 0.0, -10.0001568998955, 4037900.668354528)),
        ("EPSG:32632", Affine.translation(5e5, 5e6) @ Affine.rotation(17) @ Affine.scale(10, -10)),
        ("EPSG:32632", from_origin(5e5, 5e6, 10, 14)),
    ],
    ids=["utm", "degrees", "mercator", "rotated", "not square"],
)
def test_crs_and_transform_are_the_scenes_bit_for_bit(tmp_path: Path, generator: Generator, crs, transform) -> None:
    scene = write(tmp_path / "s.tif", backscatter(77, 101), crs=crs, transform=transform)
    facts = translate(generator, scene, tmp_path / "o.tif", stac=True)
    with rasterio.open(scene) as given_, rasterio.open(tmp_path / "o.tif") as made:
        assert made.crs == given_.crs and made.transform == given_.transform and made.shape == given_.shape
        assert made.count == 3 and made.dtypes == ("uint8",) * 3 and made.nodata == 0
        assert made.descriptions == ("red", "green", "blue") and made.tags()["AREA_OR_POINT"] == "Area"
        assert [c.name for c in made.colorinterp] == ["red", "green", "blue"]
        assert made.tags()["FEWSTEP_SYNTHETIC"] == "yes" and made.tags()["FEWSTEP_SEED"] == "0"
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert made.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "DEFLATE"
    assert (facts.units, facts.bands, facts.valid_share) == ("db", {"VV": 1, "VH": 2}, 1.0)
    item = json.loads((tmp_path / "o.json").read_text())
    west, south, east, north = item["bbox"]
    assert item["type"] == "Feature" and west < east and south < north and item["links"][0]["href"] == "s.tif"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.json", "o.tif", "s.tif"]


def test_a_large_result_has_overviews_and_is_a_valid_cog(tmp_path: Path, generator: Generator) -> None:
    demonstration(tmp_path / "s.tif", side=1100)
    translate(generator, tmp_path / "s.tif", tmp_path / "o.tif")
    cogeo = pytest.importorskip("rio_cogeo", reason="needs rio-cogeo")
    valid, errors, warnings = cogeo.cog_validate(tmp_path / "o.tif", strict=True)
    assert valid, (errors, warnings)
    with rasterio.open(tmp_path / "o.tif") as made:
        assert made.overviews(1) == [2, 4] and made.block_shapes[0] == (512, 512)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 900), st.integers(2, 12), st.integers(-(10**6), 10**6), st.data())
def test_weights_of_all_tiles_add_up_to_one_everywhere(length: int, half: int, start: int, data: st.DataObject) -> None:
    tile = 4 * half
    overlap = data.draw(st.integers(half, 2 * half))
    side = axis(length, SceneOptions(tile=tile, overlap=overlap), 1, start)
    first = data.draw(st.integers(0, length - 1))
    shown = slice(first, data.draw(st.integers(first + 1, length)))
    total, finished = np.zeros(length), []
    for i in side.touching(shown):
        pixels = np.arange(side.start(i), side.start(i) + side.tile)
        inside = (pixels >= 0) & (pixels < length)
        assert inside[: side.tile].any()  # no tile too many
        total[pixels[inside]] += side.weight(i)[inside]
        finished += range(length)[side.done(i, i, shown)]
    assert np.allclose(total[shown], 1, atol=1e-6) and finished == [*range(length)[shown]]
    assert side.ground == start - side.lead and (side.count == 1 or side.ground % side.stride == 0)
    assert side.touching(slice(0, length)) == range(side.count)


@settings(deadline=None, max_examples=30)
@given(st.integers(-300, 300), st.integers(-300, 300), st.integers(1, 100), st.integers(1, 100))
def test_a_crop_of_the_noise_is_the_same_from_anywhere(top: int, left: int, height: int, width: int) -> None:
    whole = NoiseField(2, kept=10_000).crop(7, 0, -300, -300, 700, 700)
    rows, columns = slice(top + 300, top + 300 + height), slice(left + 300, left + 300 + width)
    assert np.array_equal(NoiseField(2, kept=1).crop(7, 0, top, left, height, width), whole[:, rows, columns])


def test_the_noise_is_gaussian_and_differs_by_seed_step_and_block() -> None:
    field = NoiseField(4)
    some = field.crop(3, 0, 0, 0, 256, 256)
    assert abs(some.mean()) < 0.01 and abs(some.std() - 1) < 0.01
    assert kstest(some.ravel(), "norm").pvalue > 1e-3 and 4 < np.abs(some).max() < 5.8
    blocks = [some[:, i : i + 64, j : j + 64].ravel() for i in (0, 64) for j in (0, 64)]
    blocks += [field.crop(4, 0, 0, 0, 64, 64).ravel(), field.crop(3, 1, 0, 0, 64, 64).ravel()]
    blocks += [field.crop(3, 0, *place, 64, 64).ravel() for place in ((-64, 0), (0, -64), (-128, 0), (-533_504, 0))]
    correlations = np.corrcoef(blocks) - np.eye(len(blocks))
    assert np.abs(correlations).max() < 0.05


# --- seams


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shape", [(300, 420), (257, 129)])
def test_tiled_and_untiled_are_the_same_picture(tmp_path: Path, local: Generator, shape, steps: int) -> None:
    """A local network says the same in every tile, but for the zeros that it sees beyond a border."""
    scene = write(tmp_path / "s.tif", backscatter(*shape))
    translate(local, scene, tmp_path / "whole.tif", SceneOptions(tile=512, steps=steps))
    facts = translate(local, scene, tmp_path / "tiled.tif", SceneOptions(tile=64, steps=steps))
    assert facts.tiles > 6
    apart = np.abs(pixels(tmp_path / "whole.tif").astype(int) - pixels(tmp_path / "tiled.tif"))
    inside = apart[:, 8:-8, 8:-8]  # at the scene's own border the two see other things beyond
    assert inside.max() <= 6 and inside.mean() < 0.1


def test_noise_of_a_tile_instead_of_the_ground_would_fail_that(
    tmp_path: Path, local: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write(tmp_path / "s.tif", backscatter(150, 150))
    translate(local, scene, tmp_path / "whole.tif", SceneOptions(tile=512))
    crop = NoiseField.crop
    monkeypatch.setattr(
        NoiseField, "crop", lambda self, seed, step, top, left, *sides: crop(self, seed, step, 0, 0, *sides)
    )
    translate(local, scene, tmp_path / "tiled.tif", SceneOptions(tile=64))
    apart = np.abs(pixels(tmp_path / "whole.tif").astype(int) - pixels(tmp_path / "tiled.tif"))
    assert apart.mean() > 5


@pytest.mark.parametrize("name", ["sar-optical-db-consistency", "sar-optical-adversarial"])
def test_a_constant_scene_shows_no_grid(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast where tiles overlap is what it is elsewhere: tiles that disagree blur each other there."""
    if not (WEIGHTS / name).is_dir():
        pytest.skip(f"needs weights/{name}")
    published = Generator.from_pretrained(WEIGHTS / name)
    scene = write(tmp_path / "s.tif", np.full((1, 512, 1600), -12.0, np.float32), ("VV",))

    def dip() -> float:
        """Least over mean contrast along a stride of 96 px, in parts of 16 of which one is blended, over two seeds."""
        parts = np.zeros(6)
        for seed in (0, 1):
            translate(published, scene, tmp_path / "o.tif", SceneOptions(tile=128, overlap=32, seed=seed))
            grey = uniform_filter(pixels(tmp_path / "o.tif").astype(float).mean(0), 5)[16:-16]  # without pixels' grain
            parts += grey.std(0)[104 : 104 + 96 * 14].reshape(14, 6, 16).mean((0, 2))
        return float(parts.min() / parts.mean())

    assert dip() > 0.955
    crop = NoiseField.crop
    monkeypatch.setattr(
        NoiseField, "crop", lambda self, seed, step, y, x, *sides: crop(self, seed, step, y, 7 * x, *sides)
    )
    assert dip() < 0.95


# --- seeds


def test_the_same_seed_gives_the_same_bytes_whatever_the_batch(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(200, 330))
    files = []
    for batch in (1, 2, 5):
        out = tmp_path / str(batch)
        out.mkdir()
        translate(generator, scene, out / "o.tif", SceneOptions(tile=64, batch=batch, samples=2, seed=9))
        files.append([(out / "o.tif").read_bytes(), uncertainty_path(out / "o.tif").read_bytes()])
    assert files[0] == files[1] == files[2]
    translate(generator, scene, tmp_path / "o.tif", SceneOptions(tile=64, seed=10))
    assert (tmp_path / "o.tif").read_bytes() != files[0][0]


def test_a_part_of_a_scene_is_drawn_from_the_same_noise(tmp_path: Path, local: Generator) -> None:
    """The upper left of a scene does not depend on how far the scene goes."""
    values = backscatter(200, 330)
    translate(local, write(tmp_path / "s.tif", values), tmp_path / "whole.tif", SceneOptions(tile=64))
    translate(local, write(tmp_path / "p.tif", values[:, :120, :200]), tmp_path / "part.tif", SceneOptions(tile=64))
    apart = np.abs(
        pixels(tmp_path / "whole.tif")[:, :64, :150].astype(int) - pixels(tmp_path / "part.tif")[:, :64, :150]
    )
    assert apart.max() <= 1


WINDOWS = {
    "inside": (70, 100, 90, 33),
    "one pixel": (200, 111, 1, 1),
    "upper left": (0, 0, 64, 64),
    "lower right": (325, 195, 5, 5),
    "last column": (0, 0, 330, 200),
    "between tiles": (50, 50, 13, 13),
}


@pytest.mark.parametrize("where", WINDOWS)
def test_a_window_has_the_pixels_of_the_whole(tmp_path: Path, generator: Generator, where: str) -> None:
    left, top, width, height = window = WINDOWS[where]
    values = backscatter(200, 330)
    values[:, 120:135, 80:120] = np.nan
    scene, options = write(tmp_path / "s.tif", values), SceneOptions(tile=64, samples=2, seed=3)
    translate(generator, scene, tmp_path / "whole.tif", options)
    shown = []
    facts = translate(
        generator, scene, tmp_path / "part.tif", replace(options, window=window), progress=lambda *n: shown.append(n)
    )
    assert (facts.width, facts.height, facts.window) == (width, height, window) and shown[-1] == (width * height,) * 2
    for whole, part in ((p, p.with_name(p.name.replace("whole", "part"))) for p in tmp_path.glob("whole*.tif")):
        inside = pixels(whole)[:, top : top + height, left : left + width]
        assert np.array_equal(pixels(part), inside)
        with rasterio.open(whole) as one, rasterio.open(part) as other:
            assert other.transform == one.window_transform(windows.Window(*window)) and other.crs == one.crs
    with rasterio.open(tmp_path / "part.tif") as part:
        assert part.tags()["FEWSTEP_WINDOW"] == " ".join(map(str, window))
        assert facts.valid_share == pytest.approx((part.dataset_mask() > 0).mean())


def test_a_window_draws_the_tiles_that_it_meets(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(400, 400))
    facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(tile=64, window=(200, 200, 10, 10)))
    assert facts.tiles <= 4


def test_a_box_is_in_the_scenes_coordinates_or_in_degrees(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(100, 120))
    west, north = UTM.c + 200, UTM.f - 100
    own = (west, north - 300, west + 400, north)
    degrees = warp.transform_bounds("EPSG:32632", "EPSG:4326", *own)
    wanted = (20, 10, 40, 30)

    def found(*box: float) -> tuple[int, ...]:
        facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(bbox=box))
        with rasterio.open(tmp_path / "o.tif") as made:
            assert made.bounds == pytest.approx(
                (UTM.c + 10 * facts.window[0], UTM.f - 10 * (facts.window[1] + facts.window[3]),
                 UTM.c + 10 * (facts.window[0] + facts.window[2]), UTM.f - 10 * facts.window[1])
            )  # fmt: skip
        return facts.window

    assert found(*own) == wanted
    around = found(*degrees)  # a box in degrees stands askew: it holds the whole box and a little more
    assert all(abs(a - b) <= 3 for a, b in zip(around, wanted, strict=True)) and around[2] >= 40 and around[3] >= 30
    assert found(UTM.c - 1e4, UTM.f - 100, UTM.c + 55, UTM.f + 1e4) == (0, 0, 6, 10)  # what lies in the scene
    for box in ((0, 0, 1, 1), (UTM.c + 1e5, 0, UTM.c + 2e5, 1)):
        with pytest.raises(BadInput, match=r"bbox: .* meets the scene"):
            found(*box)


def test_a_box_meets_scenes_across_the_antimeridian_and_of_0_to_360_degrees(tmp_path: Path) -> None:
    at = {}
    for name, west in (("around", 179.99), ("west", -180.01), ("east", 190.0)):
        scene = write(
            tmp_path / f"{name}.tif", backscatter(40, 200), crs="EPSG:4326", transform=from_origin(west, 48, 1e-4, 1e-4)
        )
        with rasterio.open(scene) as raster:
            box = (-169.995, 47.997, -169.99, 47.999) if name == "east" else (179.995, 47.997, -179.995, 47.999)
            at[name] = find_part(raster, SceneOptions(bbox=box))
    assert at["around"] == at["west"] == Part(10, 50, 20, 100) and at["east"] == Part(10, 50, 20, 50)


def test_a_box_of_two_meanings_is_refused_with_both(tmp_path: Path) -> None:
    scene = write(tmp_path / "s.tif", backscatter(60, 60), crs="EPSG:3413", transform=from_origin(-300, 300, 10, 10))
    with rasterio.open(scene) as raster:
        for box in ((-90, 85, 90, 90), (-50, 60, 50, 80)):
            with pytest.raises(BadInput, match=r"bbox: .*window.* as coordinates, .* as degrees"):
                find_part(raster, SceneOptions(bbox=box))
        assert find_part(raster, SceneOptions(bbox=(-200, -200, 200, 200))) == Part(10, 10, 40, 40)


def test_a_box_needs_a_place(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(64, 64), crs=None, transform=Affine.identity())
    with pytest.raises(BadInput, match=r"bbox: .*window"):
        translate(generator, scene, tmp_path / "o.tif", SceneOptions(bbox=(0, 0, 9, 9)))


# --- neighbours


@pytest.mark.parametrize(
    "transform",
    [
        UTM,
        from_origin(565_005, 5_335_005, 10, 10),  # pixel centres on the CRS's zero, as many RTC products have them
        from_origin(-70.0000278, -33.2, 0.000277777777778, 0.000277777777778),
        from_origin(13.1, 52.3, 8.983152841195215e-05, 8.983152841195215e-05),
        Affine.translation(5e5, -5e6) @ Affine.rotation(17) @ Affine.scale(10, -10),
    ],
    ids=["utm", "half a pixel off", "south-west", "degrees", "rotated"],
)
def test_neighbours_count_the_pixels_of_their_grid_alike(transform: Affine) -> None:
    row, column = ground_corner(transform)
    for down, right in ((0, 1), (1, 0), (3001, 777), (19_999, 25_003)):
        x, y = transform @ (right, down)
        moved = Affine(transform.a, transform.b, x, transform.d, transform.e, y)
        assert ground_corner(moved) == (row + down, column + right)


def test_a_transform_without_a_grid_counts_from_the_corner() -> None:
    for transform in (None, Affine(0, 0, 5, 0, 0, 5), Affine(1e-300, 0, 1e9, 0, 1e-300, 5), Affine.scale(np.nan)):
        assert ground_corner(transform) == (0, 0)


@pytest.mark.parametrize("steps", [1, 2])
def test_parts_of_a_scene_are_drawn_as_in_the_whole(tmp_path: Path, generator: Generator, steps: int) -> None:
    """Cut anywhere, far from the cut every byte is the whole's: noise and tiles belong to the ground, not to a file."""
    values, options = backscatter(290, 330), SceneOptions(tile=64, samples=2, steps=steps)
    translate(generator, write(tmp_path / "s.tif", values), tmp_path / "whole.tif", options)
    for row, column in ((0, 157), (131, 30)):
        cut = UTM @ Affine.translation(column, row)
        translate(
            generator,
            write(tmp_path / "p.tif", values[:, row:, column:], transform=cut),
            tmp_path / "part.tif",
            options,
        )
        y, x = (64 + 48 if start else 0 for start in (row, column))  # px that a tile with something of the cut reaches
        for name in (tmp_path / "whole.tif", uncertainty_path(tmp_path / "whole.tif")):
            part = pixels(tmp_path / name.name.replace("whole", "part"))[:, y:, x:]
            assert part.size and np.array_equal(part, pixels(name)[:, row + y :, column + x :])


def test_halves_differ_from_the_whole_only_where_a_network_sees_beyond_the_cut(
    tmp_path: Path, local: Generator
) -> None:
    values, options = backscatter(80, 330), SceneOptions(tile=64)
    translate(local, write(tmp_path / "s.tif", values), tmp_path / "whole.tif", options)
    translate(local, write(tmp_path / "l.tif", values[:, :, :157]), tmp_path / "left.tif", options)
    right = write(tmp_path / "r.tif", values[:, :, 157:], transform=UTM @ Affine.translation(157, 0))
    translate(local, right, tmp_path / "right.tif", options)
    joined = np.concatenate([pixels(tmp_path / "left.tif"), pixels(tmp_path / "right.tif")], axis=2).astype(int)
    apart = np.abs(joined - pixels(tmp_path / "whole.tif"))
    assert apart[:, :, :149].max() <= 1 and apart[:, :, 165:].max() <= 1  # it sees 2 positions of 2 px to each side
    assert apart[:, :, 149:165].max() > 1  # of what lies beyond the cut it has only a reflection


def test_pixels_do_not_depend_on_how_many_tiles_are_blended_at_a_time(
    tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, options = write(tmp_path / "s.tif", backscatter(150, 330)), SceneOptions(tile=64, samples=2)
    translate(generator, scene, tmp_path / "long.tif", options)
    monkeypatch.setattr("distillers.sar.translate.RUN", 96)
    translate(generator, scene, tmp_path / "short.tif", options)
    for of in (Path, uncertainty_path):
        assert np.array_equal(pixels(of(tmp_path / "long.tif")), pixels(of(tmp_path / "short.tif")))


# --- holes


@pytest.mark.parametrize("kind", ["nan", "number", "option", "mask"])
def test_holes_stay_holes_and_nothing_else_becomes_one(tmp_path: Path, generator: Generator, kind: str) -> None:
    values, hole = backscatter(150, 200), np.zeros((150, 200), dtype=bool)
    hole[:70, :80] = hole[100:103, 150:170] = True
    fill = {"nan": np.nan, "number": -99.0, "option": -99.0, "mask": -15.0}[kind]
    values[:, hole] = fill
    if kind == "nan":
        values[1, 120, 20], hole[120, 20] = np.nan, True  # one band is enough
    scene = write(tmp_path / "s.tif", values, **({"nodata": -99.0} if kind == "number" else {}))
    if kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(scene, "r+") as raster:
            raster.write_mask(~hole)
    options = SceneOptions(tile=64, samples=3, nodata=-99.0 if kind == "option" else None)
    facts = translate(generator, scene, tmp_path / "o.tif", options)
    made, spread = pixels(tmp_path / "o.tif"), pixels(uncertainty_path(tmp_path / "o.tif"))
    assert np.array_equal((made == 0).all(0), hole) and np.array_equal((made == 0).any(0), hole)
    assert np.array_equal((spread == HOLE).all(0), hole) and np.array_equal((spread == HOLE).any(0), hole)
    assert facts.skipped == 3 and facts.valid_share == pytest.approx(1 - hole.mean())
    assert facts.units == "db"


def test_a_border_of_zeros_is_a_hole_and_the_ground_is_drawn_as_without(tmp_path: Path, generator: Generator) -> None:
    power = (10 ** (backscatter(90, 90) / 10)).astype(np.float32)
    power[:, :, :30], power[0, 50, 60] = 0, -1e-9
    zeros = translate(generator, write(tmp_path / "s.tif", power), tmp_path / "zeros.tif")
    power[:, :, :30] = np.nan
    translate(generator, write(tmp_path / "s.tif", power), tmp_path / "nan.tif")
    assert np.array_equal(pixels(tmp_path / "zeros.tif"), pixels(tmp_path / "nan.tif"))
    assert zeros.valid_share == pytest.approx(2 / 3) and any("--nodata 0" in told for told in zeros.warnings)


def test_what_lies_beside_a_scene_is_read_and_nothing_is_left_beside(tmp_path: Path, generator: Generator) -> None:
    values = backscatter(64, 64)[::-1].copy()
    values[0, 20, 30] = -9999
    scene = write(tmp_path / "s.tif", values, None, crs=None, transform=Affine.identity())
    said = '<PAMRasterBand band="{}"><Description>{}</Description></PAMRasterBand>'
    wkt = rasterio.crs.CRS.from_epsg(32632).to_wkt().replace('"', "&quot;")
    (tmp_path / "s.tif.aux.xml").write_text(
        f"<PAMDataset><SRS>{wkt}</SRS>{said.format(1, 'VH')}{said.format(2, 'VV')}</PAMDataset>"
    )
    facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=2))
    assert facts.bands == {"VV": 2, "VH": 1}
    assert "Numbers such as -9999, too low for decibels, were taken for no data" in facts.warnings[-1]
    with rasterio.open(tmp_path / "o.tif") as made:
        assert made.crs.to_epsg() == 32632 and np.argwhere(made.dataset_mask() == 0).tolist() == [[20, 30]]
    assert {p.name for p in tmp_path.iterdir()} == {"s.tif", "s.tif.aux.xml", "o.tif", "o.uncertainty.tif"}


def test_what_a_hole_holds_does_not_matter(tmp_path: Path, generator: Generator) -> None:
    made = []
    for fill in (-99.0, -15.0):
        values = backscatter(80, 80)
        values[:, 30:50, 30:50] = fill
        scene = write(tmp_path / "s.tif", values, nodata=fill)
        translate(generator, scene, tmp_path / "o.tif")
        made.append(pixels(tmp_path / "o.tif"))
    assert np.array_equal(*made)


# --- samples


def test_statistics_are_those_of_the_samples(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(70, 90))
    facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=6, seed=4))
    drawn = []
    for seed in range(4, 10):
        translate(generator, scene, tmp_path / "one.tif", SceneOptions(seed=seed))
        drawn.append(pixels(tmp_path / "one.tif").astype(float))
    with rasterio.open(uncertainty_path(tmp_path / "o.tif")) as raster:
        found = (raster.read() * SCALE).reshape(len(STATISTICS), 3, 70, 90)
        assert raster.scales == (SCALE,) * 12 and raster.descriptions[3] == "standard deviation red"
    assert np.array_equal(pixels(tmp_path / "o.tif"), drawn[0])
    wanted = [np.mean(drawn, 0), np.std(drawn, 0, ddof=1), *np.quantile(drawn, (0.05, 0.95), axis=0)]
    assert np.abs(found - wanted).max() < 1.01  # 0 became 1 where pixels are valid
    assert facts.mean_deviation == pytest.approx(np.std(drawn, 0, ddof=1).mean(), abs=0.02)
    assert not any("collapsed" in warning for warning in facts.warnings)


def test_the_folders_band_is_written_for_samples_like_those_it_was_fitted_to(
    tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write(tmp_path / "s.tif", backscatter(70, 90))
    band = Band(
        share=0.9, weights=generator.info.digest, data="pairs", n=20, steps=1, samples=3, limits=[20.0],
        half_widths=[10.0, 40.0], measured=0.9, worst=0.8, uncorrected=0.5,
    )  # fmt: skip
    monkeypatch.setattr(generator, "band", band)
    facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=3))
    with rasterio.open(uncertainty_path(tmp_path / "o.tif")) as raster:
        found = (raster.read() * SCALE).reshape(6, 3, 70, 90)
        assert raster.descriptions[12:] == tuple(f"90 % band, {e} {c}" for e in ("low", "high") for c in COLOURS)
        assert "80.0 % in the worst" in raster.tags()["FEWSTEP_BAND"] and "20 tiles of pairs" in facts.band
    half = np.where(found[1] <= 20, 10, 40)
    assert np.abs(found[4] - np.maximum(found[0] - half, 0)).max() <= 2 * SCALE
    assert np.abs(found[5] - np.minimum(found[0] + half, 255)).max() <= 2 * SCALE
    for other in (replace(band, samples=4), replace(band, steps=2), replace(band, weights="others")):
        monkeypatch.setattr(generator, "band", other)
        facts = translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=3))
        assert facts.band is None and any("No 90 % band" in warning for warning in facts.warnings)
        with rasterio.open(uncertainty_path(tmp_path / "o.tif")) as raster:
            assert raster.count == 12
    monkeypatch.setattr(generator, "band", replace(band, samples=1))
    assert translate(generator, scene, tmp_path / "o.tif").band is None  # one sample has no deviation


def test_a_student_that_ignores_its_noise_is_said_to_have_collapsed(tmp_path: Path, local: Generator) -> None:
    class Deaf(Local):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> Any:
            return super().forward(torch.cat([torch.zeros_like(x[:, :12]), x[:, 12:]], 1), time)

    deaf = Generator(Denoiser(Deaf(), local.schedule, "x0"), local.codec, local.info).eval()
    facts = translate(deaf, write(tmp_path / "s.tif", backscatter(64, 64)), tmp_path / "o.tif", SceneOptions(samples=4))
    assert any("collapsed to a point" in warning for warning in facts.warnings)


# --- units and bands


def test_one_scene_in_all_units_is_one_picture(tmp_path: Path, generator: Generator) -> None:
    """Float32 rounding moves values by 1e-6 dB: a level at most."""
    values, made = backscatter(96, 96).astype(np.float64), {}
    for units, numbers in {
        "db": values, "linear": 10 ** (values / 10), "amplitude": 10 ** (values / 20),
    }.items():  # fmt: skip
        scene = write(tmp_path / f"{units}.tif", numbers)
        facts = translate(
            generator, scene, tmp_path / "o.tif", SceneOptions(units=units if units == "amplitude" else "auto")
        )
        assert facts.units == units
        made[units] = pixels(tmp_path / "o.tif").astype(int)
    for units in ("linear", "amplitude"):
        assert np.abs(made[units] - made["db"]).max() <= 1


def test_digital_numbers_hang_on_their_white_not_on_their_scale(tmp_path: Path, generator: Generator) -> None:
    amplitude = 10 ** (backscatter(96, 96) / 20)
    made = []
    for factor in (900, 1800):
        scene = write(tmp_path / "s.tif", np.rint(amplitude * factor).astype(np.uint16))
        facts = translate(generator, scene, tmp_path / "o.tif")
        assert facts.units == "dn"
        made.append(pixels(tmp_path / "o.tif").astype(int))
    assert np.abs(made[0] - made[1]).mean() < 0.5


def test_scaled_integers_are_read_by_the_scale_the_file_names(tmp_path: Path, generator: Generator) -> None:
    values = backscatter(64, 64)
    hundreds = np.rint(values * 100)
    translate(generator, write(tmp_path / "s.tif", (hundreds / 100).astype(np.float32)), tmp_path / "a.tif")
    scene = write(tmp_path / "i.tif", hundreds.astype(np.int16))
    with rasterio.open(scene, "r+") as raster:
        raster.scales = (0.01, 0.01)
    facts = translate(generator, scene, tmp_path / "b.tif")
    assert facts.units == "db"
    assert np.abs(pixels(tmp_path / "a.tif").astype(int) - pixels(tmp_path / "b.tif")).max() <= 1


def test_one_scaled_band_beside_one_that_is_not(tmp_path: Path, generator: Generator) -> None:
    """Whole decibels in VV, hundredths in VH; the number that means no data is the file's, not the scaled one."""
    values = np.stack([np.full((64, 64), -12), np.rint(backscatter(64, 64)[1] * 100)]).astype(np.int16)
    values[:, :10] = -9999
    scene = write(tmp_path / "i.tif", values)
    with rasterio.open(scene, "r+") as raster:
        raster.scales = (1.0, 0.01)
    assert translate(generator, scene, tmp_path / "a.tif", SceneOptions(nodata=-9999)).units == "db"
    floats = values * np.array([1.0, 0.01])[:, None, None]
    floats[:, :10] = np.nan
    translate(generator, write(tmp_path / "f.tif", floats.astype(np.float32)), tmp_path / "b.tif")
    made, wanted = pixels(tmp_path / "a.tif").astype(int), pixels(tmp_path / "b.tif")
    assert np.abs(made - wanted).max() <= 1 and (made[:, :10] == 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_every_type_is_taken(tmp_path: Path, generator: Generator, dtype: str) -> None:
    numbers = backscatter(64, 64) if dtype.startswith("f") else 10 ** (backscatter(64, 64) / 20) * 600
    scene = write(tmp_path / "s.tif", np.clip(numbers, -60, 255).astype(dtype))
    facts = translate(generator, scene, tmp_path / "o.tif")
    assert facts.units == ("db" if dtype.startswith("f") else "dn") and pixels(tmp_path / "o.tif").std() > 5


def test_bands_are_chosen_by_name_or_number(tmp_path: Path, generator: Generator) -> None:
    values = backscatter(64, 64)
    both = write(tmp_path / "both.tif", values[::-1].copy(), ("VH", "VV"))
    made = {}
    for bands in (None, "VV", "VH", "VV=2", "2"):
        facts = translate(generator, both, tmp_path / "o.tif", SceneOptions(bands=bands))
        made[bands] = (facts.bands, pixels(tmp_path / "o.tif"))
    assert made[None][0] == {"VV": 2, "VH": 1} and made["VH"][0] == {"VH": 1}
    assert made["VV"][0] == made["VV=2"][0] == made["2"][0] == {"VV": 2}
    assert np.array_equal(made["VV"][1], made["2"][1]) and not np.array_equal(made["VV"][1], made["VH"][1])
    lone = write(tmp_path / "scene_vh.tif", values[1:], None)
    assert translate(generator, lone, tmp_path / "o.tif").bands == {"VH": 1}
    nameless = translate(generator, write(tmp_path / "s.tif", values[:1], None), tmp_path / "o.tif")
    assert nameless.bands == {"VV": 1} and any("assumed" in warning for warning in nameless.warnings)


def test_pixels_of_another_size_are_warned_about(tmp_path: Path, generator: Generator) -> None:
    def warned(crs: str, transform: Affine) -> list[str]:
        scene = write(tmp_path / "s.tif", backscatter(64, 64), crs=crs, transform=transform)
        return [w for w in translate(generator, scene, tmp_path / "o.tif").warnings if "Pixels" in w]

    assert not warned("EPSG:32632", UTM)
    assert "40 x 40 m" in warned("EPSG:32632", from_origin(5e5, 5e6, 40, 40))[0]
    assert "not square" in warned("EPSG:32632", from_origin(5e5, 5e6, 10, 18))[0]
    assert not warned("EPSG:4326", from_origin(11, 60.0, 1.8e-4, 9e-5))  # 10 m both ways at 60 degrees north
    assert warned("EPSG:4326", from_origin(11, 60.0, 1e-3, 1e-3))


# --- what is refused, and what is left behind


def gcps_only(path: Path) -> Path:
    points = [rasterio.control.GroundControlPoint(r, c, 11 + c / 1e4, 48 - r / 1e4) for r in (0, 63) for c in (0, 63)]
    assert from_gcps(points)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=64, width=64, dtype="uint16", gcps=points, crs="EPSG:4326"
    ) as raster:
        raster.write(np.full((1, 64, 64), 200, np.uint16))
    return path


def truncated(path: Path) -> Path:
    write(path, backscatter(300, 300))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def bomb(path: Path) -> Path:
    """A header that claims 4 million by 4 million pixels; the file has no data at all."""
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=4_000_000, width=4_000_000, dtype="float32", tiled=True,
        blockxsize=4096, blockysize=4096, sparse_ok=True, bigtiff="yes", crs="EPSG:32632", transform=UTM,
    ):  # fmt: skip
        pass
    return path


def text(path: Path) -> Path:
    path.write_text("no raster")
    return path


REFUSED = {
    "absent": (lambda p: p, "scene: .* existing file"),
    "no raster": (text, "scene: .* a raster that opens"),
    "truncated": (truncated, "scene: .* whole"),
    "bomb": (bomb, "scene: got '4000000x4000000 pixels'"),
    "complex": (
        lambda p: write(p, backscatter(64, 64).astype(np.complex64)),
        "scene: .*complex.* detected backscatter",
    ),
    "range geometry": (gcps_only, "scene: .*range geometry.* terrain-corrected"),
    "all nodata": (lambda p: write(p, np.full((2, 64, 64), np.nan, np.float32)), "scene: got 'no pixel with data'"),
    "tiny": (lambda p: write(p, backscatter(5, 64)), "scene: got '64x5 pixels'"),
    "units unclear": (lambda p: write(p, np.full((1, 64, 64), 0.2, np.float32)), "units: .*--units"),
    "hundreds of dB": (lambda p: write(p, np.rint(backscatter(64, 64) * 100).astype(np.int16)), "units: .*scaled"),
    "many bands": (lambda p: write(p, backscatter(64, 64, 1).repeat(4, 0), None), "bands: got '4 bands"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_scenes_are_refused_by_name_and_leave_nothing(tmp_path: Path, generator: Generator, case: str) -> None:
    make, message = REFUSED[case]
    scene, out = make(tmp_path / "s.tif"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(BadInput, match=f"(?s){message}"):
        translate(generator, scene, out / "o.tif", SceneOptions(tile=64))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"units": "dB"}, "units"), ({"units": "linear"}, "units"), ({"samples": 0}, "samples"),
        ({"samples": 65}, "samples"), ({"seed": -1}, "seed"), ({"batch": 0}, "batch"), ({"steps": 3}, "steps"),
        ({"tile": 30}, "tile"), ({"overlap": 8, "tile": 64}, "overlap"), ({"overlap": 40, "tile": 64}, "overlap"),
        ({"bands": "HH"}, "bands"), ({"bands": "VV=3"}, "bands"), ({"window": (0, 0, 81, 80)}, "window"),
        ({"window": (-1, 0, 8, 8)}, "window"), ({"window": (0, 0, 0, 8)}, "window"), ({"bbox": (0, 2, 1, 1)}, "bbox"),
        ({"bbox": (0, 0, np.inf, 1)}, "bbox"), ({"bbox": (0, 0, 1, 1), "window": (0, 0, 8, 8)}, "bbox"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(tmp_path: Path, generator: Generator, options, field: str) -> None:
    scene = write(tmp_path / "s.tif", backscatter(80, 80))
    with pytest.raises(BadInput) as caught:
        translate(generator, scene, tmp_path / "o.tif", SceneOptions(**options))
    assert caught.value.field == field and not (tmp_path / "o.tif").exists()


def test_power_said_to_be_decibels_is_refused(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", np.full((1, 64, 64), 300.0, np.float32), ("VV",))
    with pytest.raises(BadInput, match="units"):
        translate(generator, scene, tmp_path / "o.tif", SceneOptions(units="db"))


def test_outputs_that_cannot_be_are_refused(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(64, 64))
    before = scene.read_bytes()
    (tmp_path / "link.tif").symlink_to(scene)
    for out in (scene, tmp_path / "link.tif", tmp_path / "none" / "o.tif", tmp_path / "o.jpg"):
        with pytest.raises(BadInput, match="out"):
            translate(generator, scene, out)
    assert scene.read_bytes() == before
    scene = scene.rename(uncertainty_path(tmp_path / "o.tif"))
    with pytest.raises(BadInput, match=r"another file than .*, which is read"):
        translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=2))
    assert scene.read_bytes() == before


def test_an_interrupted_work_leaves_the_old_file_and_no_new_one(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(300, 300))
    translate(generator, scene, tmp_path / "o.tif", SceneOptions(tile=64))
    before = (tmp_path / "o.tif").read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        translate(generator, scene, tmp_path / "o.tif", SceneOptions(tile=64, seed=1), progress=stop)
    assert (tmp_path / "o.tif").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "s.tif"]
    assert not [t for t in threading.enumerate() if t.name.startswith("fewstep-")]


def test_what_an_older_result_left_beside_is_not_taken_for_the_new_ones(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(48, 48))
    out = tmp_path / "o.tif"
    translate(generator, scene, out, SceneOptions(samples=2), stac=True)
    for end in (".aux.xml", ".ovr"):
        (tmp_path / f"o.tif{end}").write_text("of the older picture")
    translate(generator, scene, out, SceneOptions(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "s.tif"]
    for other in ("o.json", "o.uncertainty.tif"):  # not of this library's making
        (tmp_path / other).write_text("{}")
    translate(generator, scene, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.json", "o.tif", "o.uncertainty.tif", "s.tif"]


def test_a_link_stays_one_and_leads_to_the_new_result(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(48, 48))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old.tif").write_text("what it led to")
    for name, target in (("o.tif", "old.tif"), ("o.json", "item.json"), ("o.uncertainty.tif", "new.tif")):
        (tmp_path / name).symlink_to(tmp_path / "store" / target)
    translate(generator, scene, tmp_path / "o.tif", SceneOptions(samples=2), stac=True)
    assert all((tmp_path / name).is_symlink() for name in ("o.tif", "o.json", "o.uncertainty.tif"))
    assert pixels(tmp_path / "store" / "old.tif").shape == (3, 48, 48)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["item.json", "new.tif", "old.tif"]
    (tmp_path / "lost.tif").symlink_to(tmp_path / "none" / "o.tif")
    with pytest.raises(BadInput, match="existing folder"):
        translate(generator, scene, tmp_path / "lost.tif")


def test_a_long_name_is_written_and_a_longer_one_refused(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(48, 48))
    long = tmp_path / ("a" * 251 + ".tif")
    translate(generator, scene, long)
    assert long.is_file()
    for out, options in ((long, {"samples": 2}), (tmp_path / ("ä" * 126 + ".tif"), {})):
        with pytest.raises(BadInput, match="255 bytes"):
            translate(generator, scene, out, SceneOptions(**options))
    with pytest.raises(BadInput, match="255 bytes"):
        translate(generator, scene, long, stac=True)


def test_a_preview_that_cannot_be_is_refused_before_the_work(tmp_path: Path, generator: Generator) -> None:
    scene = write(tmp_path / "s.tif", backscatter(48, 48))
    for preview in (tmp_path / "p.jpg", tmp_path / "none" / "p.png", tmp_path / f"{'p' * 260}.png"):
        with pytest.raises(BadInput):
            translate(generator, scene, tmp_path / "o.tif", preview=preview)
        assert not (tmp_path / "o.tif").exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, generator: Generator) -> None:
    """A limit on the size of files: the system refuses to write on, as it does on a full disk."""
    scene, out = write(tmp_path / "s.tif", backscatter(600, 600)), tmp_path / "out"
    out.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        with pytest.raises(BadInput, match=r"out: .*room"):
            translate(generator, scene, out / "o.tif", SceneOptions(tile=128))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(out.iterdir()) == []


def test_a_model_of_another_task_is_refused(tmp_path: Path, generator: Generator) -> None:
    other = Generator(generator.denoiser, generator.codec, replace(generator.info, task="image"))
    with pytest.raises(BadInput, match="model"):
        translate(other, write(tmp_path / "s.tif", backscatter(64, 64)), tmp_path / "o.tif")


# --- memory, the command, the data


def test_gdal_keeps_blocks_while_a_scene_is_read_and_written(tmp_path: Path, generator: Generator) -> None:
    """The limit is given in bytes: with 128 of them, meant as megabytes, every block was decoded again at each look."""
    kept = []
    scene = write(tmp_path / "s.tif", backscatter(64, 64))
    translate(generator, scene, tmp_path / "o.tif", progress=lambda *_: kept.append(get_gdal_config("GDAL_CACHEMAX")))
    assert kept and all(32 << 20 <= size <= 256 << 20 for size in kept)


@pytest.mark.process
def test_memory_does_not_grow_with_the_scene_its_width_or_the_samples(tmp_path: Path, generator: Generator) -> None:
    """4096 x 4096: 134 MB of backscatter and 201 MB of colours as floating-point numbers, which must not all be held.

    24,000 px with 8 samples: as much in rows of tiles and their edges. Most of it is holes, which are quick.
    """
    generator.save_pretrained(tmp_path / "tiny")
    code = (
        "import sys; from distillers.benchmarks.scene import peak_mb;"
        "from distillers.sar.translate import translate; from distillers.sar.options import SceneOptions;"
        "from distillers.generator import Generator;"
        "folder, scene, out, samples = sys.argv[1:];"
        "translate(Generator.from_pretrained(folder), scene, out, SceneOptions(samples=int(samples)));"
        "print(peak_mb())"
    )
    peaks = []
    for width, height, samples in ((1024, 1024, 1), (4096, 4096, 1), (24_000, 300, 8)):
        values = np.tile(backscatter(1024, 1024), (1, -(-height // 1024), -(-width // 1024)))[:, :height, :width]
        values[:, :, 4096:] = np.nan
        write(tmp_path / "s.tif", values, compress="deflate" if samples > 1 else None)
        places = [str(tmp_path / name) for name in ("tiny", "s.tif", "o.tif")]
        done = run([sys.executable, "-c", code, *places, str(samples)])
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert max(peaks) - peaks[0] < 390, peaks  # with GDAL's cache, 128 MB, which the small scene does not fill


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_without_a_traceback_or_a_file(
    tmp_path: Path, generator: Generator, number: signal.Signals
) -> None:
    generator.save_pretrained(tmp_path / "tiny")
    write(tmp_path / "s.tif", np.tile(backscatter(512, 512), (1, 12, 12)))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "distillers.cli", "translate", "s.tif", "out/o.tif", "--model", "tiny"]
    running = Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(out.iterdir()) and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(number)
    _, errors = running.communicate()
    assert "Traceback" not in errors
    assert running.returncode == (128 + number if number != signal.SIGINT else 130)
    assert list(out.iterdir()) == []


def test_the_demonstration_is_a_scene_like_any_other(tmp_path: Path, generator: Generator) -> None:
    demonstration(tmp_path / "s.tif", side=128, seed=3)
    facts = translate(generator, tmp_path / "s.tif", tmp_path / "o.tif")
    assert (facts.units, facts.bands) == ("db", {"VV": 1, "VH": 2}) and 0.85 < facts.valid_share < 0.99
    assert len(facts.warnings) == 1  # that colours are inferred, and nothing else
    with pytest.raises(BadInput, match="side"):
        demonstration(tmp_path / "s.tif", side=10)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real rasters beside the project: ../shared/data/geotiff")
@pytest.mark.parametrize(
    "name", sorted(p.name for p in DATA.glob("*.tif") if "rgb" not in p.name and "opt" not in p.name)
)
def test_real_rasters_are_translated_on_their_grid(tmp_path: Path, generator: Generator, name: str) -> None:
    facts = translate(generator, DATA / name, tmp_path / "o.tif")
    assert facts.units == ("dn" if name.startswith("sentinel") else "db")
    assert set(facts.bands) == ({"VV"} if "pyro" in name else {"VH"} if "sentinel" in name else {"VV", "VH"})
    with rasterio.open(DATA / name) as given_, rasterio.open(tmp_path / "o.tif") as made:
        assert (made.crs, made.transform, made.shape) == (given_.crs, given_.transform, given_.shape)
        assert np.array_equal(made.dataset_mask() > 0, given_.dataset_mask() > 0)


def test_axis_takes_small_scenes_as_one_tile(generator: Generator) -> None:
    assert axis(50, SceneOptions(), generator.size_multiple) == Axis(50, 52, 0)
    assert axis(1000, SceneOptions(), generator.size_multiple) == Axis(1000, 256, 64)
    assert axis(50, SceneOptions(), generator.size_multiple, 193) == Axis(50, 52, 0, 1, 192)
    assert axis(1000, SceneOptions(), generator.size_multiple, -1) == Axis(1000, 256, 64, 191, -192)
