"""What must be settled before torch is imported, and that importing the service imports no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillers.runtime import cpu_quota


def run(code: str, **environment: str) -> str:
    """A fresh interpreter's output, without this one's OpenMP settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "FEWSTEP_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout


PREPARE = """
import json, os, sys
from pathlib import Path
import app.main
after_import = "OMP_WAIT_POLICY" in os.environ
from app.settings import Settings
app.main.create_app(Settings(weights=Path(".")))
settings = [os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")]
print(json.dumps([after_import, *settings, "torch" in sys.modules]))
"""


@pytest.mark.process
def test_nothing_happens_at_import_and_the_factory_prepares_before_torch() -> None:
    assert json.loads(run(PREPARE)) == [False, "PASSIVE", None, False] or cpu_quota() is not None


@pytest.mark.process
def test_what_the_user_has_set_stays() -> None:
    assert json.loads(run(PREPARE, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="3"))[1:3] == ["ACTIVE", "3"]


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/pod/box", {"pod/cpu.max": "100000 100000", "pod/box/cpu.max": "400000 100000"}, 1.0),
        ("0::/host/only", {"cpu.max": "50000 100000"}, 0.5),  # a container's view: the host's path is not mounted
        ("3:memory:/\n2:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ("2:cpu:/box", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
    ],
)
def test_the_quota_is_the_tightest_of_all_levels(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "membership").write_text(membership + "\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert cpu_quota(tmp_path, tmp_path / "membership") == quota


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "absent") is None
