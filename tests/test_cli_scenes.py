"""The commands about scenes, as a user types them: what is written, what is printed, how they end."""

import json
import os
import re
import socket
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import Result
from folders import noise, save, save_pair
from PIL import Image
from processes import run
from typer.testing import CliRunner

from app.media.image_files import decode_sar
from distillers.cli import app
from distillers.data import read_sar
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.models.radiometry import AMPLITUDE, SENTINEL1_DB, Radiometry
from distillers.models.schedule import VariancePreserving
from distillers.sar.address import NETWORK, gdal_name
from distillers.teacher import Teacher
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

rasterio = pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")


def publish(folder: Path, seen: Radiometry) -> Path:
    torch.manual_seed(0)
    schedule = VariancePreserving.from_betas()
    info = Info(
        name=folder.name, task="sar-to-optical", method="test", role="student", data="d", sampler="consistency",
        size=(32, 32), step_times={k: lcm_times(schedule, k) for k in (1, 2)}, patch=2, sar=seen.to_dict(),
    )  # fmt: skip
    network = {
        "block_out_channels": (8, 8), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "add_attention": False,
    }  # fmt: skip
    teacher = Teacher.random(info, network, schedule.to_config(), "x0", PixelUnshuffle(2))
    Generator(teacher.denoiser, teacher.codec, info).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("weights")
    return {"db": publish(place / "db", SENTINEL1_DB), "amplitude": publish(place / "amplitude", AMPLITUDE)}


@pytest.mark.parametrize("form", ["db", "amplitude"])
def test_a_scene_is_made_up_and_translated(tmp_path: Path, models: dict[str, Path], form: str) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["demonstration", str(tmp_path / "s.tif"), "--side", "96"]).exit_code == 0
    arguments = ["translate", str(tmp_path / "s.tif"), str(tmp_path / "o.tif"), "--model", str(models[form])]
    done = runner.invoke(
        app, [*arguments, "--samples", "3", "--stac", "--preview", str(tmp_path / "o.png"), "--json", "--steps", "2"]
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["units"], facts["steps"], facts["samples"]) == ("db", 2, 3)
    assert set(facts["bands"]) == ({"VV", "VH"} if form == "db" else {"VH"})
    assert "inferred, not measured" in done.stderr and "Mpx/s" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"s.tif", "o.tif", "o.uncertainty.tif", "o.json", "o.png"}
    with Image.open(tmp_path / "o.png") as preview, rasterio.open(tmp_path / "o.tif") as made:
        assert preview.size == (96, 96) and np.array_equal(np.asarray(preview).transpose(2, 0, 1), made.read())


def test_a_picture_is_translated_by_the_polarisation_its_name_has(tmp_path: Path, models: dict[str, Path]) -> None:
    grey = np.random.default_rng(0).integers(20, 250, (40, 52), dtype=np.uint8)
    made = {}
    for name in ("tile-VV", "tile-VH", "tile"):
        said = [] if name != "tile" else ["--bands", "VV"]
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
        out = tmp_path / f"{name}-optical.png"
        done = CliRunner().invoke(
            app, ["translate", str(tmp_path / f"{name}.png"), str(out), "--model", str(models["db"]), *said]
        )
        assert done.exit_code == 0, done.output
        with Image.open(out) as picture:
            assert picture.size == (52, 40)
            made[name] = np.asarray(picture)
    assert np.array_equal(made["tile"], made["tile-VV"]) and not np.array_equal(made["tile-VV"], made["tile-VH"])
    done = CliRunner().invoke(app, ["translate", str(tmp_path / "tile.png"), str(out), "--model", str(models["db"])])
    assert isinstance(done.exception, BadInput) and done.exception.field == "bands" and "VH" in str(done.exception)


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["none.tif", "o.tif"], "sar"),
        (["none.png", "o.tif"], "sar"),
        (["s.tif", "o.png"], "out"),
        (["s.tif", "s.tif"], "out"),
        (["s.tif", "o.tif", "--units", "decibel"], "units"),
        (["s.tif", "o.tif", "--steps", "5"], "steps"),
        (["s.tif", "o.tif", "--preview", "p.jpg"], "out"),
        (["s.tif", "o.tif", "--preview", "none/p.png"], "preview"),
    ],
)
def test_wrong_requests_end_with_one_line_and_two(
    tmp_path: Path, models: dict[str, Path], arguments: list[str], field: str
) -> None:
    CliRunner().invoke(app, ["demonstration", str(tmp_path / "s.tif"), "--side", "64"])
    command = [sys.executable, "-m", "distillers.cli", "translate", *arguments, "--model", str(models["db"])]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {field}: got" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s.tif"]


def test_any_pairs_are_measured(tmp_path: Path, models: dict[str, Path]) -> None:
    """Their report, calibration and tiles, beside nothing of the model's own folder."""
    rng = np.random.default_rng(1)
    for i in range(9):
        for kind, shape in (("sar", (160, 160)), ("opt", (160, 160, 3))):
            (tmp_path / "pairs" / "town" / kind).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
            picture.save(tmp_path / "pairs" / "town" / kind / f"roi{i}_p1.png")
    before = sorted(models["db"].iterdir())
    done = CliRunner().invoke(app, [
        "evaluate", str(models["db"]), "--pairs", str(tmp_path / "pairs"), "--pairs-option", "bands=VH",
        "--pairs-option", "size=16", "--n", "140", "--steps", "1", "--samples", "4", "--out", str(tmp_path / "r.json"),
        "--features", str(Path(__file__).parents[1] / "weights" / "features-eurosat"),
    ])  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"real, train split", "student, 1 step", "constant colour", "SAR copied to three bands"}
    assert rows["SAR copied to three bands"]["copy_ratio"] < 1e-3 < rows["student, 1 step"]["copy_ratio"]
    assert rows["student, 1 step"]["shifted_psnr"] >= rows["student, 1 step"]["psnr"] - 0.5
    assert rows["student, 1 step"]["regions"]["town"]["n"] == 140 and "By region" in report["markdown"]
    assert json.loads((tmp_path / "r-calibration.json").read_text())["samples"] == 4
    assert (
        "AUSE" in (tmp_path / "r.md").read_text()
        and (tmp_path / "r-calibration.png").is_file()
        and (tmp_path / "r-tiles.png").is_file()
    )
    assert sorted(models["db"].iterdir()) == before


def test_few_pairs_are_measured_without_distances(tmp_path: Path, models: dict[str, Path]) -> None:
    for i in range(3):
        save_pair(
            tmp_path / "pairs" / "town" / "sar" / f"{i}_p1.png", tmp_path / "pairs/town/opt" / f"{i}_p1.png", i, 64
        )
    done = CliRunner().invoke(app, [
        "evaluate", str(models["db"]), "--pairs", str(tmp_path / "pairs"), "--pairs-option", "size=32", "--steps", "1",
        "--teacher-steps", "", "--out", str(tmp_path / "new" / "r.json"), "--samples", "2",
        "--features", str(Path(__file__).parents[1] / "weights" / "features-eurosat"),
    ])  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "new" / "r.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["n"] == 4 and all("frechet" not in row and "kid_mean" not in row for row in rows.values())
    assert rows["student, 1 step"]["psnr"] > 0 and rows["constant colour"]["ssim"] is not None
    assert "4 tiles of 32x32 px and n is 4; 129 are needed" in report["notes"][0] and "size=16" in report["notes"][0]


@pytest.mark.parametrize(("option", "key"), [
    ("units", "units"), ("split=train", "split"), ("path=x", "path"), ("bands=1", "bands"), ("size=big", "size"),
    ("optical_scale=abc", "optical_scale"), ("nodata=abc", "nodata"), ("dihedral=2", "dihedral"), ("bandz=VV", "bandz"),
    ("size=64.5", "size"), ("limit=0", "limit"), ("units=decibel", "units"), ("layout=tiles", "layout"),
    ("colours=3", "colours"), ("radiometry=db", "radiometry"),
])  # fmt: skip
def test_wrong_options_of_pairs_are_refused_by_name(
    tmp_path: Path, models: dict[str, Path], option: str, key: str
) -> None:
    save_pair(tmp_path / "town" / "sar" / "1_p1.png", tmp_path / "town" / "opt" / "1_p1.png", 1)
    save_pair(tmp_path / "town" / "sar" / "2_p1.png", tmp_path / "town" / "opt" / "2_p1.png", 2)
    words = ["evaluate", str(models["db"]), "--pairs", str(tmp_path), "--pairs-option", option]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "r.json")])
    assert isinstance(done.exception, BadInput) and key in str(done.exception), done.exception


def test_a_part_of_a_scene_is_asked_for_in_pixels_or_on_the_ground(tmp_path: Path, models: dict[str, Path]) -> None:
    scene, runner = tmp_path / "s.tif", CliRunner()
    runner.invoke(app, ["demonstration", str(scene), "--side", "96"])
    with rasterio.open(scene) as raster:
        west, south, east, north = raster.window_bounds(((5, 35), (10, 60)))
    made = []
    for asked in (["--window", "10", "5", "50", "30"], ["--bbox", *map(str, (west, south, east, north))]):
        out = tmp_path / f"{len(made)}.tif"
        done = runner.invoke(app, ["translate", str(scene), str(out), "--model", str(models["db"]), *asked])
        assert done.exit_code == 0 and "50x30 px" in done.stdout, (done.output, done.exception)
        made.append(out.read_bytes())
    assert made[0] == made[1]
    southern = ["translate", str(scene), str(out), "--model", str(models["db"]), "--bbox", "-70.5", "-34", "-70", "-33"]
    assert "meets the scene" in str(runner.invoke(app, southern).exception)


# --- many scenes


def raster(path: Path, seed: int = 0, side: int = 48, **profile: Any) -> Path:
    """VV and VH of noise in dB, on a grid of UTM."""
    values = np.random.default_rng(seed).normal(0, 2, (2, side, side)) + np.array([-12.0, -19.0])[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "driver": "GTiff", "crs": "EPSG:32632", "transform": rasterio.transform.from_origin(5e5, 5e6, 10, 10),
        "count": 2, "height": side, "width": side, "dtype": "float32",
    } | profile  # fmt: skip
    with rasterio.open(path, "w", **options) as opened:
        opened.write(values.astype(np.float32))
        opened.descriptions = ("VV", "VH")
    return path


def translate(*words: Any, model: Path) -> Result:
    return CliRunner().invoke(app, ["translate", *map(str, words), "--model", str(model)])


def test_a_folder_is_translated_with_one_model_and_what_is_there_is_left(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate("abc"):
        raster(tmp_path / "in" / f"{name}.tif", i)
    (tmp_path / "in" / "b.tif").write_text("no raster")
    for other in ("notes.txt", "a.uncertainty.tif", ".hidden.tif", "quicklook.png"):
        (tmp_path / "in" / other).write_text("no scene")
    opened, load = [], Generator.from_pretrained
    monkeypatch.setattr(Generator, "from_pretrained", lambda *given: opened.append(given) or load(*given))
    words = tmp_path / "in", tmp_path / "new" / "out"
    first = translate(*words, "--samples", 2, "--preview", tmp_path / "small", model=models["db"])
    assert first.exit_code == 1 and len(opened) == 1, (first.output, first.exception)
    out = {path.name for path in words[1].iterdir()}
    assert out == {"a.tif", "c.tif", "a.uncertainty.tif", "c.uncertainty.tif"}
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"a.png", "c.png"}
    lines = first.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["a.tif", "translated"],
        ["b.tif", "failed"],
        ["c.tif", "translated"],
    ]
    assert "48x48" in lines[1] and "db VV,VH" in lines[1] and lines[4] == "3 scenes: 2 translated, 1 failed"
    assert "failed: " in (last := first.stderr.splitlines()[-1]) and "b.tif" in last and "raster that opens" in last

    raster(tmp_path / "in" / "b.tif", 1)
    before = (words[1] / "a.tif").read_bytes()
    second = translate(*words, "--seed", 7, model=models["db"])
    assert second.exit_code == 0 and "3 scenes: 1 translated, 2 there already" in second.stdout
    assert (
        words[1] / "a.tif"
    ).read_bytes() == before and "a.tif is there, made with 0 seed, with 2 samples" in second.stderr
    assert "before the scene was changed" not in second.stderr
    os.utime(tmp_path / "in" / "a.tif")
    again = translate(*words, "--seed", 7, "--window", 0, 0, 9, 9, model=models["db"])
    assert "with 2 samples, of the whole scene, before the scene was changed" in again.stderr
    assert "b.tif is there, made of the whole scene:" in again.stderr
    third = translate(*words, "--seed", 7, "--overwrite", "--json", model=models["db"])
    told = json.loads(third.stdout)
    assert [row["result"] for row in told] == ["translated"] * 3 and told[0]["facts"]["seed"] == 7
    assert (words[1] / "a.tif").read_bytes() != before


@pytest.mark.parametrize("words", [["*.tif"], ["a.tif", "b.tif"], ["**/*.tif"]])
def test_patterns_and_lists_are_many_scenes(
    tmp_path: Path, models: dict[str, Path], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate("ab"):
        raster(tmp_path / "in" / f"{name}.tif", i)
    raster(tmp_path / "in" / "a.uncertainty.tif") if "*" in words[0] else None  # an earlier result's
    monkeypatch.chdir(tmp_path if "**" in words[0] else tmp_path / "in")
    done = translate(*words, tmp_path / "out", model=models["db"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.tif", "b.tif"}


@pytest.mark.parametrize("scene", ["./s.tif", "in/../s.tif", "s[1].tif"])
def test_one_file_is_one_scene_however_it_is_written(
    tmp_path: Path, models: dict[str, Path], scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    raster(Path(scene))
    done = translate(scene, "o.tif", model=models["db"])
    assert done.exit_code == 0 and (tmp_path / "o.tif").is_file(), (done.output, done.exception)


def test_a_folder_to_write_takes_the_name_of_one_scene(tmp_path: Path, models: dict[str, Path]) -> None:
    scene = raster(tmp_path / "scene.tif")
    for out in (f"{tmp_path}/new/", f"{tmp_path}/new"):
        assert translate(scene, out, "--overwrite", model=models["db"]).exit_code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scene.tif"]


def test_a_folder_of_pictures_and_rasters_is_translated_together(tmp_path: Path, models: dict[str, Path]) -> None:
    raster(tmp_path / "in" / "a.tif")
    save(tmp_path / "in" / "p_VH.png", noise(0, 40, 40, 1))
    done = translate(tmp_path / "in" / "*", tmp_path / "out", model=models["db"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.tif", "p_VH.png"}
    done = translate(tmp_path / "in" / "*", tmp_path / "new", "--samples", 2, model=models["db"])
    assert done.exception.field == "samples" and not (tmp_path / "new").exists()


def test_many_scenes_that_cannot_be_are_refused_before_the_work(tmp_path: Path, models: dict[str, Path]) -> None:
    for place in ("a", "b"):
        raster(tmp_path / place / "s.tif")
    raster(tmp_path / "long" / f"{'l' * 250}.tif")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out, model = tmp_path / "out", models["db"]
    for words, field, message in (
        ([tmp_path / "*" / "s.tif", out], "sar", "both would become"),
        ([tmp_path / "empty", out], "sar", "a folder with rasters in it"),
        ([tmp_path / "none*.tif", out], "sar", "existing files match"),
        ([tmp_path / "a", tmp_path / "a"], "out", "which is read"),
        ([tmp_path / "a", tmp_path / "file"], "out", "a folder that can be written"),
        ([tmp_path / "long", out, "--samples", 2], "out", "255 bytes"),
        ([tmp_path / "a", out, "--preview", "p.png"], "preview", "a folder"),
        ([tmp_path / "a", "s3://bucket/out/"], "out", "this machine"),
        ([tmp_path / "a", out, "--steps", 3], "steps", "1"),
        ([tmp_path / "a", out, "--tile", 30], "tile", "multiple"),
    ):
        error = translate(*words, model=model).exception
        assert isinstance(error, BadInput) and error.field == field and message in str(error), (words, error)
    assert not out.exists() or not list(out.iterdir())


# --- other formats and places


@pytest.mark.parametrize(("name", "driver"), [("s.vrt", "VRT"), ("s.img", "HFA"), ("s.dat", "ENVI"), ("s", "GTiff")])
def test_what_gdal_reads_is_a_scene_whatever_its_name(
    tmp_path: Path, models: dict[str, Path], name: str, driver: str
) -> None:
    scene = raster(tmp_path / "scene.tif")
    from rasterio.shutil import copy

    copy(str(scene), str(tmp_path / name), driver=driver)
    made = []
    for file in ("scene.tif", name):
        done = translate(tmp_path / file, tmp_path / "o.tif", "--bands", "1,2", model=models["db"])
        assert done.exit_code == 0, (done.output, done.exception)
        with rasterio.open(tmp_path / "o.tif") as opened:
            made.append(opened.read())
    assert np.array_equal(*made)


def test_a_zip_of_one_raster_is_read_and_products_are_named(tmp_path: Path, models: dict[str, Path]) -> None:
    scene = raster(tmp_path / "scene.tif")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.write(scene, "folder/scene_rtc.tif")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(scene, "a.tif")
        archive.write(scene, "b.tif")
    with zipfile.ZipFile(tmp_path / "S1A.zip", "w") as archive:
        archive.writestr("S1A.SAFE/manifest.safe", "")
    (tmp_path / "S1B.SAFE").mkdir()
    (tmp_path / "broken.zip").write_text("no archive")
    assert translate(tmp_path / "one.zip", tmp_path / "o.tif", model=models["db"]).exit_code == 0
    inside = f"/vsizip/{tmp_path}/two.zip/b.tif"
    for name, message in (
        ("two.zip", inside), ("S1A.zip", "terrain-corrected"), ("S1B.SAFE", "SNAP"), ("broken.zip", "whole ZIP"),
    ):  # fmt: skip
        error = translate(tmp_path / name, tmp_path / "o.tif", model=models["db"]).exception
        assert isinstance(error, BadInput) and error.field == "scene" and name in str(error) and message in str(error)
    assert translate(inside, tmp_path / "o.tif", model=models["db"]).exit_code == 0


def test_a_netcdf_of_two_variables_says_how_to_name_one(tmp_path: Path, models: dict[str, Path]) -> None:
    from scipy.io import netcdf_file

    with netcdf_file(tmp_path / "s.nc", "w") as file:
        for axis in ("y", "x"):
            file.createDimension(axis, 48)
        for i, name in enumerate(("VV", "VH")):
            band = file.createVariable(name, "f4", ("y", "x"))
            band[:] = np.random.default_rng(i).normal(-12 - 7 * i, 2, (48, 48))
    error = translate(tmp_path / "s.nc", tmp_path / "o.tif", model=models["db"]).exception
    assert isinstance(error, BadInput) and "s.nc" in str(error) and ":VV" in str(error)
    done = translate(f"NETCDF:{tmp_path}/s.nc:VH", tmp_path / "o.tif", "--bands", "VH=1", model=models["db"])
    assert done.exit_code == 0, (done.output, done.exception)


class Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files, as object stores do, and notes what was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        file = Path(self.directory) / self.path.split("?")[0].lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(found[1]), min(int(found[2]), len(data) - 1)) if found else (0, len(data) - 1)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_addresses_are_read_over_the_network(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raster(tmp_path / "bucket" / "s.tif")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    environment = {
        "AWS_S3_ENDPOINT": host,
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Ranges.asked.clear()
    try:
        made = []
        for scene in (tmp_path / "bucket" / "s.tif", f"http://{host}/bucket/s.tif", "s3://bucket/s.tif"):
            done = translate(scene, tmp_path / "o.tif", "--stac", model=models["db"])
            assert done.exit_code == 0, (done.output, done.exception)
            made.append((tmp_path / "o.tif").read_bytes())
            link = json.loads((tmp_path / "o.json").read_text())["links"][0]["href"]
            assert link == ("bucket/s.tif" if isinstance(scene, Path) else scene)
        assert made[0] == made[1] == made[2] and set(Ranges.asked) == {"/bucket/s.tif"}  # and no sidecar
        done = translate(f"http://{host}/bucket/s.tif?key=1", f"{tmp_path}/out/", model=models["db"])
        assert done.exit_code == 0 and (tmp_path / "out" / "s.tif").is_file()
        error = translate(f"http://{host}/bucket/none.tif", tmp_path / "o.tif", model=models["db"]).exception
        assert isinstance(error, BadInput) and "none.tif" in str(error)
    finally:
        server.shutdown()


def test_a_silent_host_does_not_hold_up_the_next_scene(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORK, "GDAL_HTTP_TIMEOUT", "1")
    monkeypatch.setitem(NETWORK, "GDAL_HTTP_MAX_RETRY", "0")
    raster(tmp_path / "s.tif")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tif"
        done = translate(address, tmp_path / "s.tif", tmp_path / "out", model=models["db"])
    assert done.exit_code == 1 and "2 scenes: 1 translated, 1 failed" in done.stdout, (done.output, done.exception)
    assert f"failed: {address}: scene: got 'a.tif'" in done.stderr


def test_a_path_is_never_an_address(tmp_path: Path) -> None:
    """What the service hands over is a path of its own."""
    for name in ("https:/host/s.tif", "/vsicurl/http://host/s.tif", "s3:/bucket/s.tif"):
        with pytest.raises(BadInput, match="an existing file"):
            gdal_name(Path(name))


# --- pictures


def test_options_that_a_picture_cannot_honour_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    save(tmp_path / "p.png", noise(0, 40, 40, 1))
    for option, *value in (
        ["--samples", "8"], ["--stac"], ["--json"], ["--preview", str(tmp_path / "s.png")], ["--units", "db"],
        ["--nodata", "0"], ["--tile", "64"], ["--overlap", "16"], ["--batch", "2"],
        ["--window", "0", "0", "9", "9"],
    ):  # fmt: skip
        done = translate(tmp_path / "p.png", tmp_path / "o.png", "--bands", "VH", option, *value, model=models["db"])
        assert isinstance(done.exception, BadInput) and done.exception.field == option[2:], option
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_a_picture_of_16_bits_is_read_as_the_service_does(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (40, 52), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "p.png")
    command = read_sar(tmp_path / "p.png", SENTINEL1_DB, "VH")[0]
    unit = (decode_sar((tmp_path / "p.png").read_bytes(), 10_000) + 1) / 2
    assert np.allclose(command, SENTINEL1_DB.from_picture(unit, "VH"), atol=1e-5) and command[1].std() > 0.1
