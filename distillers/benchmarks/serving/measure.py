"""Run a plan of the serving benchmark: measure what each server costs over the bare forward pass of the same weights.

One row is no server: the forward pass in a loop, with and without encoding, on the processors that the servers get.
All systems take turns in ABBA order, so a busy minute hits all; every figure is the median of rounds with its
quartiles. Every picture that comes back is compared with the raw forward pass of its seed: one wrong picture voids all
that a system has shown. Loads of the open loop are shares of what one loop of forward pass and encoding can give.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distillers.benchmarks.serving.plan import WITHOUT_NETWORK, Plan, Workload
from distillers.benchmarks.serving.servers import (
    PEERS,
    ROOT,
    JsonProcess,
    Server,
    Unavailable,
    cpu_seconds,
    environment_variables,
    install,
    request,
    rss_mb,
    versions,
)
from distillers.errors import BadInput
from distillers.evaluation.report import setting
from distillers.runtime import package_versions

RAW = "raw"
WARM_S = 0.3
PICTURES = 100  # that a closed loop should see
LONGEST = 4  # times what was asked for that it lasts for them
EXACT, TUNED = 1, 2  # levels of 255 that a pixel may differ by: torch sums in another order; FEWSTEP_TOLERANCE
BURST = (1.0, 2.0, 9.0)  # seconds before, in and after: 6 s of work are left over, and a fifth of it comes on top
BURST_LOAD = (0.2, 4.0, 0.2)
FULL = 64  # callers who fill a server's queue
LEAVE = 64  # callers who leave before they are answered
PACKAGES = ("torch", "diffusers", "numpy", "uvicorn")  # whose versions the figures record

Say = Callable[[str], None]
Figures = dict[str, Any]


def abba(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the order of every round: forwards and backwards in turn."""
    return [list(names) if i % 2 == 0 else list(names)[::-1] for i in range(rounds)]


def quartiles(values: Iterable[float | None]) -> Figures | None:
    """Return the median and the quartiles of rounds; None without a number."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    low, high = np.quantile(numbers, [0.25, 0.75])
    return {"median": median(numbers), "q1": float(low), "q3": float(high), "values": numbers}


def measure(plan: Plan, say: Say = lambda _: None) -> Iterator[Figures]:
    """Measure a plan, and yield all figures so far after each workload, as JSON-able data: it takes minutes for each.

    The keys are `setting`, `plan`, `peers`, and `workloads` with the raw loop and the systems of each.
    """
    workloads = plan.workloads()  # refused, if at all, before peers are installed
    started, pythons, peers = time.perf_counter(), dict[str, Path](), dict[str, Any]()
    for system in plan.systems:
        say(f"{system.name}: environment")
        try:
            pythons[system.name] = install(system, plan.environments)
            installed: Figures = {"versions": versions(system, pythons[system.name])}
        except Unavailable as error:
            installed = {"not_measured": str(error)}
        peers[system.name] = {
            "title": system.title,
            "command": " ".join(["python", *system.command]),
            "variables": dict(system.variables),
            "told": dict(system.options),
            **installed,
        }
    load, measured = os.getloadavg()[0], list[Figures]()
    asked = {name: value for name, value in asdict(plan).items() if name not in ("systems", "environments")}
    every = sorted(os.sched_getaffinity(0))
    for work in workloads:
        measured.append(_measure_workload(plan, work, pythons, peers, say))
        yield {
            "setting": {
                **setting(plan.device),
                "python": sys.version.split()[0],
                "load_average": {"before": load, "after": os.getloadavg()[0]},
                "servers_on": plan.server_cores or every,
                "client_on": plan.client_cores or every,
                "seconds": round(time.perf_counter() - started, 1),
                "versions": package_versions(*PACKAGES),
            },
            "plan": {**asked, "folders": [folder.name for folder in plan.folders]},
            "peers": peers,
            "workloads": measured,
        }


# --- one workload


@contextmanager
def load_client(cores: list[int] | None) -> Iterator[JsonProcess]:
    """Run the process of `load` that asks for pictures."""
    command = [sys.executable, "-c", "from distillers.benchmarks.serving.load import main; main()"]
    with JsonProcess(command, cores, environment_variables(1, {}, PYTHONPATH=str(ROOT))) as client:
        yield client


@contextmanager
def raw_loop(work: Workload, expected: Path, cores: list[int] | None) -> Iterator[JsonProcess]:
    """Run the process that draws without a server; it first writes the expected pictures to a file."""
    threads = len(cores or os.sched_getaffinity(0))
    variables = environment_variables(threads, work.script_options(), PYTHONPATH=str(ROOT))
    with JsonProcess([sys.executable, str(PEERS / "raw.py")], cores, variables) as raw:
        raw.ask(do="expect", orders=work.orders, path=str(expected))
        yield raw


def _measure_workload(
    plan: Plan, work: Workload, pythons: Mapping[str, Path], peers: Mapping[str, Any], say: Say
) -> Figures:
    """Measure all systems on one workload, in turns."""
    raw_rounds: list[Figures] = []
    names = {system.name for system in plan.systems}
    systems = [one for one in plan.systems if not (work.constant and WITHOUT_NETWORK.get(one.name) in names)]
    rounds: dict[str, list[Figures]] = {system.name: [] for system in systems}
    not_measured: dict[str, str] = {}
    up: dict[str, Server] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs")))  # short: sockets are made in it
        expected = scratch / "expected.npy"
        raw = stack.enter_context(raw_loop(work, expected, plan.server_cores))
        client = stack.enter_context(load_client(plan.client_cores))
        for system in systems:
            if system.name not in pythons:
                not_measured[system.name] = peers[system.name]["not_measured"]
            else:
                say(f"{work.name}: {system.name} starts")
                server = Server(system, work, pythons[system.name], scratch, plan.server_cores)
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
                    raw_rounds.append(_measure_raw(raw, plan))
                elif up[name].process is not None:
                    ceiling = max(batch["images_per_second"] for batch in raw_rounds[0]["encoded"].values())
                    try:
                        rounds[name].append(_measure_server(up[name], client, expected, plan, ceiling, turn))
                    except Unavailable as error:
                        not_measured[name] = str(error)
                        up[name].stop()
        facts = {
            name: {"ready_s": server.ready_s, "tuned_s": server.tuned_s or None, "backend": server.facts.get("backend")}
            for name, server in up.items()
        }
    return {
        "name": work.name,
        "size": work.size,
        "steps": work.steps,
        "constant": work.constant,
        "model": work.folder.name,
        "raw": {kind: _summarise_raw([one[kind] for one in raw_rounds]) for kind in ("forward", "encoded")},
        "systems": {
            name: {"not_measured": not_measured[name]}
            if name in not_measured
            else facts[name] | _summarise_server(rounds[name])
            for name in rounds
        },
    }


def _measure_raw(raw: JsonProcess, plan: Plan) -> Figures:
    """Time the raw loop with and without encoding, at powers of two and at the largest batch."""
    sizes = sorted({*(1 << i for i in range(plan.batch.bit_length())), plan.batch})
    return {
        kind: {n: raw.ask(do="time", batch=n, encode=kind == "encoded", seconds=plan.seconds) for n in sizes}
        for kind in ("forward", "encoded")
    }


def _measure_server(
    server: Server, client: JsonProcess, expected: Path, plan: Plan, ceiling: float, turn: int
) -> Figures:
    """Measure one round of one server, which runs only for it. Raises Unavailable if it has died.

    Args:
        ceiling: images a second of the raw loop with encoding, of which open loops ask a share.
    """
    server.resume()
    try:
        send_requests(client, server, expected)
        client.ask(do="closed", callers=4, seconds=WARM_S, warm_s=0)
        figures: Figures = {"closed": {}, "open": {}}
        # long enough for PICTURES at the pace of no server, within limits
        seconds = min(max(plan.seconds, PICTURES / ceiling), LONGEST * plan.seconds)
        cpu, served = cpu_seconds(server.pid), 0
        for callers in plan.callers:
            loop = client.ask(do="closed", callers=callers, seconds=seconds, warm_s=0.1)
            served += loop["served"]
            figures["closed"][callers] = loop
        figures["cpu_ms"] = 1e3 * (cpu_seconds(server.pid) - cpu) / served if served else None
        for load in plan.loads if not server.workload.constant else ():
            phases = [(ceiling * load / 100, 2 * seconds)]
            figures["open"][load] = client.ask(do="open", phases=phases, seed=turn)
            server.wait_until_idle()
        first = server.workload.folder == plan.folders[0] and not server.workload.constant
        if plan.burst and first and turn == plan.rounds - 1:
            phases = [(ceiling * load, seconds) for load, seconds in zip(BURST_LOAD, BURST, strict=True)]
            figures["burst"] = client.ask(do="open", phases=phases, seed=turn)
            if server.wait_until_idle() and figures["cpu_ms"]:
                cpu = cpu_seconds(server.pid)
                client.ask(do="abandon", callers=LEAVE)
                server.wait_until_idle()
                figures["wasted"] = 1e3 * (cpu_seconds(server.pid) - cpu) / figures["cpu_ms"]
        figures["rss_mb"] = rss_mb(server.pid)
        if server.process is None or server.process.poll() is not None:
            raise Unavailable(f"ended during the measurement; its log ends with: {server.last_line()}")
        return figures
    finally:
        server.pause()


def send_requests(client: JsonProcess, server: Server, expected: Path) -> None:
    """Give the client a server's port, its requests, and the pictures that are to come back."""
    requests = [request(server.system, server.workload, order) for order in server.workload.orders]
    may_tune = server.system.ours and server.system.variables.get("FEWSTEP_TUNE_SECONDS") != "0"
    client.ask(
        do="pool",
        requests=[base64.b64encode(one).decode() for one in requests],
        expected=str(expected),
        port=server.port,
        answer=server.system.answer,
        tolerance=TUNED if may_tune else EXACT,
    )


# --- medians and quartiles of rounds


def _summarise_raw(rounds: Sequence[Mapping[int, Any]]) -> Figures:
    """Summarise the raw loop by batch size, and name the size that gives most images."""
    batches = {
        size: {
            name: quartiles(one[size][name] for one in rounds) for name in ("images_per_second", "pass_ms", "cpu_ms")
        }
        for size in rounds[0]
    }
    most = _fastest(batches)
    return {"batches": batches, "best_batch": most, "best": batches[most]["images_per_second"]}


def _summarise_server(rounds: Sequence[Figures]) -> Figures:
    """Summarise the rounds of one system."""
    closed = {callers: _summarise_loop([one["closed"][callers] for one in rounds]) for callers in rounds[0]["closed"]}
    opened = {load: _summarise_loop([one["open"][load] for one in rounds]) for load in rounds[0]["open"]}
    loops = [loop for one in rounds for kind in ("closed", "open") for loop in one[kind].values()]
    loops += [one["burst"] for one in rounds if "burst" in one]
    most = _fastest(closed)
    return {
        "closed": closed,
        "open": opened,
        "best_callers": most,
        "best": closed[most]["images_per_second"],
        "burst": rounds[-1].get("burst"),
        "wasted": rounds[-1].get("wasted"),
        "cpu_ms": quartiles(one["cpu_ms"] for one in rounds),
        "rss_mb": quartiles(one["rss_mb"] for one in rounds),
        "bytes": max(loop["bytes"] for loop in loops),
        "gate": {
            "checked": sum(loop["served"] for loop in loops),
            "wrong": sum(loop["wrong"] for loop in loops),
            "max_difference": max((loop["max_difference"] or 0 for loop in loops), default=None),
        },
    }


def _summarise_loop(rounds: Sequence[Figures]) -> Figures:
    """Summarise one loop of one system."""
    failed = sum((Counter(one["failed"]) for one in rounds), Counter[str]())
    names = rounds[0]["latency_ms"] or {}
    return {
        "images_per_second": quartiles(one["images_per_second"] for one in rounds),
        "latency_ms": {name: quartiles((one["latency_ms"] or {}).get(name) for one in rounds) for name in names},
        "sent_late_ms_p99": quartiles(one["sent_late_ms_p99"] for one in rounds),
        "asked": sum(one["asked"] for one in rounds),
        "failed": dict(failed),
    }


def _fastest(rates: Mapping[int, Mapping[str, Any]]) -> int:
    """Return the key whose median of images a second is the largest."""
    return max(rates, key=lambda key: rates[key]["images_per_second"]["median"])


# --- for hours


def soak(plan: Plan, minutes: float, load: int, say: Say = lambda _: None) -> Figures:
    """Keep the plan's first system at work on its first folder: latency of every minute, memory of every second.

    Memory is flat if the line through its second half rises by less than 1 % an hour, or by less than 2 MB in all.

    Args:
        load: percent of what the server can give.

    Raises:
        BadInput: less than 0.1 or more than 10000 minutes, a load outside 1 to 200.
        Unavailable: the server cannot be installed or started.
    """
    if not 0.1 <= minutes <= 10_000 or not 1 <= load <= 200:
        raise BadInput("minutes, load", (minutes, load), "0.1 to 10000 minutes at 1 to 200 percent")
    system, work = plan.systems[0], plan.workloads()[-1]
    python = install(system, plan.environments)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs")))
        expected = scratch / "expected.npy"
        with raw_loop(work, expected, plan.server_cores):
            pass
        client = stack.enter_context(load_client(plan.client_cores))
        server = Server(system, work, python, scratch, plan.server_cores)
        stack.callback(server.stop)
        server.start()
        send_requests(client, server, expected)
        client.ask(do="closed", callers=FULL, seconds=10, warm_s=0)  # once full: a later crowd takes no more memory
        capacity = client.ask(do="closed", callers=16, seconds=3, warm_s=0.2)["images_per_second"]
        rate, began = capacity * load / 100, time.perf_counter()
        memory, parts = list[tuple[float, float]](), list[Figures]()
        while (left := minutes * 60 - (time.perf_counter() - began)) > 1:
            client.send(do="open", phases=[(rate, min(60.0, left))], seed=len(parts))
            while not client.ready(1.0):
                memory.append((time.perf_counter() - began, rss_mb(server.pid)))
            parts.append(client.receive())
            p50, p99 = (parts[-1]["latency_ms"][name] for name in ("p50", "p99"))
            say(f"minute {len(parts)}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {memory[-1][1]:.1f} MB")
        alive = server.process is not None and server.process.poll() is None
        backend = server.facts.get("backend")
    samples = [round(mb, 2) for _, mb in memory[:: max(1, len(memory) // 600)]]
    return {
        "setting": setting(plan.device),
        "model": work.name,
        "system": system.title,
        "steps": work.steps,
        "backend": backend,
        "pinned": plan.pinned,
        "load": load,
        "asked_minutes": minutes,
        "capacity": capacity,
        "rate": rate,
        "minutes": parts,
        "alive": alive,
        "memory": {**memory_trend(memory), "samples_mb": samples},
    }


def memory_trend(memory: Sequence[tuple[float, float]]) -> Figures:
    """Fit a line to the second half of (seconds, MB): its rise, and whether it is flat."""
    half = np.array(memory[len(memory) // 2 :])
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) if len(half) > 2 else 0.0
    rise = slope * float(half[-1, 0] - half[0, 0])
    level = float(np.median(half[:, 1]))
    return {
        "start_mb": memory[0][1],
        "median_mb": level,
        "highest_mb": max(mb for _, mb in memory),
        "mb_per_hour": 3600 * slope,
        "rise_mb": rise,
        "flat": 3600 * slope < 0.01 * level or rise < 2.0,
    }
