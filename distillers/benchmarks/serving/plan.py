"""Say what the serving benchmark measures: which servers, on which pictures, under which load.

`plan` says what to measure, `servers` installs and starts the servers, `load` asks them for pictures and checks the
answers, `measure` runs a plan, and `tables` writes what came out. `peers/` holds the scripts of the other servers.
This module imports neither torch nor numpy, so that the command can read its defaults.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distillers.errors import BadInput

ORDERS = 64  # different pictures that are asked for, in turn
PROMPTS = ("a forest", "a river at dawn", "a red barn in snow", "a street at night", "two ships", "a field of wheat")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class System:
    """Describe one server in one configuration."""

    name: str
    title: str
    command: tuple[str, ...]  # after the environment's Python; {port} is filled in
    environment: str = ""  # a folder's name; empty: our own
    packages: tuple[str, ...] = ()  # for pip, pinned
    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of its script in peers/
    ours: bool = False
    takes: str = "bytes"  # a SAR picture: its bytes as the body, or base64 in JSON ("json")
    answer: str = "bytes"  # a PNG, or a JSON "list" of one base64 text


def _fewstep(name: str, title: str, **variables: str) -> System:
    """Describe our own server as `fewstep serve` starts it."""
    factory = ("-m", "uvicorn", "--factory", "app.main:create_app", "--host", "127.0.0.1", "--port", "{port}")
    quiet = ("--no-access-log", "--log-level", "warning", "--timeout-keep-alive", "75")
    return System(name=name, title=title, command=factory + quiet, ours=True, variables=variables)


def _fastapi(name: str, title: str, **options: Any) -> System:
    """Describe the server of `peers/naive.py` with other options."""
    packages = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")
    return System(
        name=name, title=title, command=("naive.py",), environment="fastapi", packages=packages, options=options
    )


def _litserve(name: str, title: str, wait_s: float) -> System:
    """Describe LitServe with its batching timeout in seconds."""
    return System(
        name=name,
        title=title,
        command=("lit.py",),
        environment="litserve",
        packages=("litserve==0.2.19",),
        options={"wait_s": wait_s},
        takes="json",
    )


def _rayserve(name: str, title: str, **variables: str) -> System:
    """Describe Ray Serve with more environment variables."""
    return System(
        name=name,
        title=title,
        command=("rayserve.py",),
        environment="rayserve",
        packages=("ray[serve]==2.60.0",),
        variables={"RAY_USAGE_STATS_ENABLED": "0", **variables},
    )


SYSTEMS = [
    _fewstep("fewstep-eager", "fewstep, eager", FEWSTEP_TUNE_SECONDS="0"),
    _fewstep("fewstep", "fewstep"),
    _fastapi("fastapi", "FastAPI, inline"),
    _fastapi("fastapi-pillow", "FastAPI, inline, Pillow's PNG", codec="pillow"),
    _fastapi("diffusers", "FastAPI, inline, stock diffusers", stock=True),
    _litserve("litserve", "LitServe, no wait", 0.0),
    _litserve("litserve-5ms", "LitServe, 5 ms", 0.005),
    System(
        name="bentoml",
        title="BentoML",
        command=("-m", "bentoml", "serve", "bento:Pictures", "--host", "127.0.0.1", "--port", "{port}"),
        environment="bentoml",
        packages=("bentoml==1.4.39",),
        takes="json",
        answer="list",
        variables={"BENTOML_DO_NOT_TRACK": "true"},
    ),
    _rayserve("rayserve", "Ray Serve"),
    _rayserve(
        "rayserve-haproxy",
        "Ray Serve, high throughput (HAProxy)",
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
    ),
]
WITHOUT_NETWORK = {"fewstep-eager": "fewstep", "diffusers": "fastapi"}  # one system, where there is no forward pass


def find_systems(names: Iterable[str]) -> list[System]:
    """Return the systems of these names, in the order of SYSTEMS. Raises BadInput for an unknown name."""
    names, known = list(names), [system.name for system in SYSTEMS]
    for name in names:
        if name not in known:
            raise BadInput("systems", name, ", ".join(known))
    return [system for system in SYSTEMS if system.name in names]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Describe the pictures that every server is asked for."""

    name: str
    folder: Path
    steps: int
    size: tuple[int, int]
    orders: tuple[Mapping[str, Any], ...]  # {"seed", "label"?, "prompt"?, "bands"?, "file"?}; a file is a SAR picture
    constant: bool = False  # a picture instead of the forward pass
    device: str = "cpu"
    dtype: str = "float32"  # of torch, for the raw loop and the peers; ours chooses
    batch: int = 16  # pictures in a forward pass at most, for every server that batches

    def script_options(self, port: int = 0, **more: Any) -> dict[str, Any]:
        """Return what a script in peers/ reads from its environment."""
        return {
            "folder": str(self.folder.absolute()),
            "steps": self.steps,
            "size": self.size,
            "constant": self.constant,
            "device": self.device,
            "dtype": self.dtype,
            "batch": self.batch,
            "codec": "project",
            "port": port,
            **more,
        }

    def without_network(self) -> Workload:
        """Return the same load on a constant picture instead of the forward pass. Raises BadInput for a translator."""
        if any("file" in order for order in self.orders):
            allowed = "first a generator: the workload without a forward pass sends no pictures"
            raise BadInput("folder", self.name, allowed)
        return replace(self, name=f"constant picture, {self.size[1]}x{self.size[0]}", constant=True)


def workload(folder: Path, steps: int = 1) -> Workload:
    """Describe pictures of a published folder: classes or prompts in turn, or SAR pictures from its examples.

    Raises:
        BadInput: no whole weights folder, one that was not published with so many steps, or a translator without
            examples.
    """
    from distillers.models.radiometry import Radiometry
    from distillers.weights.manifest import Info, verify

    info = Info.read(folder)
    verify(folder, info)
    if info.step_times and steps not in info.step_times:
        raise BadInput("steps", steps, f"those of {folder}: {', '.join(map(str, sorted(info.step_times)))}")
    files = sorted((folder / "examples").glob("*.png")) if info.task == "sar-to-optical" else []
    if info.task == "sar-to-optical" and not files:
        raise BadInput("folder", str(folder), "a translator's with SAR pictures in examples/")
    labels = len(info.labels)
    orders = []
    for seed in range(ORDERS):
        order: dict[str, Any] = {"seed": seed}
        if labels:
            order["label"] = seed % labels
        if info.task == "text-to-image":
            order["prompt"] = PROMPTS[seed % len(PROMPTS)]
        if files:
            file = files[seed % len(files)].absolute()
            order["file"] = str(file)
            if band := Radiometry.of(info.sar).band_of_picture(file=file.name):
                order["bands"] = band
        orders.append(order)
    height, width = info.size
    return Workload(name=folder.name, folder=folder, steps=steps, size=(height, width), orders=tuple(orders))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what is measured, and how.

    Raises:
        BadInput: what cannot be measured on this machine, or a number out of range.
    """

    folders: Sequence[Path]  # weights folders, each a workload
    systems: Sequence[System]
    constant: bool = True  # one workload more: a constant picture of the first folder's size, and no forward pass
    rounds: int = 3
    seconds: float = 0.5  # of each closed loop, and up to four times that; twice as long an open one
    callers: Sequence[int] = (1, 2, 4, 8, 16, 32)
    loads: Sequence[int] = (50, 80, 95, 120)  # percent
    burst: bool = True  # and callers who leave: in the last round of the first folder
    pinned: bool = True  # servers on one processor, the client on another
    environments: Path = Path("runs/peers")
    steps: int = 1
    device: str = Workload.device
    dtype: str = Workload.dtype
    batch: int = Workload.batch

    def __post_init__(self) -> None:
        if sys.platform != "linux":
            raise BadInput("system", sys.platform, "linux: processes are pinned, paused and read in /proc")
        if not self.folders or not self.systems:
            raise BadInput("folders, systems", (len(self.folders), len(self.systems)), "one or more of each")
        if self.dtype not in DTYPES:
            raise BadInput("dtype", self.dtype, ", ".join(DTYPES))
        if not 1 <= self.batch <= 1024:
            raise BadInput("batch", self.batch, "1 to 1024 pictures")
        if self.rounds < 1 or not 0.05 <= self.seconds <= 600:
            raise BadInput("rounds, seconds", (self.rounds, self.seconds), "1 round or more of 0.05 to 600 seconds")
        if not self.callers or min(self.callers) < 1 or max(self.callers) > 1024:
            raise BadInput("concurrency", tuple(self.callers), "1 to 1024 callers")
        if any(not 1 <= load <= 1000 for load in self.loads):
            raise BadInput("load", tuple(self.loads), "percent, 1 to 1000")
        if self.pinned and len(os.sched_getaffinity(0)) < 2:
            raise BadInput("pinned", True, "false on one processor: server and client need one each")

    def workloads(self) -> list[Workload]:
        """Describe the pictures of every folder, and the constant picture before them where the plan has one."""
        loads = [
            replace(workload(folder, self.steps), device=self.device, dtype=self.dtype, batch=self.batch)
            for folder in self.folders
        ]
        return [loads[0].without_network(), *loads] if self.constant else loads

    @property
    def server_cores(self) -> list[int] | None:
        """The first processor that we may use, for the servers; None: all."""
        return sorted(os.sched_getaffinity(0))[:1] if self.pinned else None

    @property
    def client_cores(self) -> list[int] | None:
        """The last processor that we may use, for the client; None: all."""
        return sorted(os.sched_getaffinity(0))[-1:] if self.pinned else None
