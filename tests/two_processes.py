"""Run a function in a group of two processes, as torchrun starts them, over gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BEGAN = "began"  # the file by which the function says that it is in a group


def in_two_processes(work: Callable[[str], None], folder: Path, context: Any = None, seconds: float = 500) -> None:
    """Call `work(folder)` in both; what they print fails with them. Skip the test where a machine makes no group."""
    launcher = (context or multiprocessing.get_context("forkserver")).Process(target=_launch, args=(work, str(folder)))
    launcher.start()
    launcher.join(seconds)
    said = (folder / "log").read_text()
    if not (folder / BEGAN).exists():
        pytest.skip(f"no group of two processes on this machine: {said[-500:]}")
    assert launcher.exitcode == 0, said


def _launch(work: Callable[[str], None], folder: str) -> None:
    from accelerate import debug_launcher  # its command starts several processes on GPUs or under MPI only

    with Path(folder, "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    debug_launcher(work, args=(folder,), num_processes=2)
