"""What SAR numbers are taken for, in decibels and to a network; and the plain refusal where that cannot be told."""

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.models.band_names import name_bands, polarisation_of, polarisations_of_file
from distillers.models.radiometry import (
    AMPLITUDE,
    LOWEST_DB,
    SENTINEL1,
    SENTINEL1_DB,
    Radiometry,
    can_be,
    decibels,
    decide_units,
    measure_white,
)


def land(mean: float, seed: int = 0) -> NDArray[np.float32]:
    """Decibels with speckle."""
    return np.random.default_rng(seed).normal(mean, 3, 4000).astype(np.float32)


def power(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(10 ** (values / 10), dtype=np.float32)


def amplitude(values: NDArray[np.float32], factor: float = 1.0) -> NDArray[np.float32]:
    return np.asarray(factor * 10 ** (values / 20), dtype=np.float32)


def spiked(values: NDArray[np.float32], number: float, share: float = 0.0) -> NDArray[np.float32]:
    """Values of which a share, or a single one, is a number that means something else."""
    values = values.copy()
    values[: max(1, int(share * len(values)))] = number
    return values


def noisy(share: float) -> NDArray[np.float32]:
    """Linear power of land, `share` of it below zero, for noise was subtracted."""
    values = power(land(-12))
    values[: int(share * len(values))] *= -1
    return values


# --- units

VV, VH = land(-11.5), land(-19, 1)


@pytest.mark.parametrize(
    ("units", "samples"),
    [
        ("db", {"VV": VV, "VH": VH}),
        ("db", {"VV": VV.astype(np.float64)}),
        ("db", {"": np.round(VV).astype(np.int16)}),
        ("linear", {"VV": power(VV), "VH": power(VH)}),
        ("linear", {"VV": noisy(0.02)}),
        ("db", {"VV": spiked(VV, -101.3)}),  # noise that was clamped; no single number decides
        ("db", {"VV": spiked(VV, -9999), "VH": spiked(VH, 51)}),
        ("db", {"VV": spiked(VV, -100, 0.04)}),
        ("dn", {"VV": spiked(np.zeros(100, np.uint16) + 1, 9, 0.2)}),
        ("amplitude", {"VV": amplitude(VV), "VH": amplitude(VH)}),
        ("linear", {"VV": power(land(-7)), "VH": power(VH)}),  # VV could be amplitude too, VH could not
        ("dn", {"VV": amplitude(VV, 1000).astype(np.uint16), "VH": amplitude(VH, 1000).astype(np.uint16)}),
        ("dn", {"VV": amplitude(VV, 1000)}),
        ("dn", {"VV": np.arange(256, dtype=np.uint8)}),
        ("dn", {"": np.zeros(9, dtype=np.uint8)}),
        ("dn", {"VV": np.array([0, 1, 2, 7] * 9, dtype=np.uint16)}),  # dark, but whole numbers
    ],
)
def test_units_are_told_by_the_values(units: str, samples: dict[str, NDArray[Any]]) -> None:
    found, why = decide_units(samples)
    assert found == units
    assert all((band or "the band") in why for band in samples)


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ({"VV": np.round(VV * 100).astype(np.int16)}, "beyond decibels; scaled"),
        ({"VV": spiked(VV, -9999, 0.06)}, "-9999.*beyond decibels"),
        ({"VV": spiked(VV, 51, 0.06)}, "to 51.*beyond decibels"),
        ({"VV": noisy(0.06)}, "6 % negative: neither"),
        ({"VV": spiked(amplitude(VV, 1000), -32768, 0.2)}, "20 % negative: .* power; 20 % are -32768, no data"),
        ({"VV": power(land(-7))}, "-7.* dB if linear, -14.* dB if amplitude; .*: amplitude and linear"),
        ({"VV": power(land(-60))}, "plausible for land: neither"),
        ({"VV": np.zeros(100, np.float32)}, "hardly any backscatter"),
        ({"VV": VV, "VH": power(VH)}, "VV: .*decibels.*VH: .*if linear"),
        ({"VV": VV, "VH": np.zeros(9, np.float32)}, "VH: .*hardly any"),
    ],
)
def test_units_that_the_values_do_not_tell_are_refused_with_advice(samples: dict[str, NDArray[Any]], why: str) -> None:
    with pytest.raises(BadInput, match=why) as error:
        decide_units(samples)
    assert error.value.field == "units" and "--units db | linear | amplitude | dn" in error.value.allowed


# --- decibels


@pytest.mark.parametrize(("units", "expected"), [("linear", -20), ("amplitude", -40), ("dn", -40), ("db", 0.01)])
def test_decibels_by_units(units: str, expected: float) -> None:
    assert decibels(np.array([0.01]), units) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("units", ["linear", "amplitude", "dn"])
def test_no_backscatter_is_the_lowest_level_and_no_data_stays_none(units: str) -> None:
    found = decibels(np.array([0.0, -0.3, 1e-30, 1.0, np.nan]), units)
    assert found.dtype == np.float32
    assert found[:4] == pytest.approx([LOWEST_DB, LOWEST_DB, LOWEST_DB, 0], abs=1e-4) and np.isnan(found[4])


def test_decibels_beyond_what_radar_sees_are_clamped() -> None:
    assert decibels(np.array([-101.3, -80, 12.5, 51, np.nan]), "db")[:4] == pytest.approx([-80, -80, 12.5, 50])
    assert np.isnan(decibels(np.array([np.nan]), "db")[0])


@pytest.mark.parametrize(
    ("units", "samples", "fits"),
    [
        ("db", {"VV": spiked(VV, -101.3)}, True),
        ("db", {"VV": VV, "VH": spiked(VH, -9999, 0.06)}, False),
        ("linear", {"VV": power(VV), "VH": np.zeros(9, np.float32)}, True),
        ("linear", {"VV": spiked(VV, 0.5), "VH": VH}, False),  # one bright pixel is no power
        ("dn", {"VV": VV}, False),
    ],
)
def test_units_that_a_user_names_are_held_against_the_values(
    units: str, samples: dict[str, NDArray[Any]], fits: bool
) -> None:
    assert can_be(samples, units) == fits


def test_integers_are_not_divided_as_integers() -> None:
    assert decibels(np.array([0, 1, 10, 1000], np.uint16), "dn") == pytest.approx([LOWEST_DB, 0, 20, 60], abs=1e-4)


@given(st.floats(-79, 49), st.sampled_from(["linear", "amplitude"]))
def test_decibels_survive_the_way_to_power_and_back(level: float, units: str) -> None:
    numbers = np.array([10 ** (level / (10 if units == "linear" else 20))])
    assert decibels(numbers, units)[0] == pytest.approx(level, abs=1e-3)


def test_white_is_the_99_per_cent_quantile_or_255() -> None:
    numbers = np.append(np.arange(1, 101, dtype=np.float32), np.nan)
    assert measure_white(numbers, "dn") == pytest.approx(20 * np.log10(99), abs=0.01)
    assert measure_white(np.array([3, 4], np.uint8), "dn") == pytest.approx(20 * np.log10(255))


# --- what a network sees


def test_unit_clips_each_band_to_its_range() -> None:
    values = np.array([[-100, -25, -12.5, 0, 9]], np.float32)
    seen = SENTINEL1_DB.normalize({"VH": values, "VV": values})
    assert seen.dtype == np.float32 and seen.shape == (2, 1, 5)
    assert seen[0, 0] == pytest.approx([-1, -1, 0, 1, 1])
    assert seen[1, 0] == pytest.approx([-1, 7.5 / 16.25 - 1, 20 / 16.25 - 1, 1, 1], abs=1e-6)


def test_a_band_that_is_missing_and_what_has_no_data_are_zero() -> None:
    values = np.array([[-20, np.nan]], np.float32)
    seen = SENTINEL1_DB.normalize({"VH": values})
    assert (seen[0] == 0).all() and seen[1, 0, 1] == 0 and seen[1, 0, 0] == pytest.approx(12.5 / 16.25 - 1)
    assert AMPLITUDE.normalize({"HH": values})[0, 0] == pytest.approx([2 * 10**-1 - 1, 0])


def test_amplitude_takes_one_band_of_any_name_for_all_channels() -> None:
    three = Radiometry(channels=3)
    seen = three.normalize({"HV": np.array([[0.0, 5, -20]])})
    assert seen.shape == (3, 1, 3) and (seen == seen[:1]).all()
    assert seen[0, 0] == pytest.approx([1, 1, -0.8])
    with pytest.raises(ValueError, match="unpack"):
        AMPLITUDE.normalize({"VV": np.zeros((1, 1)), "VH": np.zeros((1, 1))})


NUMBER = st.floats(-500, 500, width=32) | st.just(float("nan"))


@given(st.lists(NUMBER, min_size=1, max_size=20), st.sampled_from(["VV", "VH"]), st.sampled_from([1, 2]))
def test_a_network_sees_numbers_from_minus_one_to_one(numbers: list[float], band: str, forms: int) -> None:
    seen = (AMPLITUDE if forms == 1 else SENTINEL1_DB).normalize({band: np.array([numbers], np.float32)})
    assert np.isfinite(seen).all() and np.abs(seen).max() <= 1


def test_levels_hang_on_the_white_of_the_scene_where_they_have_none() -> None:
    assert SENTINEL1_DB.is_relative("dn") and AMPLITUDE.is_relative("db") and not SENTINEL1_DB.is_relative("linear")
    assert (SENTINEL1_DB.white_level("VV"), SENTINEL1_DB.white_level("VH"), AMPLITUDE.white_level("VV")) == (
        -5.3,
        -13.0,
        0.0,
    )


def test_a_plane_says_whether_levels_are_absolute() -> None:
    values = np.full((2, 1, 3), -12.5, np.float32)
    seen = SENTINEL1.normalize({"VV": values}, np.array([True, False])[:, None, None])
    assert seen.shape == (3, 2, 1, 3) and (seen[:2] == 0).all() and (seen[2, 0] == 1).all() and (seen[2, 1] == -1).all()
    assert (SENTINEL1.from_picture(np.ones((4, 4)), "VV")[2] == -1).all()
    assert SENTINEL1.to_picture(SENTINEL1.normalize({}.fromkeys(["VH"], values[0]), True))[1] == "VH"


# --- the manifest's words


@pytest.mark.parametrize("radiometry", [SENTINEL1, SENTINEL1_DB, AMPLITUDE, Radiometry(channels=2)])
def test_a_radiometry_is_what_its_words_say(radiometry: Radiometry) -> None:
    assert Radiometry.of(json.loads(json.dumps(radiometry.to_dict()))) == radiometry


def test_without_words_it_is_amplitude() -> None:
    assert Radiometry.of(None) == Radiometry.of({}) == Radiometry()


WORDS = SENTINEL1_DB.to_dict()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"form": "phase"}, "sar.form"),
        ({"channels": "two"}, "sar.channels"),
        ({"channels": 0}, "sar"),
        (WORDS | {"channels": 3}, "sar"),
        (WORDS | {"bands": ["VV", "HH"]}, "sar"),
        (WORDS | {"white_db": {"VV": -5.3}}, "sar"),
        (WORDS | {"clip_db": {"VV": [-25, 0], "VH": [0, -32]}}, "sar"),
        (WORDS | {"clip_db": {"VV": [-25, 0], "VH": [-32]}}, "sar.clip_db.VH"),
        ({"form": "db"}, "sar"),
        (WORDS | {"calibrated": True}, "sar"),  # the plane is a channel more
        ({"channels": 2, "calibrated": True}, "sar.calibrated"),
        (WORDS | {"levels": {"cells": [4]}}, "sar.levels"),
        (WORDS | {"levels": {"cells": [5], "frequencies": 0}}, "sar.levels"),
        (WORDS | {"levels": [5, 17]}, "sar.levels"),
    ],
)
def test_words_that_cannot_be_followed_are_named(words: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as error:
        Radiometry.of(words)
    assert error.value.field == field or error.value.field.startswith(f"{field}.")


# --- bands


@pytest.mark.parametrize(
    ("wanted", "descriptions", "file", "bands", "how"),
    [
        (None, ("VH", "VV"), "", {"VV": 2, "VH": 1}, "descriptions"),
        (None, ("Gamma0_VH_db", "Gamma0_VV_db", "angle"), "", {"VV": 2, "VH": 1}, "descriptions"),
        (None, ("vh",), "s1_vv.tif", {"VH": 1}, "descriptions"),
        (None, (None,), "S1A_iw_vh_rtc", {"VH": 1}, "file's name"),
        (None, (None,), "pyrosar-VV", {"VV": 1}, "file's name"),
        (None, (None,), "vv_vh_stack", {"VV": 1}, "assumed"),
        (None, ("bands", "bands"), "", {"VV": 1, "VH": 2}, "assumed"),
        (None, ("Band 1", "Band 2"), "S1A_IW_GRDH_1SDV_2020", {"VV": 1, "VH": 2}, "assumed: .* file's name lists"),
        (None, ("VV", "VH", "VH/VV"), "", {"VV": 1, "VH": 2}, r"left out: band 3 \(VH/VV\)"),
        (None, ("VH", "VVdivVH", None), "", {"VH": 1}, r"left out: band 2 \(VVdivVH\), band 3 \(no description\)"),
        (None, ("VV", "VH", "HH", "HV"), "", {"VV": 1, "VH": 2}, "left out: band 3"),
        (None, ("VHdB", "VVdB"), "", {"VV": 2, "VH": 1}, "descriptions"),
        (None, ("Sigma0_VV_mst_01Jan2020", "Sigma0_VH_mst_01Jan2020"), "", {"VV": 1, "VH": 2}, "descriptions"),
        (None, ("VV_coherence", "vv", "localIncidenceAngle"), "", {"VV": 2}, "left out: band 1"),
        (None, ("sigma0",), "vh.tif", {"VH": 1}, "file's name"),
        (None, ("sigma0",), "", {"VV": 1}, "assumed"),
        (None, (None,), "S1A_IW_GRDH_1SSV_2020", {"VV": 1}, "file's name"),
        (None, (None,), "S1A_IW_GRDH_1SDV_2020_VH", {"VH": 1}, "file's name"),
        (None, (None,), "S1A_IW_GRDH_1SDV_2020", {"VV": 1}, "assumed"),
        ("VV,VH", ("VV", "VH", "VH/VV"), "", {"VV": 1, "VH": 2}, "asked"),
        ("VV=3,VH=4", ("VV_asc", "VH_asc", "VV_desc", "VH_desc"), "", {"VV": 3, "VH": 4}, "asked"),
        ("VV=1,VH=2", ("HH", "HV"), "", {"VV": 1, "VH": 2}, "asked"),
        ("VV,VH", (None, None), "", {"VV": 1, "VH": 2}, "asked"),
        ("vh, vv", (None, None), "", {"VH": 1, "VV": 2}, "asked"),
        ("VH", ("VV", "VH"), "", {"VH": 2}, "asked"),
        ("VH", (None,), "", {"VH": 1}, "asked"),
        ("2,1", (None, None), "", {"VV": 2, "VH": 1}, "asked"),
        ("2", ("VV", "VH"), "", {"VH": 2}, "asked"),
        ("VV=3", (None, None, None), "", {"VV": 3}, "asked"),
        ("VH=1,VV=4", (None,) * 4, "", {"VH": 1, "VV": 4}, "asked"),
    ],
)
def test_bands_are_named(
    wanted: str | None, descriptions: tuple[str | None, ...], file: str, bands: dict[str, int], how: str
) -> None:
    found, told = name_bands(wanted, descriptions, file)
    assert found == bands and re.search(how, told)


@pytest.mark.parametrize(
    ("wanted", "descriptions"),
    [
        (None, (None, None, None)),
        ("HH", (None,)),
        ("VV,VV", (None, None)),
        ("VV=x", (None,)),
        ("VV=", ("VH",)),
        ("VV=0", (None,)),
        ("VV=2", (None,)),
        ("3", (None, None)),
        ("1,1", (None, None)),
        ("VV=1,VH=1", (None, None)),
        ("VH", ("VV", "angle")),
        ("VV", (None, None)),  # which of the two?
        ("", (None,)),
        ("VV,", (None, None)),
        ("VV,VH", ("HH", "HV")),  # by position only where bands have no names
        ("VV", ("VV_asc", "VV_desc")),
        (None, ("amplitude", "phase")),
        (None, (None, "incidenceAngle")),
        (None, ("VH/VV",)),
        (None, ("VV_coherence",)),
        (None, ("incidence angle",)),
    ],
)
def test_bands_that_are_not_there_are_refused(wanted: str | None, descriptions: tuple[str | None, ...]) -> None:
    with pytest.raises(BadInput, match="VV") as error:
        name_bands(wanted, descriptions)
    assert error.value.field == "bands"


@pytest.mark.parametrize(
    ("descriptions", "file", "given", "allowed"),
    [
        (
            ("VV_ascending", "VH_ascending", "VV_descending", "VH_descending"),
            "",
            r"VV in band 1 \(VV_ascending\) and band 3 \(VV_descending\); VH in band 2 .* and band 4",
            "--bands VV=1,VH=2 ",
        ),
        (("Sigma0_VV_mst_01Jan2020", "Sigma0_VV_slv1_13Jan2020"), "", "VV in band 1 .* and band 2", "--bands VV=1 "),
        (("HH", "HV"), "", r"HH in band 1 \(HH\); HV in band 2 \(HV\)", "VV, VH; --bands VV=1,VH=2 "),
        (("hh",), "", "HH in band 1", "--bands VV=1 "),
        ((None, None), "S1A_EW_GRDM_1SDH_2020.tif", "1SDH", "--bands VV=1,VH=2 "),
        ((None, None), "scene_vh_vv.tif", "scene_vh_vv", "--bands VV=1,VH=2 "),
        ((None, None), "two_dates_vv.tif", "two_dates_vv", "--bands VV=1,VH=2 "),
        ((None,), "scene_hv.tif", "named for HV", "--bands VV=1 "),
        (("ascending", "descending"), "", "ascending, descending", "--bands VV=NUMBER,VH=NUMBER"),
    ],
)
def test_a_refusal_names_the_bands_and_the_option_that_decides(
    descriptions: tuple[str | None, ...], file: str, given: str, allowed: str
) -> None:
    with pytest.raises(BadInput) as error:
        name_bands(None, descriptions, file)
    assert error.value.field == "bands" and re.search(given, error.value.given)
    assert allowed in f"{error.value.allowed} "


def test_transparency_is_never_a_polarisation() -> None:
    assert name_bands(None, (None, None, "alpha"), "", [3])[0] == {"VV": 1, "VH": 2}
    assert name_bands(None, (None, None), "vh.tif", [2])[0] == {"VH": 1}
    assert name_bands("VH,VV", (None, None, None), "", [1])[0] == {"VH": 2, "VV": 3}
    with pytest.raises(BadInput, match="transparency"):
        name_bands("VV=2", (None, None), "", [2])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("VV", "VV"), ("vh", "VH"), ("Sigma0_VV_db", "VV"), ("Gamma0VH", "VH"), ("gammaVV", "VV"), ("VHdB", "VH"),
        ("dbVV", "VV"), ("IntensityVH", "VH"), ("VVAsc", "VV"), ("VH2020", "VH"), ("S1 (vv)", "VV"), ("HV", "HV"),
        ("s1-iw-vh-20200101t1", "VH"), ("Calibrated VV", "VV"), ("VV, noise removed", "VV"),
        ("VV/VH", None), ("VVVH", None), ("VVoverVH", None), ("VH minus vv", None), ("VV ratio", None), ("", None),
        (None, None), ("vvh", None), ("savvy", None), ("incidenceAngleVV", None), ("VV_LIA", None), ("coh_VV", None),
        ("VV_stdDev", None), ("alpha", None),
    ],
)  # fmt: skip
def test_a_description_names_one_polarisation_or_none(text: str | None, name: str | None) -> None:
    assert polarisation_of(text) == name


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("a/VV/scene_VH.tif", ["VH"]), ("vh-vv.tif", ["VH", "VV"]), ("S1B_EW_GRDM_1SSH_2.tif", ["HH"]),
        ("S1B_EW_GRDM_1SDH_2.tif", ["HH", "HV"]), ("S1A_IW_1SDV_x_VH.tif", ["VH"]), ("VVH.tif", []),
        ("los_angeles.tif", []),
    ],
)  # fmt: skip
def test_polarisations_of_a_files_name(file: str, found: list[str]) -> None:
    assert polarisations_of_file(file) == found


@pytest.mark.parametrize(
    ("own", "bands", "file", "band"),
    [
        (SENTINEL1_DB, "VH", "0-VV.png", "VH"),  # what is said wins
        (SENTINEL1_DB, None, "0-VV.png", "VV"),
        (SENTINEL1_DB, None, r"C:\VV\s1_vh.png", "VH"),
        (SENTINEL1_DB, None, 'attachment; filename="S1 VH.png"', "VH"),
        (Radiometry.of(SENTINEL1_DB.to_dict() | {"channels": 1, "bands": ["VV"]}), None, "tile.png", "VV"),
        (AMPLITUDE, None, "tile.png", ""),
        (SENTINEL1_DB, None, "VV/tile.png", None),
        (SENTINEL1_DB, None, "VV-VH.png", None),
        (SENTINEL1_DB, None, "", None),
        (SENTINEL1_DB, "HH", "0-VV.png", None),
        (SENTINEL1_DB, None, "0-HH.png", None),
        (AMPLITUDE, None, "0-HH.png", ""),
        (AMPLITUDE, "VV,VH", "", None),
    ],
)
def test_a_pictures_polarisation_is_said_named_or_the_only_one(
    own: Radiometry, bands: str | None, file: str, band: str | None
) -> None:
    if band is not None:
        assert own.band_of_picture(bands, file) == band
        return
    with pytest.raises(BadInput, match=r"VV.* VH") as error:
        own.band_of_picture(bands, file)
    assert error.value.field == "bands"
