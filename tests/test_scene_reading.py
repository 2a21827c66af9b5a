"""What of a raster is read as backscatter: its bands, and what is no ground. No network is needed to tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import label

from distillers.errors import BadInput
from distillers.models.radiometry import SENTINEL1_DB
from distillers.sar import border
from distillers.sar.border import LEAST, find_border
from distillers.sar.part import Part

rasterio = pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

from distillers.sar.raster import Source, read_stored, scaled  # noqa: E402

UTM = from_origin(565_000, 5_335_000, 10, 10)


def backscatter(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Decibels (2, height, width) of VV and VH."""
    levels = np.array([-12.0, -19.0], np.float32)[:, None, None]
    return levels + np.random.default_rng(seed).normal(0, 2, (2, height, width)).astype(np.float32)


def write(path: Path, values: NDArray[Any], names: tuple[str, ...] | None = ("VV", "VH"), **profile: Any) -> Path:
    options = {"crs": "EPSG:32632", "transform": UTM, "dtype": values.dtype, **profile}
    colours = options.pop("colorinterp", None)
    count, height, width = values.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **options) as raster:
        if colours:
            raster.colorinterp = colours
        if names:
            raster.descriptions = names
        raster.write(values)
    return path


def opened(path: Path, **options: Any) -> Source:
    return Source(path, SENTINEL1_DB, **options)


def holes(source: Source) -> NDArray[np.bool_]:
    return ~seen(source)[1]


def seen(source: Source) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What the model takes, and where there are data."""
    return source.read(Part(0, 0, *source.shape))


# --- bands


def test_transparency_is_a_hole_and_no_polarisation(tmp_path: Path) -> None:
    """As gdalwarp -dstalpha writes it: a third band, which GDAL's own masks do not follow."""
    numbers = np.rint(1000 * 10 ** (backscatter(40, 60) / 20)).astype(np.uint16)
    alpha = np.full((1, 40, 60), 65535, np.uint16)
    alpha[:, :, :20], alpha[:, 30:, 50:], alpha[:, 5, 30] = 0, 0, 1
    for names in (None, ("VV", "VH", "alpha")):
        kinds = (ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha)
        scene = write(tmp_path / "s.tif", np.concatenate([numbers, alpha]), names, colorinterp=kinds)
        source = opened(scene)
        assert source.bands == {"VV": 1, "VH": 2} and np.array_equal(holes(source), alpha[0] == 0)
        with pytest.raises(BadInput, match=r"bands: .*transparency"):
            opened(scene, bands="VV=3")


def test_the_fourth_of_four_8_bit_bands_is_no_transparency_where_it_has_a_name(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(1, 255, (4, 20, 20), np.uint8)
    scene = write(tmp_path / "s.tif", numbers, ("VV_asc", "VV_desc", "angle", "VH"))
    with rasterio.open(scene) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha  # as GDAL has it by default
    assert opened(scene, bands="VV=1,VH").bands == {"VV": 1, "VH": 4}


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    values = backscatter(20, 20)
    ratio = write(tmp_path / "s.tif", np.concatenate([values, values[1:] - values[:1]]), ("VV", "VH", "VH/VV"))
    assert opened(ratio).bands_how == "by band descriptions; left out: band 3 (VH/VV)"
    dates = write(tmp_path / "s.tif", np.concatenate([values, values]), ("VV_asc", "VH_asc", "VV_desc", "VH_desc"))
    with pytest.raises(BadInput, match=r"band 1 \(VV_asc\) and band 3 \(VV_desc\).*--bands VV=1,VH=2"):
        opened(dates)
    assert opened(dates, bands="VV=3,VH=4").bands == {"VV": 3, "VH": 4}


def test_bands_without_names_are_not_guessed_from_their_values(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "s.tif", backscatter(20, 20)[::-1].copy(), None))
    assert source.bands == {"VV": 1, "VH": 2} and "--bands says otherwise" in source.notes[0]


# --- what is beside the file


def test_what_is_said_beside_a_file_counts_as_what_is_said_in_it(tmp_path: Path) -> None:
    values = backscatter(40, 40)[::-1].copy()
    values[:, :9] = -50
    scene = write(tmp_path / "s.tif", values, None, crs=None)
    bands = "".join(
        f'<PAMRasterBand band="{i}"><Description>{name}</Description><NoDataValue>-50</NoDataValue></PAMRasterBand>'
        for i, name in ((1, "VH"), (2, "VV"))
    )
    wkt = rasterio.crs.CRS.from_epsg(32632).to_wkt().replace('"', "&quot;")
    (tmp_path / "s.tif.aux.xml").write_text(f"<PAMDataset><SRS>{wkt}</SRS>{bands}</PAMDataset>")
    source = opened(scene)
    assert source.bands == {"VV": 2, "VH": 1} and source.raster.crs.to_epsg() == 32632
    assert np.array_equal(holes(source), values[0] == -50)


# --- borders of zeros

BORDERED = {
    "power": lambda db: (10 ** (db / 10)).astype(np.float32),
    "decibels": lambda db: db,
    "digital numbers": lambda db: np.rint(1000 * 10 ** (db / 20)).astype(np.uint16),
}


@pytest.mark.parametrize("kind", BORDERED)
@pytest.mark.parametrize("share", [0.25, 0.7])
def test_a_border_of_zeros_is_a_hole_and_moves_nothing_else(tmp_path: Path, kind: str, share: float) -> None:
    db = backscatter(120, 100)
    rows, columns = np.mgrid[:120, :100]
    outside = columns + 0.2 * rows < 100 * share
    values = np.where(outside, 0, BORDERED[kind](db))
    values[:, 60, 95], outside[60, 95] = 0, False  # a pixel without an echo is ground
    scene = write(tmp_path / "s.tif", values.astype(BORDERED[kind](db).dtype))
    found = opened(scene)
    assert np.array_equal(holes(found), outside)
    (note,) = found.notes
    assert f"{100 * outside.mean():.3g} % of the scene" in note and "--nodata 0" in note
    scene = write(tmp_path / "t.tif", np.where(outside, -999, values.astype(np.float64)).astype(np.float32))
    told = opened(scene, nodata=-999)
    assert found.units == told.units and found.shift == pytest.approx(told.shift, abs=1e-4)
    ground = np.broadcast_to(~outside, (2, *outside.shape))
    assert seen(found)[0][ground] == pytest.approx(seen(told)[0][ground], abs=1e-4)


def test_zeros_between_ground_and_other_holes_are_a_border(tmp_path: Path) -> None:
    """A scene with a border of zeros, warped to a grid whose outside is NaN."""
    values = backscatter(100, 100)
    values[:, :40], values[:, :25] = 0, np.nan
    assert np.array_equal(holes(opened(write(tmp_path / "s.tif", values)))[:, 0], np.arange(100) < 40)


def test_a_border_is_found_where_no_window_of_the_sample_lies(tmp_path: Path) -> None:
    values = np.tile(backscatter(500, 300), (1, 6, 1))
    values[:, 260:380, -2:] = 0  # the windows end at row 256 and begin again at 392
    for tiled in (True, False):
        source = opened(write(tmp_path / "s.tif", values, tiled=tiled))
        assert source.border.pixels == 240 and np.array_equal(np.flatnonzero(holes(source)[300]), [298, 299])


def test_scattered_zeros_and_those_in_8_bits_are_ground_and_told(tmp_path: Path) -> None:
    """Power that was clipped at zero over dark water, up to the edge; pictures, whose 0 may be water."""
    power = (10 ** (backscatter(80, 80) / 10)).astype(np.float32)
    power[:, np.random.default_rng(0).random((80, 80)) < 0.4] = 0
    pictures = np.random.default_rng(1).integers(1, 255, (2, 80, 80), np.uint8)
    pictures[:, :30] = 0
    for values in (power, pictures):
        source = opened(write(tmp_path / "s.tif", values))
        (note,) = source.notes
        assert not holes(source).any() and "drawn as ground: --nodata 0 if" in note


def test_a_scene_of_zeros_has_no_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no pixel with data"):
        opened(write(tmp_path / "s.tif", np.zeros((2, 20, 20), np.float32)))


def brute_force(zero: NDArray[np.bool_], empty: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The border by its definition, group by group."""
    height, width = zero.shape
    inside = zero | empty
    ground = ~np.pad(inside, 1, constant_values=True)
    beside = sum(
        ground[1 + y : 1 + y + height, 1 + x : 1 + x + width].astype(int) for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0))
    )
    found, groups = np.zeros_like(zero), label(inside)
    for i in range(1, groups[1] + 1):
        group = groups[0] == i
        edge = group[0].any() or group[-1].any() or group[:, 0].any() or group[:, -1].any()
        own = group & zero
        if edge and own.sum() >= min(LEAST, height, width) and beside[own].sum() <= own.sum():
            found |= own
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 50), st.integers(8, 50), st.integers(1, 60), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_a_border_does_not_depend_on_the_strips_it_is_searched_in(
    height: int, width: int, strip: int, share: float, wedge: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    zero = rng.random((height, width)) < (0.1 if wedge else share)
    if wedge:
        turn = 6.3 * rng.random()
        zero |= np.cos(turn) * (columns - width / 2) + np.sin(turn) * (rows - height / 2) > share * height / 2
    empty = (rng.random((height, width)) < 0.1) & ~zero
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border, "STRIP", strip * width)
        found = find_border(lambda top, n: (zero[top : top + n], empty[top : top + n]), height, width)
    expected = brute_force(zero, empty)
    assert found.pixels == expected.sum()
    for _ in range(5):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        part = Part(top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        assert np.array_equal(found.within(part), expected[part.rows, part.columns])
    assert np.array_equal(found.within(Part(0, 0, height, width)), expected)


def test_more_zeros_than_can_be_kept_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "MAX_RUNS", 20)
    values = backscatter(60, 60)
    values[:, :30] = 0
    source = opened(write(tmp_path / "s.tif", values), units="db")
    assert not holes(source).any() and "--nodata 0 if" in source.notes[-1]


# --- numbers beyond


def test_a_single_number_decides_nothing_wherever_it_lies(tmp_path: Path) -> None:
    """In or between the windows that units are decided by: the same units, and the same ground elsewhere."""
    values = np.tile(backscatter(400, 400), (1, 8, 1))
    found = []
    for row in (0, 300, None):  # 300 is between two windows
        changed = values.copy()
        if row is not None:
            changed[0, row, 0] = -101.3
        source = opened(write(tmp_path / "s.tif", changed))
        part, valid = source.read(Part(400, 0, 400, 400))
        assert source.units == "db" and not source.notes and valid.all()
        found.append(part)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with pytest.raises(BadInput, match=r"units: got 'linear"):  # one bright pixel does not make decibels power
        values[0, 0, 0] = 3
        opened(write(tmp_path / "s.tif", values), units="linear")


def test_numbers_that_no_decibels_have_are_holes(tmp_path: Path) -> None:
    values = backscatter(50, 50)
    values[0, 7, 9], values[1, 20, 30], values[0, 1, 1], values[0, 8, 8] = -9999, -3e38, -101.3, np.nan
    source = opened(write(tmp_path / "s.tif", values), units="auto")
    assert np.argwhere(holes(source)).tolist() == [[7, 9], [8, 8], [20, 30]]
    assert source.lowest == pytest.approx(-3e38)
    values[:, 10:20] = -99
    with pytest.raises(BadInput, match=r"units: .*-3e\+38.*beyond decibels; 20 % are -99, no data\?.*--nodata NUMBER"):
        opened(write(tmp_path / "s.tif", values))
    values[:, 10:20], values[:, 10, :40] = -12, -99
    (note, _) = opened(write(tmp_path / "s.tif", values)).notes
    assert "1.6 % of VV are -99, " in note and "darkest ground: --nodata, as stored, if" in note


def test_a_number_below_zero_that_noise_does_not_repeat_is_told(tmp_path: Path) -> None:
    power = (10 ** (backscatter(50, 50) / 10)).astype(np.float32)
    power[:, ::7, :5] *= -0.01  # where noise was subtracted
    assert not opened(write(tmp_path / "s.tif", power), units="linear").notes
    power[0, 20:22, :20] = -1
    (note,) = opened(write(tmp_path / "s.tif", power), units="linear").notes
    assert note.startswith("1.6 % of VV are -1, below 0,") and "--nodata" in note


def test_nodata_is_the_number_that_is_stored(tmp_path: Path) -> None:
    """Hundredths of decibels with a scale: -9999 is stored, -99.99 is read."""
    stored = np.rint(backscatter(40, 40) * 100).astype(np.int16)
    stored[:, 5:9] = -9999
    scene = write(tmp_path / "s.tif", stored)
    with rasterio.open(scene, "r+") as raster:
        raster.scales = (0.01, 0.01)
    source = opened(scene, nodata=-9999)
    assert np.array_equal(holes(source), stored[0] == -9999)
    with pytest.raises(BadInput, match=r"10 % are -99.99, no data"):
        opened(scene, nodata=-99.99)
    with rasterio.open(scene) as raster:
        numbers, valid = read_stored(raster, [2], nodata=-9999)
        assert numbers.dtype == np.int16 and np.array_equal(valid, stored[1] != -9999)
        assert scaled(raster, [2], numbers) == pytest.approx(stored[1:] * 0.01)
