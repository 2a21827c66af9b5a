"""Prepare a process for torch, and describe what it runs on: cores, device, package versions.

OpenMP's threads spin while they wait. Where another process (or this one's event loop) wants the same core, a forward
pass of 2 ms then takes 100; a passive wait policy costs microseconds and removes the cliff. The number of threads
defaults to the machine's cores, also in a container that may use half a core. Both are read once, when torch is
imported, so the command and the service call `prepare_process()` first, and this module does not import torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def prepare_process() -> None:
    """Set OMP_WAIT_POLICY, and OMP_NUM_THREADS where a cgroup quota is the limit; what the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = max(1, int(cpu_quota() or usable_cores()))  # 1.5 cores: two threads would be throttled in turns
    if threads < usable_cores():  # otherwise torch's own choice, the physical cores, is the better one
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores the control groups of this process allow, the least of all levels; None without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            quotas += [_quota(level / "cpu.max") for level in _levels(root, path)]
        elif "cpu" in controllers.split(","):  # version 1
            for mount in (root / "cpu", root / controllers):
                quotas += [_quota(at / "cpu.cfs_quota_us", at / "cpu.cfs_period_us") for at in _levels(mount, path)]
    return min((quota for quota in quotas if quota), default=None)


def _levels(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folders of a group and of all above it; in a container some of them do not exist."""
    group = Path(path.lstrip("/"))
    yield from (mount / level for level in (group, *group.parents))


def _quota(*files: Path) -> float | None:
    """Read the quota and the period of one control group and return the cores they allow; None without a limit."""
    try:
        quota, period = " ".join(file.read_text().strip() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # absent, or "max 100000"
        return None


def device_name(device: str | torch.device) -> str:
    """Return the name of a GPU, or the type of the device with the processor's model and number of cores."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{kind} ({model or platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


def package_versions(*names: str) -> dict[str, str]:
    """Return the installed versions of packages by name; a package that is not installed is left out."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
