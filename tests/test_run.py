"""`fewstep run`, the first command of the README, as a newcomer starts it: distil, measure, show."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distillers.cli import app
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.recipe import Recipe

SHIPPED = Path(__file__).parents[1] / "weights"
TEACHER: dict[str, Any] = {
    "name": "shapes-teacher", "method": "diffusion", "data": {"kind": "shapes", "size": 32, "objects": 1},
    "model": {
        "task": "class-to-image", "prediction": "x0", "patch": 4,
        "network": {
            "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
        },
    },
    "train": {"iterations": 2, "batch": 4, "samples": 1, "tracker": "none"},
}  # fmt: skip


@pytest.mark.slow
def test_the_quick_start_distils_measures_and_shows_and_is_found_again(tmp_path: Path) -> None:
    """With a teacher that is quick because it is tiny; all else is what is shipped."""
    distill(Recipe.from_table(TEACHER), tmp_path / "shapes-teacher", "cpu")
    shutil.copytree(SHIPPED / "features-shapes", tmp_path / "features-shapes")
    first = CliRunner().invoke(app, ["run", "--weights", str(tmp_path), "--no-serve"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    student = tmp_path / "shapes-quickstart"
    counts = list(Generator.from_pretrained(student).info.step_times)
    rows = [row for row in json.loads((student / "report.json").read_text())["rows"] if row["role"] == "student"]
    assert [row["nfe"] for row in rows] == counts
    for row in rows:
        assert f"{row['name']} |" in first.output and row["shows"]["asked"] is not None
    assert f"pictures: {student / 'grid.png'}" in first.output and (student / "grid.png").stat().st_size > 1000
    again = CliRunner().invoke(app, ["run", "--weights", str(tmp_path), "--no-serve"], catch_exceptions=False)
    assert again.exit_code == 0 and rows[0]["name"] in again.output and "training" not in again.output
