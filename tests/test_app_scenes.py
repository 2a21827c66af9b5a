"""Scenes over the service: GeoTIFF in, GeoTIFF out, at once and as jobs; every way in which they can be wrong."""

import base64
import io
import json
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from service import (
    GENERATE,
    NETWORK,
    TRANSLATE,
    engine_held,
    error_of,
    file_of,
    grey,
    pictures,
    pixels_of,
    until,
    until_ready,
)
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.engine.scene_jobs import SceneJob
from app.engine.scenes import Cancelled, scene_name
from app.main import create_app
from app.media.geotiff import ENV, is_scene
from app.settings import Settings
from distillers.cli import app
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.models.radiometry import SENTINEL1_DB
from distillers.sar.options import WARNING, SceneOptions
from distillers.sar.raster import Source
from distillers.sar.translate import translate
from distillers.teacher import Teacher
from distillers.weights.manifest import Info

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

JOBS, TIFF = "/v1/jobs/translations", {"Content-Type": "image/tiff"}
CRS = "EPSG:32631"
PLACE = rasterio.Affine(10.000000000000123, 0.25, 500000.1, 0.125, -10.000000000000345, 4649776.7)  # no round number
PLAIN = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8} | {
    f"{way}_block_types": (f"{way.title()}Block2D",) * 2 for way in ("down", "up")
}


def publish(root: Path, name: str, task: str, sar: dict[str, Any] | None = None) -> None:
    torch.manual_seed(0)
    patch = 4 if sar else 1
    info = Info(
        name=name, task=task, data="shapes", size=(16, 16), sar=sar, patch=patch, method="consistency", role="student",
        sampler="consistency", teacher="not-here", step_times={1: [999.0], 2: [999.0, 499.0]},
    )  # fmt: skip
    codec = PixelUnshuffle(patch)
    denoiser = Teacher.random(info, PLAIN if sar else NETWORK, {"name": "vp"}, "eps", codec).denoiser
    Generator(denoiser, codec, info).save_pretrained(root / name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    publish(root, "plain", "image")
    publish(root, "sar", "sar-to-optical", {"channels": 1, "range": [-1, 1]})
    publish(root, "sar-db", "sar-to-optical", SENTINEL1_DB.to_dict())
    return root


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def serve(weights: Path, scratch: Path) -> TestClient:
    limits: dict[str, Any] = {"max_body_bytes": 300_000, "max_scene_bytes": 3_000_000, "max_scene_pixels": 300 * 300}
    app = create_app(Settings(weights=weights, device="cpu", scratch=scratch, max_jobs=2, max_pixels=10_000, **limits))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(weights: Path, scratch: Path) -> Iterator[TestClient]:
    with serve(weights, scratch) as client:
        until_ready(lambda: client.get("/readyz"))
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(client: TestClient, scratch: Path) -> Iterator[None]:
    """Whatever a test did, its jobs are forgotten and no file of it is left; and the engine lives."""
    yield
    jobs = cast(Any, client.app).state.jobs
    for job in list(jobs._jobs.values()):
        assert client.portal is not None
        client.portal.call(jobs.forget, job)
    until(lambda: all(path.name == "demonstration.tif" for path in scratch.glob("*/*")))
    assert client.get("/livez").status_code == 200


def backscatter(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """(2, height, width) decibels of VV and VH, as land has them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(mean, 3, (height, width)) for mean in (-11, -18)]).astype(np.float32)


def raster(values: NDArray, names: tuple[str, ...] = (), **profile: Any) -> bytes:
    """(bands, H, W) as GeoTIFF bytes; profile overrides all, georeference included."""
    bands, height, width = values.shape
    profile = {"crs": CRS, "transform": PLACE, "dtype": values.dtype} | profile
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=bands, height=height, width=width, **profile) as target:
            target.write(values)
            if names:
                target.descriptions = names
        return bytes(memory.getbuffer())


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    with rasterio.MemoryFile(data) as memory, memory.open() as raster:
        yield raster


def ask(client: TestClient, data: bytes, name: str = "scene.tif", **fields: Any) -> Any:
    form = {"model": "sar", **{field: str(value) for field, value in fields.items()}}
    return client.post(TRANSLATE, files={"image": (name, data)}, data=form)


SCENE = raster(backscatter(50, 70), ("VV", "VH"))
BARE = {"crs": None, "transform": None}


# --- at once


@pytest.mark.parametrize("model", ["sar", "sar-db"])
def test_a_geotiff_comes_back_on_its_own_grid_as_the_library_draws_it(
    client: TestClient, weights: Path, tmp_path: Path, model: str
) -> None:
    values = backscatter(50, 70)
    values[:, 10:20, 30:45] = np.nan
    scene = raster(values, ("VV", "VH"))
    query = {"model": model, "seed": "5", "steps": "2"}
    answer = client.post(TRANSLATE, params=query, content=scene, headers=TIFF | {"Accept": "image/tiff"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/tiff", answer.text
    (tmp_path / "scene.tif").write_bytes(scene)
    options = SceneOptions(seed=5, steps=2)
    generator = Generator.from_pretrained(weights / model)
    translate(generator, tmp_path / "scene.tif", tmp_path / "out.tif", options)
    with opened(answer.content) as ours, rasterio.open(tmp_path / "out.tif") as theirs:
        assert (ours.crs, ours.transform, ours.shape) == (theirs.crs, PLACE, (50, 70))
        assert abs(ours.read().astype(int) - theirs.read()).max() <= 1
        assert ((ours.read() == 0) == np.isnan(values[:1])).all()
        assert ours.tags()["FEWSTEP_MODEL"] == model
    told = {
        name: answer.headers[f"x-fewstep-{name}"] for name in ("model", "seed", "steps", "units", "samples", "tiles")
    }
    assert told == {"model": model, "seed": "5", "steps": "2", "units": "db", "samples": "1", "tiles": "1"}
    assert answer.headers["x-fewstep-bands"] == ("VH=2" if model == "sar" else "VV=1,VH=2")
    assert "negative" in answer.headers["x-fewstep-units-why"] and WARNING in answer.headers["x-fewstep-warnings"]


def test_the_answer_as_json_has_facts_pictures_and_statistics(client: TestClient) -> None:
    answer = ask(client, SCENE, output_format="geotiff", samples=3, seed=7).json()
    scene, size = answer["scene"], (70, 50)
    assert (answer["seed"], answer["size"], answer["output_format"], answer["nfe"]) == (7, "70x50", "geotiff", 1)
    with opened(base64.b64decode(scene["uncertainty_geotiff"])) as spread:
        assert spread.count == 12 and spread.transform == PLACE
        assert spread.read(4).max() > 0  # a standard deviation
    assert scene["facts"]["samples"] == 3 and scene["facts"]["mean_deviation"] > 0
    sar, optical = (Image.open(io.BytesIO(base64.b64decode(scene[f"{kind}_png"]))) for kind in ("sar", "optical"))
    assert (sar.mode, sar.size, optical.mode, optical.size) == ("L", size, "RGB", size)
    vh = backscatter(50, 70)[1]
    shown = np.asarray(sar).astype(float)
    assert np.corrcoef(shown.ravel(), vh.ravel())[0, 1] > 0.95 and (shown == 255).mean() < 0.03
    with opened(base64.b64decode(answer["data"][0]["b64_json"])) as product:
        assert (np.moveaxis(product.read(), 0, -1) == np.asarray(optical)).all()


def test_the_same_seed_gives_the_same_bytes_in_every_form(client: TestClient) -> None:
    query = {"model": "sar", "seed": "3"}
    raw = [client.post(TRANSLATE, params=query, content=SCENE, headers=TIFF | {"Accept": "image/tiff"}) for _ in "12"]
    as_json = ask(client, SCENE, output_format="geotiff", seed=3)
    assert raw[0].content == raw[1].content == base64.b64decode(as_json.json()["data"][0]["b64_json"])
    assert raw[0].content != base64.b64decode(ask(client, SCENE, output_format="geotiff").json()["data"][0]["b64_json"])
    png = client.post(TRANSLATE, params=query, content=SCENE, headers=TIFF | {"Accept": "image/png"})
    with opened(raw[0].content) as product:
        assert (np.moveaxis(product.read(), 0, -1) == pixels_of(png.content)).all()
    assert (pictures(ask(client, SCENE, seed=3))[0] == pixels_of(png.content)).all()  # png is the default


def test_one_bands_polarisation_is_told_by_a_field_or_the_files_name(client: TestClient) -> None:
    one = raster(backscatter(16, 16)[:1])
    for fields, bands in [({}, {"VV": 1}), ({"name": "S1_vh.tif"}, {"VH": 1}), ({"bands": "VH=1"}, {"VH": 1})]:
        facts = ask(client, one, **fields).json()["scene"]["facts"]
        assert facts["bands"] == bands and ("assumed" in facts["bands_how"]) == (not fields)
    named = TIFF | {"Content-Disposition": 'attachment; filename="S1_VH.tif"'}
    raw = client.post(TRANSLATE, params={"model": "sar"}, content=one, headers=named)
    assert raw.json()["scene"]["facts"]["bands"] == {"VH": 1}
    assert scene_name("../../etc/passwd") == scene_name("VVH") == "scene.tif"
    assert scene_name("/vsicurl/http://x/S1-VH.tif") == "scene_VH.tif"


def test_a_number_the_caller_calls_nodata_is_a_hole(client: TestClient) -> None:
    values = backscatter(20, 20)
    values[:, :5] = -99
    error_of(ask(client, raster(values)), 400)  # decibels down to -99: no units fit
    answer = ask(client, raster(values), nodata=-99, output_format="geotiff").json()
    with opened(base64.b64decode(answer["data"][0]["b64_json"])) as product:
        assert ((product.read(1) == 0) == (values[0] == -99)).all()
    assert answer["scene"]["facts"]["valid_share"] == 0.75
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["scene"]["sar_png"]))))[:5] == 0).all()


def test_nodata_is_the_stored_number_in_the_picture_of_the_sar_too(client: TestClient) -> None:
    stored = np.rint(backscatter(20, 20) * 100).astype(np.int16)
    stored[:, :5] = -9999
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=2, height=20, width=20, dtype="int16", crs=CRS, transform=PLACE) as file:
            file.scales, file.descriptions = (0.01, 0.01), ("VV", "VH")
            file.write(stored)
        data = bytes(memory.getbuffer())
    scene = ask(client, data, nodata=-9999).json()["scene"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(scene["sar_png"]))))
    assert scene["facts"]["valid_share"] == 0.75 and ((shown == 0) == (stored[0] == -9999)).all()


def test_transparency_and_borders_of_zeros_are_holes_in_every_answer(client: TestClient) -> None:
    numbers = np.rint(1000 * 10 ** (backscatter(40, 40) / 20)).astype(np.uint16)
    numbers[:, :12] = 0
    alpha = np.full((1, 40, 40), 65535, np.uint16)
    alpha[:, :, 30:] = 0
    kinds = (rasterio.enums.ColorInterp.gray, rasterio.enums.ColorInterp.undefined, rasterio.enums.ColorInterp.alpha)
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=3, height=40, width=40, dtype="uint16", crs=CRS, transform=PLACE
        ) as file:
            file.colorinterp = kinds
            file.write(np.concatenate([numbers, alpha]))
        data = bytes(memory.getbuffer())
    scene = ask(client, data).json()["scene"]
    hole = (numbers[0] == 0) | (alpha[0] == 0)
    for picture in ("sar_png", "optical_png"):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(scene[picture])))).reshape(40, 40, -1)
        assert ((shown == 0).all(2) == hole).all()
    told = " ".join(scene["facts"]["warnings"])
    assert "taken for no data, as nodata 0 says" in told and "--" not in told
    assert scene["facts"]["bands"] == {"VH": 2}


def test_bands_that_do_not_tell_are_refused_with_the_field_that_decides(client: TestClient) -> None:
    both = np.concatenate([backscatter(16, 16)] * 2)
    dates = raster(both, ("VV_ascending", "VH_ascending", "VV_descending", "VH_descending"))
    error = error_of(ask(client, dates), 400)
    assert error["param"] == "bands" and "band 3 (VV_descending)" in error["message"]
    assert "bands VV=1,VH=2" in error["message"] and "--" not in error["message"]
    assert ask(client, dates, bands="VV=3,VH=4").json()["scene"]["facts"]["bands"] == {"VH": 4}
    for data, name in (
        (raster(backscatter(16, 16), ("HH", "HV")), "scene.tif"),
        (raster(backscatter(16, 16)[:1]), "scene_hh.tif"),
        (raster(backscatter(16, 16)), "S1A_EW_GRDM_1SDH_2020.tif"),
        (raster(backscatter(16, 16)), "vh_vv.tif"),
    ):
        assert error_of(ask(client, data, name), 400)["param"] == "bands"
    named = ask(client, raster(backscatter(16, 16)), "vv_vh.tif").json()["scene"]["facts"]
    assert named["bands"] == {"VH": 2} and "as the file's name lists them" in named["bands_how"]


def test_what_lies_beside_an_upload_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    path.write_bytes(raster(backscatter(16, 16), **BARE))
    said = '<PAMDataset><PAMRasterBand band="1"><Description>VH</Description></PAMRasterBand></PAMDataset>'
    (tmp_path / "scene.tif.aux.xml").write_text(said)
    assert Source(path, SENTINEL1_DB).bands == {"VH": 1}
    with rasterio.Env(**ENV):
        assert Source(path, SENTINEL1_DB).bands == {"VV": 1, "VH": 2}


GREY = grey(20, 24)
KINDS = {
    "8 bit": (raster(GREY[None], **BARE), False),
    "16 bit": (raster(GREY[None].astype(np.uint16), **BARE), False),
    "float32": (raster(GREY[None].astype(np.float32), **BARE), False),
    "three of 8 bit": (raster(np.stack([GREY] * 3), **BARE), False),
    "Pillow's": (file_of(GREY, "TIFF"), False),
    "a PNG": (file_of(GREY), False),
    "nothing": (b"", False),
    "georeferenced": (raster(GREY[None]), True),
    "two bands": (raster(np.stack([GREY] * 2), **BARE), True),
    "two of float32": (raster(backscatter(9, 9), **BARE), True),
    "float64": (raster(GREY[None].astype(np.float64), **BARE), True),
    "int16": (raster(GREY[None].astype(np.int16), **BARE), True),
    "big": (raster(GREY[None], bigtiff="yes", **BARE), True),
    "big-endian": (raster(GREY[None], endianness="big"), True),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_scene_is_told_from_a_picture_by_its_header(client: TestClient, name: str) -> None:
    data, scene = KINDS[name]
    assert is_scene(data) == scene
    if data and name != "float32":  # which would have to lie in 0..1
        answer = ask(client, data, seed=1)
        assert answer.status_code == 200 and (answer.json()["scene"] is not None) == scene, answer.text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 400), st.sampled_from([kind for kind, _ in KINDS.values()]))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow wonders aloud
def test_damage_in_the_header_is_no_error_here(noise: bytes, at: int, data: bytes) -> None:
    assert is_scene(data[:at] + noise + data[at + len(noise) :]) in (True, False)


def test_a_plain_tiff_is_a_scene_where_the_request_says_so(client: TestClient) -> None:
    data = KINDS["16 bit"][0]
    for fields in ({"units": "dn"}, {"bands": "VV"}, {"nodata": 0}, {"samples": 1}, {"output_format": "geotiff"}):
        facts = ask(client, data, **fields).json()["scene"]["facts"]
        assert facts["units"] == "dn" and "no georeference" in " ".join(facts["warnings"])


def test_a_plain_picture_goes_through_a_model_of_decibels(client: TestClient, weights: Path) -> None:
    answer = client.post(
        TRANSLATE, files={"image": file_of(GREY)}, data={"model": "sar-db", "seed": "5", "bands": "VV"}
    )
    vv = 20 * np.log10(np.maximum(GREY / 255, 1e-4)) - 5.3  # white where SENTINEL1_DB has it
    sar = np.zeros((1, 2, *GREY.shape), np.float32)
    sar[0, 0] = (np.clip(vv, -25, 0) + 25) / 12.5 - 1
    drawn = Generator.from_pretrained(weights / "sar-db").translate(torch.from_numpy(sar[:, :]), seed=5)[0]
    assert abs(pictures(answer)[0] - ((drawn + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("band", ["VV", "VH"])
def test_command_and_service_take_a_picture_for_the_same_polarisation(
    client: TestClient, weights: Path, tmp_path: Path, band: str
) -> None:
    """By the file's name, by a form's field, by the header of a raw body, by an edit: the command's picture."""
    data, fields = file_of(GREY), {"model": "sar-db", "seed": "5"}
    file, out = tmp_path / f"0-{band}.png", tmp_path / "optical.png"
    file.write_bytes(data)
    done = CliRunner().invoke(
        app, ["translate", str(file), str(out), "--model", str(weights / "sar-db"), "--seed", "5", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    named, nameless = (file.name, data), ("tile.png", data)
    disposition = {"Content-Type": "image/png", "Content-Disposition": f'attachment; filename="{file.name}"'}
    pixels = {"Content-Type": "application/octet-stream"}
    answers = [
        client.post(TRANSLATE, files={"image": named}, data=fields),
        client.post(TRANSLATE, files={"image": nameless}, data={**fields, "bands": band}),
        client.post(TRANSLATE, files={"image": ("0-VH-VV.png", data)}, data={**fields, "bands": band}),
        client.post(TRANSLATE, content=data, params=fields, headers=disposition),
        client.post(
            TRANSLATE,
            content=GREY.tobytes(),
            params={**fields, "width": GREY.shape[1], "bands": band},
            headers=pixels,
        ),
        client.post("/v1/images/edits", files={"image": named}, data=fields),
        client.post("/v1/images/edits", files={"image": nameless}, data={**fields, "bands": band}),
    ]
    expected = np.asarray(Image.open(out)).astype(int)
    for answer in answers:
        assert abs(pictures(answer)[0] - expected).max() <= 1
    with client.websocket_connect("/v1/realtime") as socket:
        for seq, said in enumerate(({"bands": band}, {}), 1):
            socket.send_json({"seq": seq, "image": True, "model": "sar-db", "seed": 5, "output_format": "png", **said})
            socket.send_bytes(data)
            if said:
                message = socket.receive_bytes()
                drawn = pixels_of(message[4 + int.from_bytes(message[:4]) :])
                assert abs(drawn - expected).max() <= 1
            else:
                assert json.loads(socket.receive_text())["error"]["param"] == "bands"
    other = {**fields, "bands": "VH" if band == "VV" else "VV"}  # a field wins over the name
    assert abs(pictures(client.post(TRANSLATE, files={"image": named}, data=other))[0] - expected).max() > 1


@pytest.mark.parametrize("name", ["tile.png", "VV-and-VH.png", ""])
def test_a_picture_without_a_polarisation_is_refused_by_a_model_of_two_bands(client: TestClient, name: str) -> None:
    for path in (TRANSLATE, "/v1/images/edits"):
        answer = client.post(path, files={"image": (name or "x", file_of(GREY))}, data={"model": "sar-db"})
        error = error_of(answer, 400)
        assert error["param"] == "bands" and "VV or VH" in error["message"]
    refused = client.post("/v1/images/edits", files={"image": file_of(GREY)}, data={"model": "plain", "bands": "VV"})
    assert error_of(refused, 400)["param"] == "bands"
    assert client.post(TRANSLATE, files={"image": file_of(GREY)}, data={"model": "sar"}).status_code == 200  # one band


# --- what can be wrong


def grd() -> bytes:
    points = [rasterio.control.GroundControlPoint(r, c, 5 + c / 1e3, 45 - r / 1e3) for r in (0, 20) for c in (0, 20)]
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=1, height=20, width=20, dtype="uint16", gcps=points, crs="EPSG:4326"
        ) as f:
            f.write(np.full((1, 20, 20), 300, np.uint16))
        return bytes(memory.getbuffer())


def promised(width: int, height: int) -> bytes:
    """A small file whose header promises a large raster."""
    data = raster(backscatter(16, 16), tiled=True, blockxsize=16, blockysize=16)
    at, entries = struct.unpack("<I", data[4:8])[0], 0
    edited = bytearray(data)
    (entries,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        if tag in (256, 257):
            struct.pack_into("<HHII", edited, entry, tag, 4, 1, width if tag == 256 else height)
    return bytes(edited)


VRT = b"""<VRTDataset rasterXSize="20" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename>/vsicurl/http://127.0.0.1:1/a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"""
AMBIGUOUS = np.full((1, 20, 20), 0.2, np.float32) + np.random.default_rng(0).random((1, 20, 20), np.float32) / 100
WRONG: dict[str, tuple[bytes, dict[str, Any], int, str, str]] = {
    "broken off": (raster(backscatter(64, 64))[:-9000], {}, 400, "image", "breaks off"),
    "broken off in its header": (SCENE[:100], {"units": "db"}, 400, "image", "do not open"),
    "a promise": (promised(100_000, 100_000), {}, 413, "image", "POST /v1/jobs/translations"),
    "a promise beyond all": (promised(2**31 - 1, 2**31 - 1), {}, 400, "image", "do not open"),
    "a flat promise": (promised(300 * 300 + 1, 1), {}, 413, "image", "90001x1"),
    "too small": (raster(backscatter(7, 90)), {}, 400, "image", "90x7 pixels"),
    "complex": (raster(backscatter(20, 20).astype(np.complex64)), {}, 400, "image", "complex"),
    "complex integers": (
        raster(backscatter(20, 20).astype(np.complex64), dtype="complex_int16"),
        {},
        400,
        "image",
        "complex",
    ),
    "nothing but holes": (raster(np.full((1, 20, 20), np.nan, np.float32)), {}, 400, "image", "no pixel with data"),
    "nothing but nodata": (raster(np.zeros((1, 20, 20), np.float32), nodata=0), {}, 400, "image", "no pixel with data"),
    "range geometry": (grd(), {}, 400, "image", "terrain-corrected"),
    "a VRT": (VRT, {}, 400, "image", "no such image"),
    "a VRT as a scene": (VRT, {"units": "dn"}, 400, "units", "no TIFF"),
    "a PNG with units": (file_of(GREY), {"units": "db"}, 400, "units", "no TIFF"),
    "a GeoTIFF of a PNG": (file_of(GREY), {"output_format": "geotiff"}, 400, "output_format", "no TIFF"),
    "units that do not tell": (raster(AMBIGUOUS), {}, 400, "units", "linear"),
    "units that cannot be": (raster(backscatter(20, 20)), {"units": "linear"}, 400, "units", "above 0"),
    "unknown units": (SCENE, {"units": "volts"}, 400, "units", "'dn'"),
    "unknown bands": (SCENE, {"bands": "HH"}, 400, "bands", "VV"),
    "four bands": (raster(np.concatenate([backscatter(20, 20)] * 2)), {}, 400, "bands", "VV=NUMBER"),
    "no number": (SCENE, {"nodata": "none"}, 400, "nodata", "number"),
    "too many samples": (SCENE, {"samples": 65}, 400, "samples", "64"),
    "pictures of a scene": (SCENE, {"n": 2}, 400, "n", "samples"),
    "the last seeds": (SCENE, {"seed": 2**63 - 1}, 400, "seed", "0 to"),
    "steps": (SCENE, {"steps": 3}, 400, "steps", "1, 2"),
    "a model of another kind": (SCENE, {"model": "plain"}, 400, "model", GENERATE),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_no_path_is_told(client: TestClient, name: str, scratch: Path) -> None:
    data, fields, status, param, message = WRONG[name]
    error = error_of(ask(client, data, **fields), status)
    assert error["param"] == param and message in error["message"] and error["message"].startswith(f"{param}: got ")
    assert str(scratch) not in error["message"] and len(error["message"]) < 600


def test_blocks_larger_than_memory_are_refused_by_the_header(client: TestClient) -> None:
    data = bytearray(raster(backscatter(16, 16), tiled=True, blockxsize=16, blockysize=16))
    (at,) = struct.unpack_from("<I", data, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] in (322, 323):  # the tiles' sides
            struct.pack_into("<HI", data, entry + 2, 4, 1)
            struct.pack_into("<I", data, entry + 8, 16_000)
    assert "blocks of" in error_of(ask(client, bytes(data)), 400)["message"]


def test_without_rasterio_pictures_are_translated_and_scenes_are_501(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert ask(client, file_of(GREY)).status_code == 200
    asked = [ask(client, SCENE), client.post(JOBS, content=SCENE, headers=TIFF), client.get("/v1/demonstration.tif")]
    for answer in asked:
        assert "pip install 'fewstep[raster]'" in error_of(answer, 501)["message"]


def test_more_scenes_at_once_than_the_server_takes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = cast(Any, client.app).state.scenes
    monkeypatch.setattr(scenes.settings, "max_scenes", 1)
    answers: list[Any] = []
    with engine_held(client):
        first = threading.Thread(target=lambda: answers.append(ask(client, SCENE)))
        first.start()
        # the scene itself: what waits for the engine may be the measuring of a model that was just opened
        until(lambda: any(not future.done() for future in scenes._at_work))
        refused = ask(client, SCENE)
        assert error_of(refused, 503)["code"] == "server_overloaded" and refused.headers["retry-after"]
    first.join(60)
    assert answers[0].status_code == 200


def test_a_scene_whose_caller_leaves_ends_at_its_next_tile(client: TestClient) -> None:
    state, portal = cast(Any, client.app).state, client.portal
    assert portal is not None
    with engine_held(client):
        order = (large(299), "", state.engine.models["sar"], SceneOptions(units="dn"), "png", 90)
        asking = portal.start_task_soon(state.scenes.at_once, *order)
        # at work, not merely on its way: a scene that has not begun is taken back by its future alone
        until(lambda: state.scenes._at_work and state.scenes._at_work[-1].running())
        asking.cancel()
    assert isinstance(state.scenes._at_work[-1].exception(60), Cancelled)


# --- jobs


def start(client: TestClient, data: bytes = SCENE, status: int = 202, **query: Any) -> Any:
    answer = client.post(JOBS, params={"model": "sar"} | query, content=data, headers=TIFF)
    assert answer.status_code == status, answer.text
    return answer


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    def look() -> Any:
        found = client.get(f"/v1/jobs/{job['id']}").json()
        return found if found["status"] not in ("queued", "running") else None

    return cast(dict[str, Any], until(look))


def large(pixels: int = 600) -> bytes:
    """More tiles than can be drawn while something else is asked; over the limits of what is translated at once."""
    rng = np.random.default_rng(0)
    return raster(rng.integers(40, 200, (1, pixels, pixels), np.uint8))


def test_a_job_gives_the_bytes_that_are_given_at_once(client: TestClient) -> None:
    answer = start(client, seed=3, samples=2)
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" and len(job["id"]) == 32
    done = ended(client, job)
    assert (done["status"], done["progress"], done["error"]) == ("done", 1, None) and done["megapixels_per_second"] > 0
    assert done["facts"]["units"] == "db" and done["facts"]["warnings"][0] == WARNING
    at_once = ask(client, SCENE, seed=3, samples=2, output_format="geotiff").json()
    files = {name: client.get(path) for name, path in done["files"].items()}
    assert files["optical.tif"].content == base64.b64decode(at_once["data"][0]["b64_json"])
    assert files["uncertainty.tif"].content == base64.b64decode(at_once["scene"]["uncertainty_geotiff"])
    assert files["preview.png"].content == base64.b64decode(at_once["scene"]["optical_png"])
    assert files["sar.png"].content == base64.b64decode(at_once["scene"]["sar_png"])
    assert files["optical.tif"].headers["content-type"] == "image/tiff"
    part = client.get(done["files"]["optical.tif"], headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, files["optical.tif"].content[:4])
    left = {path.name for path in (scratch_of(client) / f"job-{job['id']}").iterdir()}
    assert left == {"optical.tif", "optical.uncertainty.tif", "preview.png", "sar.png"}  # the scene itself is gone
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    assert error_of(client.get(f"/v1/jobs/{job['id']}"), 404)["code"] == "job_not_found"
    assert error_of(client.get(done["files"]["optical.tif"]), 404)["code"] == "job_not_found"


def test_a_form_does_the_same_and_its_file_may_come_before_the_fields(client: TestClient) -> None:
    one = raster(backscatter(16, 16)[:1])
    boundary = b"--x\r\nContent-Disposition: form-data; name="
    body = boundary + b'"image"; filename="S1_VH.tif"\r\n\r\n' + one + b"\r\n"
    body += boundary + b'"model"\r\n\r\nsar-db\r\n' + boundary + b'"seed"\r\n\r\n9\r\n--x--\r\n'
    answer = client.post(JOBS, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    facts = ended(client, answer.json())["facts"]
    assert (facts["model"], facts["seed"], facts["bands"]) == ("sar-db", 9, {"VH": 1})
    assert "uncertainty.tif" not in client.get(f"/v1/jobs/{answer.json()['id']}").json()["files"]


def test_other_requests_are_answered_while_a_scene_is_at_work(client: TestClient) -> None:
    data = large(1200)
    assert len(data) > 300_000  # a scene has its own limit
    job = start(client, data, units="dn").json()
    path, record = f"/v1/jobs/{job['id']}", cast(Any, client.app).state.jobs.find(job["id"])
    running = until(lambda: (found := client.get(path).json())["progress"] > 0 and found)
    assert running["status"] == "running" and running["progress"] < 1 and running["megapixels_per_second"] > 0
    assert error_of(client.get(f"{path}/optical.tif"), 409)["code"] == "file_not_ready"
    assert client.post(GENERATE, json={"model": "plain"}).status_code == 200
    assert ask(client, SCENE).status_code == 200
    assert client.get(path).json()["status"] == "running"
    assert client.delete(path).json()["status"] == "cancelled"
    left = client.get(path).json()
    assert (left["status"], left["megapixels_per_second"], left["files"], left["error"]) == (
        "cancelled",
        None,
        {},
        None,
    )
    until(lambda: not record.folder.exists())
    assert record.facts is None and record.done < record.pixels  # it was not drawn to its end


def scratch_of(client: TestClient) -> Path:
    return cast(Path, cast(Any, client.app).state.scenes.scratch)


def test_a_running_job_tells_when_there_is_room_for_another(tmp_path: Path) -> None:
    job = SceneJob("a", tmp_path)
    assert job.seconds_left == 60  # nobody knows
    job.started, job.pixels = time.perf_counter() - 10, 100
    assert job.seconds_left == 60
    for done, seconds in [(25, 30), (50, 10), (100, 0)]:
        job.done = done
        assert job.seconds_left == pytest.approx(seconds, abs=1)


def test_one_job_at_a_time_and_a_full_queue_is_503(client: TestClient) -> None:
    with engine_held(client):
        first, second = start(client).json(), start(client).json()
        until(lambda: client.get(f"/v1/jobs/{first['id']}").json()["status"] == "running")
        refused = start(client, status=503)
        assert error_of(refused, 503)["code"] == "job_queue_full" and int(refused.headers["retry-after"]) > 0
        assert client.get(f"/v1/jobs/{second['id']}").json()["status"] == "queued"
        assert client.delete(f"/v1/jobs/{second['id']}").json()["status"] == "cancelled"
        assert not (scratch_of(client) / f"job-{second['id']}").exists()
        third = start(client).json()  # the cancelled one made room
        assert client.get(f"/v1/jobs/{second['id']}").status_code == 404
    assert ended(client, first)["status"] == ended(client, third)["status"] == "done"
    start(client)  # the oldest that has ended makes room
    assert client.get(f"/v1/jobs/{first['id']}").status_code == 404
    assert client.get(f"/v1/jobs/{third['id']}").json()["status"] == "done"


def test_an_ended_job_expires_with_its_files(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast(Any, client.app).state.jobs.settings, "job_ttl", 3)
    job = start(client).json()
    done = ended(client, job)
    assert done["status"] == "done" and job["created"] <= done["expires"] <= time.time() + 3
    until(lambda: client.get(f"/v1/jobs/{job['id']}").status_code == 404)
    assert not (scratch_of(client) / f"job-{job['id']}").exists()


def test_a_job_that_fails_says_why_and_the_next_one_is_done(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = ended(client, start(client, raster(np.full((1, 20, 20), np.nan, np.float32))).json())
    assert failed["status"] == "failed" and failed["error"]["param"] == "image" and failed["files"] == {}
    assert "no pixel with data" in failed["error"]["message"]
    assert error_of(client.get(f"/v1/jobs/{failed['id']}/preview.png"), 409)["message"].endswith("the job is failed")
    with monkeypatch.context() as broken:
        broken.setattr("app.engine.scenes.grey", lambda *_: 1 // 0)
        failed = ended(client, start(client).json())
    assert failed["error"]["code"] == "internal_error" and "division" not in str(failed)
    assert ended(client, start(client).json())["status"] == "done"


def test_what_is_wrong_with_a_job_is_said_at_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of(start(client, b"GIF89a", 400), 400)["param"] == "image"
    assert error_of(start(client, VRT, 400), 400)["param"] == "image"
    assert error_of(start(client, SCENE[:100], 400), 400)["param"] == "image"
    for query, param in [
        ({"units": "x"}, "units"),
        ({"n": 2}, "n"),
        ({"model": "plain"}, "model"),
        ({"steps": 9}, "steps"),
    ]:
        assert error_of(start(client, status=400, **query), 400)["param"] == param
    assert error_of(start(client, status=404, model="absent"), 404)["code"] == "model_not_found"
    error_of(client.post(JOBS, content=SCENE, headers={"Content-Type": "image/png"}), 415)
    assert error_of(client.post(JOBS, files={"picture": b"x"}), 400)["param"] == "image"
    assert error_of(client.get("/v1/jobs/absent"), 404)["param"] == "id"
    assert error_of(client.delete("/v1/jobs/absent"), 404)["param"] == "id"
    job = start(client).json()
    assert error_of(client.get(f"/v1/jobs/{job['id']}/..%2fscene.tif"), 404)
    assert error_of(client.get(f"/v1/jobs/{job['id']}/scene.tif"), 400)["param"] == "name"
    too_large = (b"x" * 500_000 for _ in range(7))
    for content in (b"x" * 3_000_001, too_large):
        assert "3000000" in error_of(client.post(f"{JOBS}?model=sar", content=content, headers=TIFF), 413)["message"]
    assert "jobs" in error_of(client.post(TRANSLATE, content=b"x" * 300_001, headers=TIFF), 413)["message"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.routes.jobs._receive", full)
    error_of(start(client, status=507), 507)


def test_a_server_that_is_closed_ends_its_job_and_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    with serve(weights, tmp_path) as client:
        until_ready(lambda: client.get("/readyz"))
        job = start(client, large(1200), units="dn").json()
        until(lambda: client.get(f"/v1/jobs/{job['id']}").json()["progress"] > 0)
        assert len(list(tmp_path.iterdir())) == 1 and (next(tmp_path.iterdir()).stat().st_mode & 0o777) == 0o700
        closing = time.perf_counter()
    assert time.perf_counter() - closing < 30 and os.listdir(tmp_path) == []


# --- the page's own


def test_the_demonstration_is_made_once_and_can_be_translated(client: TestClient) -> None:
    path, made = scratch_of(client) / "demonstration.tif", []
    for _ in range(2):
        answer = client.get("/v1/demonstration.tif")
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/tiff"
        made.append(path.stat().st_ino)
    assert made[0] == made[1]
    done = ended(client, start(client, answer.content, model="sar-db").json())
    with opened(answer.content) as scene, opened(client.get(done["files"]["optical.tif"]).content) as optical:
        assert (optical.crs, optical.transform, optical.shape) == (scene.crs, scene.transform, scene.shape)
    assert done["facts"]["bands"] == {"VV": 1, "VH": 2} and done["facts"]["units"] == "db"


def test_the_pages_modules_are_served_and_import_only_each_other(client: TestClient) -> None:
    for name in ("app.js", "scenes.js", "page.js"):
        script = client.get(f"/static/{name}")
        assert script.status_code == 200 and "://" not in script.text
        for imported in re.findall(r'from "(.+)"', script.text):
            assert client.get(f"/static/{imported.removeprefix('./')}").status_code == 200
    page, scripts = client.get("/").text, "".join(client.get(f"/static/{n}.js").text for n in ("app", "scenes", "page"))
    for id in re.findall(r'at\("([a-z-]+)"\)', scripts):
        assert f'id="{id}"' in page


def test_the_description_covers_scenes_and_jobs(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths[JOBS]) == {"post"} and set(paths["/v1/jobs/{id}"]) == {"get", "delete"}
    assert {"202", "400", "413", "415", "501", "503", "507"} <= set(paths[JOBS]["post"]["responses"])
    assert {"200", "404", "409"} <= set(paths["/v1/jobs/{id}/{name}"]["get"]["responses"])
    assert "/v1/demonstration.tif" in paths
    form = paths[TRANSLATE]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {"image", "units", "bands", "nodata", "samples", "seed", "n"} <= set(form)
    assert "geotiff" in form["output_format"]["enum"] and "image/tiff" in str(
        paths[TRANSLATE]["post"]["responses"]["200"]
    )
    assert {"image", "model", "steps", "units"} <= {"image", *(p["name"] for p in paths[JOBS]["post"]["parameters"])}
