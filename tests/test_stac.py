"""STAC items: valid, in the right place at the right time, with every file that was written."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_scene import NETWORK, UTM, backscatter, info, write

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.models.schedule import VariancePreserving
from distillers.sar.options import SceneOptions
from distillers.sar.stac import footprint, parse_time, time_of
from distillers.sar.translate import translate
from distillers.teacher import Teacher

rasterio = pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")
from rasterio.crs import CRS  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

TIME = {"datetime": "2020-01-13T05:45:10Z"}


@pytest.fixture(scope="module")
def generator() -> Generator:
    teacher = Teacher.random(info(), NETWORK, VariancePreserving.from_betas().to_config(), "x0", PixelUnshuffle(2))
    return Generator(teacher.denoiser, teacher.codec, teacher.info).eval()


def scene(path: Path, side: int = 40, tags: dict[str, str] = TIME, **profile: Any) -> Path:
    write(path, backscatter(side, side), **profile)
    with rasterio.open(path, "r+") as raster:
        raster.update_tags(**tags)
    return path


def item_of(generator: Generator, path: Path, *, valid: bool = True, **more: Any) -> dict[str, Any]:
    out = path.with_name("o.tif")
    translate(generator, path, out, stac=True, **more)
    item = json.loads(out.with_suffix(".json").read_text())
    if valid:
        validate(item)
    return item


FIELDS = {  # of the extensions' specifications, whose schemas lie on a host that tests do not ask
    "proj:code": lambda value: value is None or value.startswith("EPSG:"),
    "proj:wkt2": lambda value: value.startswith(("PROJCRS[", "GEOGCRS[", "BOUNDCRS[")),
    "proj:shape": lambda value: len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value),
    "proj:transform": lambda value: len(value) in (6, 9) and all(isinstance(number, float) for number in value),
    "proj:bbox": lambda value: len(value) == 4 and value[0] < value[2] and value[1] < value[3],
    "sar:polarizations": lambda value: (
        value and len(set(value)) == len(value) and set(value) <= {"VV", "VH", "HH", "HV"}
    ),
    "processing:software": lambda value: all(isinstance(version, str) for version in value.values()),
    "processing:lineage": lambda value: isinstance(value, str),
    "raster:sampling": lambda value: value in ("area", "point"),
    "raster:bits_per_sample": lambda value: isinstance(value, int),
    "raster:spatial_resolution": lambda value: value > 0,
    "raster:scale": lambda value: isinstance(value, int | float),
    "raster:offset": lambda value: isinstance(value, int | float),
}


def validate(item: dict[str, Any]) -> None:
    """The core by the schemas that pystac brings, the extensions' fields by hand and by pystac's readers."""
    pystac = pytest.importorskip("pystac", reason="needs pystac and jsonschema")
    from pystac.extensions.projection import ProjectionExtension
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    kind, version = pystac.STACObjectType.ITEM, item["stac_version"]
    assert len(JsonSchemaSTACValidator().validate(item, kind, version, [])) == 1
    read = pystac.Item.from_dict(item)
    assert read.to_dict()["id"] == item["id"]
    assert ProjectionExtension.ext(read).shape == item["properties"]["proj:shape"]
    used = {address.split("/")[-3]: address for address in item["stac_extensions"]}
    bands = [band for asset in item["assets"].values() for band in asset.get("bands", [])]
    names = {"projection": "proj"}
    for fields in (item["properties"], *item["assets"].values(), *bands):
        for field in [field for field in fields if ":" in field and not field.startswith("fewstep:")]:
            extension = field.partition(":")[0]
            assert extension in {names.get(name, name) for name in used} | {"file"}, field
            assert FIELDS[field](fields[field]), (field, fields[field])
    for address in used.values():
        assert address.startswith("https://stac-extensions.github.io/") and address.endswith("/schema.json")


def area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


# --- the item


def test_every_file_is_an_asset_and_the_item_is_valid(tmp_path: Path, generator: Generator) -> None:
    given = scene(tmp_path / "s1_20200113T054510.tif")
    item = item_of(generator, given, options=SceneOptions(samples=2), preview=tmp_path / "small.png")
    assert {name: asset["href"] for name, asset in item["assets"].items()} == {
        "visual": "o.tif", "uncertainty": "o.uncertainty.tif", "thumbnail": "small.png",
    }  # fmt: skip
    assert all((tmp_path / asset["href"]).is_file() for asset in item["assets"].values())
    for name in ("visual", "uncertainty"):
        with rasterio.open(tmp_path / item["assets"][name]["href"]) as raster:
            bands = item["assets"][name]["bands"]
            assert [band["name"] for band in bands] == list(raster.descriptions)
            assert {band["data_type"] for band in bands} == set(raster.dtypes)
            assert {band["nodata"] for band in bands} == set(raster.nodatavals)
            assert tuple(band["raster:scale"] for band in bands) == raster.scales
            if name == "visual":
                told = item["properties"]
                assert told["proj:shape"] == list(raster.shape) and told["proj:transform"] == list(raster.transform)
                assert told["proj:code"] == "EPSG:32632" and told["proj:bbox"] == list(raster.bounds)
    assert (
        item["properties"]["sar:polarizations"] == ["VV", "VH"]
        and "fewstep" in item["properties"]["processing:software"]
    )
    assert not any(key.startswith("sar:") and key != "sar:polarizations" for key in item["properties"])  # nobody said
    assert area(item["geometry"]["coordinates"][0]) > 0 and len(item["geometry"]["coordinates"][0]) == 5
    assert item["links"][0]["href"] == given.name


def test_an_item_of_a_part_is_of_the_part(tmp_path: Path, generator: Generator) -> None:
    whole = item_of(generator, scene(tmp_path / "s.tif"))
    part = item_of(generator, tmp_path / "s.tif", options=SceneOptions(window=(10, 20, 8, 9)))
    assert part["properties"]["proj:shape"] == [9, 8] and part["properties"]["fewstep:window"] == [10, 20, 8, 9]
    assert part["bbox"][0] > whole["bbox"][0] and part["bbox"][3] < whole["bbox"][3]


def test_an_item_elsewhere_leads_to_its_scene(tmp_path: Path, generator: Generator) -> None:
    (tmp_path / "out").mkdir()
    translate(generator, scene(tmp_path / "s.tif"), tmp_path / "out" / "o.tif", stac=True)
    assert json.loads((tmp_path / "out" / "o.json").read_text())["links"][0]["href"] == "../s.tif"


def test_a_crs_without_a_code_is_written_out(tmp_path: Path, generator: Generator) -> None:
    own = CRS.from_proj4("+proj=laea +lat_0=50 +lon_0=10 +ellps=GRS80 +units=m")
    item = item_of(generator, scene(tmp_path / "s.tif", crs=own, transform=from_origin(0, 0, 10, 10)))
    assert item["properties"]["proj:code"] is None and "Lambert" in item["properties"]["proj:wkt2"]
    assert item["bbox"][:2] == pytest.approx([10, 50], abs=0.01)


@pytest.mark.parametrize(
    ("crs", "message"), [(None, "no CRS"), ('LOCAL_CS["site grid",UNIT["metre",1]]', "longitude and latitude")]
)
def test_a_scene_without_a_place_is_refused_before_the_work(
    tmp_path: Path, generator: Generator, crs: str | None, message: str
) -> None:
    given = scene(tmp_path / "s.tif", crs=crs and CRS.from_wkt(crs))
    with pytest.raises(BadInput, match=f"stac: .*{message}"):
        translate(generator, given, tmp_path / "o.tif", stac=True, progress=lambda *_: pytest.fail("drawn"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.tif"]


# --- the place


@pytest.mark.parametrize(
    ("crs", "west", "pixel", "bbox"),
    [
        ("EPSG:4326", 179.998, 1e-4, [179.998, 47.996, -179.998, 48.0]),
        ("EPSG:4326", -180.002, 1e-4, [179.998, 47.996, -179.998, 48.0]),
        ("EPSG:4326", 190.0, 1e-4, [-170.0, 47.996, -169.996, 48.0]),
        ("EPSG:4326", -180.0, 9.0, [-180.0, -90.0, 180.0, 90.0]),
        ("EPSG:4326", 0.0, 9.0, [-180.0, -90.0, 180.0, 90.0]),
        ("EPSG:4326", 179.996, 1e-4, [179.996, 47.996, 180.0, 48.0]),
    ],
)
def test_longitudes_are_of_one_turn(
    tmp_path: Path, generator: Generator, crs: str, west: float, pixel: float, bbox: list[float]
) -> None:
    north = 90.0 if pixel > 1 else 48.0
    values = backscatter(20 if pixel > 1 else 40, 40)
    write(tmp_path / "s.tif", values, crs=crs, transform=from_origin(west, north, pixel, pixel))
    item = item_of(generator, tmp_path / "s.tif")
    assert item["bbox"] == pytest.approx(bbox, abs=1e-6)
    shape = item["geometry"]
    rings = [p[0] for p in shape["coordinates"]] if shape["type"] == "MultiPolygon" else shape["coordinates"]
    assert all(area(ring) > 0 and -180 <= x <= 180 and -90 <= y <= 90 for ring in rings for x, y in ring)
    assert sum(map(area, rings)) == pytest.approx(values.shape[1] * values.shape[2] * pixel**2, rel=1e-4)


def test_a_utm_scene_across_the_antimeridian_is_cut_there(tmp_path: Path, generator: Generator) -> None:
    given = scene(tmp_path / "s.tif", crs="EPSG:32660", transform=from_origin(829_000, 600_000, 200, 200))
    item = item_of(generator, given)
    assert item["geometry"]["type"] == "MultiPolygon" and item["bbox"][0] > 179 and item["bbox"][2] < -179
    east, west = (np.array(p[0]) for p in item["geometry"]["coordinates"])
    assert east[:, 0].max() == 180 and west[:, 0].min() == -180


def test_a_scene_around_the_pole_has_it_inside(tmp_path: Path, generator: Generator) -> None:
    for crs, sign in (("EPSG:3413", 1), ("EPSG:3031", -1)):
        given = scene(tmp_path / "s.tif", crs=crs, transform=from_origin(-200_000, 200_000, 10_000, 10_000))
        item = item_of(generator, given)
        west, south, east, north = item["bbox"]
        assert (west, east) == (-180, 180) and (north if sign > 0 else south) == 90 * sign
        assert 86 < sign * (south if sign > 0 else north) < 88


def test_a_ring_is_counterclockwise_whichever_way_it_came() -> None:
    ring = [(10.0, 50.0), (11.0, 50.0), (11.0, 51.0), (10.0, 51.0)]
    for given in (ring, ring[::-1]):
        geometry, bbox = footprint(given)
        assert area(geometry["coordinates"][0]) == pytest.approx(1) and bbox == [10, 50, 11, 51]


# --- the time


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("2020-01-13T05:45:10Z", "2020-01-13T05:45:10"), ("2020-01-13T05:45:10+02:00", "2020-01-13T03:45:10"),
        ("20200113T054510", "2020-01-13T05:45:10"), ("2020-01-13", "2020-01-13T00:00:00"),
        ("20200113", "2020-01-13T00:00:00"), ("soon", None), ("", None), ("1900-01-01", None), ("20201399", None),
        ("9999999999999", None), ("0001-01-01T00:00:00+05:00", None),
        ("2020:01:13 05:45:10", "2020-01-13T05:45:10"), ("2020/01/13 05:45:10", "2020-01-13T05:45:10"),
        ("13-JAN-2020 05:45:10.123456", "2020-01-13T05:45:10.123456"),
        ("20200113054510", "2020-01-13T05:45:10"), ("1578894310000", "2020-01-13T05:45:10"),
        ("2020-01-13 05:45:10.5 UTC", "2020-01-13T05:45:10.500000"),
        ("2020-01-12T23:45:10-1000", "2020-01-13T09:45:10"),
    ],
)  # fmt: skip
def test_times_are_read_as_utc(text: str, right: str | None) -> None:
    found = parse_time(text)
    assert found == (right and datetime.fromisoformat(right).replace(tzinfo=UTC))


def test_the_scenes_own_time_comes_before_that_of_its_file() -> None:
    name, written = "S1A_IW_GRDH_1SDV_20200113T054510_rtc.tif", {"TIFFTAG_DATETIME": "2024:05:05 01:02:03"}
    for tags, file, year, told in (
        ({"ACQUISITION_START_TIME": "2019-01-01", **written}, name, 2019, "ACQUISITION_START_TIME"),
        ({"datetime": "no time", **written}, name, 2020, "file's name"),
        ({"ACQUISITIONDATETIME": "2018-01-01T00:00:00Z"}, "s.tif", 2018, "ACQUISITIONDATETIME"),
        (
            {"system:time_start": "1578894310000", "PROCESSING_TIME": "2023-01-01", **written},
            "s.tif",
            2020,
            "time_start",
        ),
        ({"PROCESSING_TIME": "2023-01-01", "OBSERVATION_DATE": "2017-01-01"}, "s.tif", 2017, "OBSERVATION_DATE"),
        (written, "s.tif", 2024, "TIFFTAG_DATETIME"),
        (written, "https://host/a/s1a_20210113t054510.tif?20160101T000000", 2021, "file's name"),
    ):
        found, by = time_of(tags, file)
        assert found is not None and found.year == year and told in by


def test_a_time_that_nobody_tells_is_warned_about(tmp_path: Path, generator: Generator) -> None:
    facts = translate(generator, scene(tmp_path / "s.tif", tags={}), tmp_path / "o.tif", stac=True)
    told = json.loads((tmp_path / "o.json").read_text())["properties"]
    assert told["fewstep:datetime_from"] == "the time of this work" and any("no time" in w for w in facts.warnings)
    facts = translate(generator, scene(tmp_path / "s.tif"), tmp_path / "o.tif", stac=True)
    told = json.loads((tmp_path / "o.json").read_text())["properties"]
    assert told["datetime"] == "2020-01-13T05:45:10Z" and not any("no time" in w for w in facts.warnings)
    assert told["fewstep:datetime_from"] == "the tag datetime" and UTM
