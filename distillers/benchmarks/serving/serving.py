"""Servers side by side: what each costs over the bare forward pass, on the same weights, with the same codec.

One row is no server: the forward pass in a loop, with and without encoding, on the processors that the servers get.
All systems take turns in ABBA order, so a busy minute hits all; every figure is the median of rounds with its
quartiles. Every picture that comes back is compared with the raw forward pass of its seed: one wrong picture voids all
that a system has shown. Loads of the open loop are shares of what one loop of forward pass and encoding can give.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distillers.benchmarks.serving.servers import (
    PEERS,
    ROOT,
    Server,
    System,
    Talker,
    Unavailable,
    Workload,
    cpu_seconds,
    environment_of,
    install,
    request,
    rss_mb,
    versions,
)
from distillers.errors import BadInput
from distillers.evaluation.report import setting
from distillers.models.radiometry import Radiometry
from distillers.runtime import package_versions

RAW = "raw"
POOL = 64  # different pictures that are asked for, in turn
WARM_S = 0.3
ALIKE = {"fewstep-eager": "fewstep", "diffusers": "fastapi"}  # one system, where there is no forward pass
PICTURES = 100  # that a closed loop should see
LONGEST = 4  # times what was asked for that it lasts for them
DTYPES = ("float32", "float16", "bfloat16")
PROMPTS = ("a forest", "a river at dawn", "a red barn in snow", "a street at night", "two ships", "a field of wheat")
EXACT, TUNED = 1, 2  # levels of 255 that a pixel may differ by: torch sums in another order; FEWSTEP_TOLERANCE
BURST = (1.0, 2.0, 9.0)  # seconds before, in and after: 6 s of work are left over, and a fifth of it comes on top
BURST_LOAD = (0.2, 4.0, 0.2)
FULL = 64  # callers who fill a server's queue
LEAVE = 64  # callers who leave before they are answered
PACKAGES = ("torch", "diffusers", "numpy", "uvicorn")  # whose versions are told

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    folders: Sequence[Path]  # weights folders, each a workload
    systems: Sequence[System]
    constant: bool = True  # one workload more: a constant picture of the first folder's size, and no forward pass
    rounds: int = 3
    seconds: float = 0.5  # of each closed loop, and up to four times that (see `lasting`); twice as long an open one
    callers: Sequence[int] = (1, 2, 4, 8, 16, 32)
    loads: Sequence[int] = (50, 80, 95, 120)  # percent
    burst: bool = True  # and callers who leave: in the last round of the first folder
    pinned: bool = True  # servers on one processor, the client on another
    environments: Path = Path("runs/peers")
    steps: int = 1
    device: str = "cpu"
    dtype: str = "float32"  # of the raw loop and the peers
    batch: int = 16  # pictures in one forward pass at most

    def check(self) -> None:
        """BadInput for what cannot be measured here."""
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


def abba(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of every round: forwards and backwards in turn."""
    return [list(names) if i % 2 == 0 else list(names)[::-1] for i in range(rounds)]


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Median and quartiles of rounds; None of nothing."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    low, high = np.quantile(there, [0.25, 0.75])
    return {"median": median(there), "q1": float(low), "q3": float(high), "values": there}


# --- the whole


def measure(plan: Plan, say: Say = lambda _: None) -> Iterator[dict[str, Any]]:
    """What is written to JSON: `setting`, `plan`, `peers`, and every workload's raw loop and systems.

    After each workload all that was found so far: it takes minutes for every one.
    """
    plan.check()
    started, pythons, peers = time.perf_counter(), dict[str, Path](), dict[str, Any]()
    for system in plan.systems:
        say(f"{system.name}: environment")
        try:
            pythons[system.name] = install(system, plan.environments)
            found: dict[str, Any] = {"versions": versions(system, pythons[system.name])}
        except Unavailable as error:
            found = {"not_measured": str(error)}
        peers[system.name] = {
            "title": system.title,
            "command": " ".join(["python", *system.command]),
            "variables": dict(system.variables),
            "told": dict(system.told),
            **found,
        }
    workloads = [
        replace(workload(folder, plan.steps), device=plan.device, dtype=plan.dtype, batch=plan.batch)
        for folder in plan.folders
    ]
    if plan.constant:
        workloads.insert(0, without_forward(workloads[0]))
    load = os.getloadavg()[0]
    found_all = list[dict[str, Any]]()
    for one in workloads:
        found_all.append(_contest(plan, one, pythons, peers, say))
        yield {
            "setting": {
                **setting(plan.device),
                "python": sys.version.split()[0],
                "load_average": {"before": load, "after": os.getloadavg()[0]},
                "servers_on": servers_on(plan.pinned) or sorted(os.sched_getaffinity(0)),
                "client_on": client_on(plan.pinned) or sorted(os.sched_getaffinity(0)),
                "seconds": round(time.perf_counter() - started, 1),
                "versions": package_versions(*PACKAGES),
            },
            "plan": {
                name: [folder.name for folder in plan.folders] if name == "folders" else value
                for name, value in asdict(plan).items() if name not in ("systems", "environments")
            },
            "peers": peers,
            "workloads": found_all,
        }  # fmt: skip


def servers_on(pinned: bool) -> list[int] | None:
    """The first processor of those we may use."""
    return sorted(os.sched_getaffinity(0))[:1] if pinned else None


def client_on(pinned: bool) -> list[int] | None:
    """The last one."""
    return sorted(os.sched_getaffinity(0))[-1:] if pinned else None


def workload(folder: Path, steps: int = 1) -> Workload:
    """One-step pictures of a published folder: classes or prompts in turn, or SAR pictures from its examples."""
    try:
        info = json.loads((folder / "fewstep.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput("folder", str(folder), "a weights folder") from error
    files = sorted((folder / "examples").glob("*.png")) if info["task"] == "sar-to-optical" else []
    if info["task"] == "sar-to-optical" and not files:
        raise BadInput("folder", str(folder), "a translator's with SAR pictures in examples/")
    labels = len(info.get("labels") or [])
    orders = []
    for seed in range(POOL):
        order: dict[str, Any] = {"seed": seed}
        if labels:
            order["label"] = seed % labels
        if info["task"] == "text-to-image":
            order["prompt"] = PROMPTS[seed % len(PROMPTS)]
        if files:
            file = files[seed % len(files)].absolute()
            order["file"] = str(file)
            if band := Radiometry.of(info.get("sar")).band_of_picture(file=file.name):
                order["bands"] = band
        orders.append(order)
    height, width = info["size"]
    return Workload(name=folder.name, folder=folder, steps=steps, size=(height, width), orders=tuple(orders))


def without_forward(model: Workload) -> Workload:
    """A constant picture of a model's size, of nothing but a seed and a class."""
    orders = tuple({name: value for name, value in order.items() if name != "file"} for order in model.orders)
    if any("file" in order for order in model.orders):
        raise BadInput("folder", model.name, "first a generator: the workload without a forward pass sends no pictures")
    name = f"constant picture, {model.size[1]}x{model.size[0]}"
    return replace(model, name=name, orders=orders, constant=True)


# --- one workload


@contextmanager
def load_client(pinned: bool) -> Iterator[Talker]:
    """The process that asks."""
    command = [sys.executable, "-c", "from distillers.benchmarks.serving.load import main; main()"]
    client = Talker(command, client_on(pinned), environment_of(1, {}, PYTHONPATH=str(ROOT)))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def raw_loop(work: Workload, expected: Path, pinned: bool) -> Iterator[Talker]:
    """The process that draws without a server; it has written what is expected of all."""
    threads = len(servers_on(pinned) or os.sched_getaffinity(0))
    command = [sys.executable, str(PEERS / "raw.py")]
    raw = Talker(command, servers_on(pinned), environment_of(threads, work.told(), PYTHONPATH=str(ROOT)))
    try:
        raw.ask(do="expect", orders=work.orders, path=str(expected))
        yield raw
    finally:
        raw.close()


def _contest(
    plan: Plan, work: Workload, pythons: Mapping[str, Path], peers: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """All systems on one workload."""
    raws: list[dict[str, Any]] = []
    names = {one.name for one in plan.systems}
    systems = [one for one in plan.systems if not (work.constant and ALIKE.get(one.name) in names)]
    visits: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
    not_measured: dict[str, str] = {}
    up: dict[str, Server] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs")))  # short: sockets are made in it
        expected = scratch / "expected.npy"
        raw = stack.enter_context(raw_loop(work, expected, plan.pinned))
        client = stack.enter_context(load_client(plan.pinned))
        for system in systems:
            if system.name not in pythons:
                not_measured[system.name] = peers[system.name]["not_measured"]
            else:
                say(f"{work.name}: {system.name} starts")
                server = Server(system, work, pythons[system.name], scratch, servers_on(plan.pinned))
                stack.callback(server.stop)
                try:
                    server.start()
                    server.pause()
                    up[system.name] = server
                except Unavailable as error:
                    not_measured[system.name] = str(error)
        for turn, order in enumerate(abba([RAW, *up], plan.rounds)):
            for name in order:
                say(f"{work.name}: round {turn + 1} of {plan.rounds}, {name}")
                if name == RAW:
                    raws.append(_raw_visit(raw, plan))
                elif up[name].process is not None:
                    ceiling = best(raws[0], encode=True)["images_per_second"]
                    try:
                        visits[name].append(_visit(up[name], client, expected, plan, ceiling, turn))
                    except Unavailable as error:
                        not_measured[name] = str(error)
                        up[name].stop()
        facts = {
            name: {"ready_s": server.ready_s, "tuned_s": server.tuned_s or None, "backend": server.facts.get("backend")}
            for name, server in up.items()
        }
    return {
        "name": work.name, "size": work.size, "steps": work.steps, "constant": work.constant, "model": work.folder.name,
        "raw": _raw_figures(raws),
        "systems": {
            name: {"not_measured": not_measured[name]} if name in not_measured else facts[name] | _figures(visits[name])
            for name in visits
        },
    }  # fmt: skip


def best(raw: Mapping[str, Any], encode: bool) -> Mapping[str, Any]:
    """The batch size of a raw visit that gives most images."""
    return max(raw["encoded" if encode else "forward"].values(), key=lambda found: found["images_per_second"])


def lasting(plan: Plan, ceiling: float) -> float:
    """Seconds of a closed loop: long enough for PICTURES at the pace of no server, within limits."""
    return min(max(plan.seconds, PICTURES / ceiling), LONGEST * plan.seconds)


def _raw_visit(raw: Talker, plan: Plan) -> dict[str, Any]:
    """Powers of two, and the largest batch."""
    sizes = sorted({*(1 << i for i in range(plan.batch.bit_length())), plan.batch})
    return {
        kind: {n: raw.ask(do="time", batch=n, encode=kind == "encoded", seconds=plan.seconds) for n in sizes}
        for kind in ("forward", "encoded")
    }


def _raw_figures(raws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind in ("forward", "encoded"):
        by_batch = {
            batch: {
                name: spread(one[kind][batch][name] for one in raws)
                for name in ("images_per_second", "pass_ms", "cpu_ms")
            }
            for batch in raws[0][kind]
        }
        most = max(by_batch, key=lambda batch: by_batch[batch]["images_per_second"]["median"])  # type: ignore[index]
        figures[kind] = {"batches": by_batch, "best_batch": most, "best": by_batch[most]["images_per_second"]}
    return figures


def _visit(
    server: Server, client: Talker, expected: Path, plan: Plan, ceiling: float, turn: int
) -> dict[str, Any]:  # fmt: skip
    """One turn of one server, awake only for it. Unavailable if it has died."""
    server.go()
    try:
        tell_pool(client, server, expected)
        client.ask(do="closed", callers=4, seconds=WARM_S, warm_s=0)
        found: dict[str, Any] = {"closed": {}, "open": {}}
        seconds = lasting(plan, ceiling)
        cpu, served = cpu_seconds(server.pid), 0
        for callers in plan.callers:
            one = client.ask(do="closed", callers=callers, seconds=seconds, warm_s=0.1)
            served += one["served"]
            found["closed"][callers] = one
        found["cpu_ms"] = 1e3 * (cpu_seconds(server.pid) - cpu) / served if served else None
        for load in plan.loads if not server.workload.constant else ():
            phases = [(ceiling * load / 100, 2 * seconds)]
            found["open"][load] = client.ask(do="open", phases=phases, seed=turn)
            server.settle()
        first = server.workload.folder == plan.folders[0] and not server.workload.constant
        if plan.burst and first and turn == plan.rounds - 1:
            phases = [(ceiling * load, seconds) for load, seconds in zip(BURST_LOAD, BURST, strict=True)]
            found["burst"] = client.ask(do="open", phases=phases, seed=turn)
            if server.settle() and found["cpu_ms"]:
                cpu = cpu_seconds(server.pid)
                client.ask(do="abandon", callers=LEAVE)
                server.settle()
                found["wasted"] = 1e3 * (cpu_seconds(server.pid) - cpu) / found["cpu_ms"]
        found["rss_mb"] = rss_mb(server.pid)
        if server.process is None or server.process.poll() is not None:
            raise Unavailable(f"ended during the measurement; its log ends with: {server.last_words()}")
        return found
    finally:
        server.pause()


def tell_pool(client: Talker, server: Server, expected: Path) -> None:
    """Whom the client is to ask for what, and what is to come back."""
    requests = [request(server.system, server.workload, order) for order in server.workload.orders]
    client.ask(
        do="pool", requests=[base64.b64encode(one).decode() for one in requests], expected=str(expected),
        port=server.port, answer=server.system.answer, tolerance=TUNED if tuned(server) else EXACT,
    )  # fmt: skip


def tuned(server: Server) -> bool:
    """Whether it may run a backend of lower precision."""
    return server.system.ours and server.system.variables.get("FEWSTEP_TUNE_SECONDS") != "0"


def _figures(visits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles of one system's rounds."""
    closed = {callers: _point([one["closed"][callers] for one in visits]) for callers in visits[0]["closed"]}
    opened = {load: _point([one["open"][load] for one in visits]) for load in visits[0]["open"]}
    points = [point for one in visits for kind in ("closed", "open") for point in one[kind].values()]
    points += [one["burst"] for one in visits if "burst" in one]
    most = max(closed, key=lambda callers: closed[callers]["images_per_second"]["median"])
    return {
        "closed": closed, "open": opened, "best_callers": most, "best": closed[most]["images_per_second"],
        "burst": visits[-1].get("burst"), "wasted": visits[-1].get("wasted"),
        "cpu_ms": spread(one["cpu_ms"] for one in visits), "rss_mb": spread(one["rss_mb"] for one in visits),
        "bytes": max(point["bytes"] for point in points),
        "gate": {
            "checked": sum(point["served"] for point in points), "wrong": sum(point["wrong"] for point in points),
            "max_difference": max((point["max_difference"] or 0 for point in points), default=None),
        },
    }  # fmt: skip


def _point(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failed: dict[str, int] = {}
    for one in rounds:
        for status, count in one["failed"].items():
            failed[status] = failed.get(status, 0) + count
    names = rounds[0]["latency_ms"] or {}
    return {
        "images_per_second": spread(one["images_per_second"] for one in rounds),
        "latency_ms": {name: spread((one["latency_ms"] or {}).get(name) for one in rounds) for name in names},
        "sent_late_ms_p99": spread(one["sent_late_ms_p99"] for one in rounds),
        "asked": sum(one["asked"] for one in rounds),
        "failed": failed,
    }


# --- for hours


def soak(
    folder: Path, system: System, *, minutes: float, load: int = 80, pinned: bool = True,
    environments: Path = Path("runs/peers"), steps: int = 1, say: Say = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """A server at a share of its capacity for so long: latency of every minute, memory of every second.

    Memory is flat if the line through its second half rises by less than 1 % an hour, or by less than 2 MB in all.
    """
    if not 0.1 <= minutes <= 10_000 or not 1 <= load <= 200:
        raise BadInput("minutes, load", (minutes, load), "0.1 to 10000 minutes at 1 to 200 percent")
    Plan(folders=[folder], systems=[system], pinned=pinned).check()
    work, python = workload(folder, steps), install(system, environments)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs")))
        expected = scratch / "expected.npy"
        with raw_loop(work, expected, pinned):
            pass
        client = stack.enter_context(load_client(pinned))
        server = Server(system, work, python, scratch, servers_on(pinned))
        stack.callback(server.stop)
        server.start()
        tell_pool(client, server, expected)
        client.ask(do="closed", callers=FULL, seconds=10, warm_s=0)  # once full: a later crowd takes no more memory
        capacity = client.ask(do="closed", callers=16, seconds=3, warm_s=0.2)["images_per_second"]
        rate, began = capacity * load / 100, time.perf_counter()
        memory, parts = list[tuple[float, float]](), list[dict[str, Any]]()
        while (left := minutes * 60 - (time.perf_counter() - began)) > 1:
            client.send(do="open", phases=[(rate, min(60.0, left))], seed=len(parts))
            while not client.ready(1.0):
                memory.append((time.perf_counter() - began, rss_mb(server.pid)))
            parts.append(client.receive())
            latency = parts[-1]["latency_ms"]
            say(
                f"minute {len(parts)}: p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms, {memory[-1][1]:.1f} MB"
            )
        alive = server.process is not None and server.process.poll() is None
        backend = server.facts.get("backend")
    return {
        "setting": setting("cpu"), "model": work.name, "system": system.title, "steps": steps, "backend": backend,
        "pinned": pinned, "load": load, "asked_minutes": minutes, "capacity": capacity, "rate": rate, "minutes": parts,
        "alive": alive,
        "memory": {**trend(memory), "samples_mb": [round(mb, 2) for _, mb in memory[:: max(1, len(memory) // 600)]]},
    }  # fmt: skip


def trend(memory: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The line through the second half of (seconds, MB): its rise, and whether it is flat."""
    half = np.array(memory[len(memory) // 2 :])
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) if len(half) > 2 else 0.0
    rise = slope * float(half[-1, 0] - half[0, 0])
    level = float(np.median(half[:, 1]))
    return {
        "start_mb": memory[0][1], "median_mb": level, "highest_mb": max(mb for _, mb in memory),
        "mb_per_hour": 3600 * slope, "rise_mb": rise, "flat": 3600 * slope < 0.01 * level or rise < 2.0,
    }  # fmt: skip
