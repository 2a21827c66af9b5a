"""The commands about scenes, as a user types them: what is written, what is printed, how they end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run
from typer.testing import CliRunner

from distillers.cli import app
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.models.radiometry import AMPLITUDE, SENTINEL1_DB, Radiometry
from distillers.models.schedule import VariancePreserving
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


def test_pairs_without_a_value_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(models["db"]), "--pairs", str(tmp_path), "--pairs-option", "units"])
    assert done.exit_code != 0 and "pairs-option" in str(done.exception)


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
