"""How a process must be set up before torch is first imported: threads that yield, and no more of them than it may use.

OpenMP's threads spin while they wait. Where another process (or this one's event loop) wants the same core, a forward
pass of 2 ms then takes 100; a passive wait policy costs microseconds and removes the cliff. The number of threads
defaults to the machine's cores, also in a container that may use half a core. Both are read once, when torch is
imported, so the command and the service call `prepare_process()` first. This file knows neither torch nor the service.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def prepare_process() -> None:
    """Sets OMP_WAIT_POLICY, and OMP_NUM_THREADS where a cgroup quota is the limit; what the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = max(1, int(cpu_quota() or usable_cores()))  # 1.5 cores: two threads would be throttled in turns
    if threads < usable_cores():  # otherwise torch's own choice, the physical cores, is the better one
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the control groups of this process allow, the tightest of all levels; None without a limit."""
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
    """The group and all above it. Inside a container the upper ones are not mounted, or the path is the host's."""
    group = Path(path.lstrip("/"))
    yield from (mount / level for level in (group, *group.parents))


def _quota(*files: Path) -> float | None:
    try:
        quota, period = " ".join(file.read_text().strip() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # absent, or "max 100000"
        return None
