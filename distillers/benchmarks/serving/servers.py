"""The servers that are held beside each other: how each is installed, started, asked, paused and measured from outside.

A peer lives in an environment of its own, made by pip with a pinned version; this project's packages are appended to
its path, so torch, weights and codec are the same for all. All servers of a workload are up at once; those whose turn
it is not are stopped (SIGSTOP) and take no processor time. Linux only: processes are pinned and read in /proc.
"""

from __future__ import annotations

import base64
import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from distillers.errors import BadInput

PEERS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[3]  # of both packages: the repository, or site-packages
START_S, REFUSED_S, STOP_S, TUNE_S, SETTLE_S = 120.0, 20.0, 15.0, 240.0, 60.0
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Unavailable(Exception):
    """A peer that cannot be installed or started: it is not measured, and the report says why."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One server in one configuration."""

    name: str
    title: str
    command: tuple[str, ...]  # after the environment's Python; {port} is filled in
    environment: str = ""  # a folder's name; empty: our own
    packages: tuple[str, ...] = ()  # for pip, pinned
    variables: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)  # to its script
    ours: bool = False
    takes: str = "bytes"  # a SAR picture: its bytes as the body, or base64 in JSON ("json")
    answer: str = "bytes"  # a PNG, or a JSON "list" of one base64 text


UVICORN = ("-m", "uvicorn", "--factory", "app.main:create_app", "--host", "127.0.0.1", "--port", "{port}")
QUIET = ("--no-access-log", "--log-level", "warning", "--timeout-keep-alive", "75")  # as `fewstep serve`
FASTAPI = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")
RAY = {"RAY_USAGE_STATS_ENABLED": "0"}
RAY_FAST = {**RAY, "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}

SYSTEMS = [
    System(
        name="fewstep-eager", title="fewstep, eager", command=UVICORN + QUIET, ours=True,
        variables={"FEWSTEP_TUNE_SECONDS": "0"},
    ),
    System(name="fewstep", title="fewstep", command=UVICORN + QUIET, ours=True),
    System(
        name="fastapi", title="FastAPI, inline", command=("naive.py",), environment="fastapi", packages=FASTAPI,
    ),
    System(
        name="fastapi-pillow", title="FastAPI, inline, Pillow's PNG", command=("naive.py",), environment="fastapi",
        packages=FASTAPI, told={"codec": "pillow"},
    ),
    System(
        name="diffusers", title="FastAPI, inline, stock diffusers", command=("naive.py",), environment="fastapi",
        packages=FASTAPI, told={"stock": True},
    ),
    System(
        name="litserve", title="LitServe, no wait", command=("lit.py",), environment="litserve",
        packages=("litserve==0.2.19",), told={"wait_s": 0.0}, takes="json",
    ),
    System(
        name="litserve-5ms", title="LitServe, 5 ms", command=("lit.py",), environment="litserve",
        packages=("litserve==0.2.19",), told={"wait_s": 0.005}, takes="json",
    ),
    System(
        name="bentoml", title="BentoML",
        command=("-m", "bentoml", "serve", "bento:Pictures", "--host", "127.0.0.1", "--port", "{port}"),
        environment="bentoml", packages=("bentoml==1.4.39",), takes="json", answer="list",
        variables={"BENTOML_DO_NOT_TRACK": "true"},
    ),
    System(
        name="rayserve", title="Ray Serve", command=("rayserve.py",), environment="rayserve",
        packages=("ray[serve]==2.60.0",), variables=RAY,
    ),
    System(
        name="rayserve-haproxy", title="Ray Serve, high throughput (HAProxy)", command=("rayserve.py",),
        environment="rayserve", packages=("ray[serve]==2.60.0",), variables=RAY_FAST,
    ),
]  # fmt: skip


def chosen(names: Iterable[str] | None) -> list[System]:
    """Systems by name, in the order of SYSTEMS; all of them for None."""
    known = [system.name for system in SYSTEMS]
    names = known if names is None else list(names)
    for name in names:
        if name not in known:
            raise BadInput("systems", name, ", ".join(known))
    return [system for system in SYSTEMS if system.name in names]


# --- the environment


def install(system: System, place: Path) -> Path:
    """The Python of a system's environment below `place`, made when it is not there. Unavailable with pip's words."""
    if not system.environment:
        return Path(sys.executable)
    folder = place.absolute() / system.environment
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps([*system.packages, sys.version, str(ROOT)])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *system.packages]
    for command in ([sys.executable, "-m", "venv", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).strip().splitlines() if line]
            raise Unavailable(f"cannot be installed: {(lines or ['no word'])[-1]}")
    # After pip: what it installed comes first, and everything else is found here.
    libraries = next((folder / "lib").glob("python*/site-packages"))
    ours = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT)])
    (libraries / "fewstep.pth").write_text("\n".join(ours) + "\n")
    stamp.write_text(wanted)
    return python


def versions(system: System, python: Path) -> dict[str, str]:
    """Installed versions of what was pinned."""
    names = [package.partition("==")[0].partition("[")[0] for package in system.packages]
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


# --- processes


@contextmanager
def cores(numbers: Sequence[int] | None) -> Iterator[None]:
    """Processes started inside run on these processors; None leaves it to the system."""
    if numbers is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, numbers)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment_of(threads: int, told: Mapping[str, Any], **more: str) -> dict[str, str]:
    """Variables for a process that computes: threads that yield, and no more of them than it has processors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEWSTEP_", "PYTHON"))}
    openmp = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return {**kept, **openmp, "FEWSTEP_BENCHMARK": json.dumps(dict(told)), **more}


class Talker:
    """A process of our own that takes commands as JSON lines and answers each with one."""

    def __init__(self, command: Sequence[str], on: Sequence[int] | None, environment: dict[str, str]) -> None:
        with cores(on):
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )

    def send(self, **command: Any) -> None:
        """Does not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        return dict(json.loads(line))

    def ready(self, seconds: float) -> bool:
        """Whether there is an answer, after so long at most."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends and waits."""
        self.send(**command)
        return self.receive()

    def close(self) -> None:
        """At the end of its input it ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def tree(root: int) -> list[int]:
    """A process and all that descend from it and live."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """Of the tree, and of its children that have ended and were waited for."""
    return sum(sum(map(int, fields[11:15])) for pid in tree(root) if (fields := _stat(pid))) / TICKS


def rss_mb(root: int) -> float:
    """Resident memory of the tree in MB, what it shares counted once for each that shares it."""
    pages = 0
    for pid in tree(root):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: 1 is the parent, 11 to 14 the ticks; empty for who has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


# --- a server


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every server is to do. `files` are SAR pictures, for a translator."""

    name: str
    folder: Path
    steps: int
    size: tuple[int, int]
    orders: tuple[Mapping[str, Any], ...]  # {"seed", "label"?, "prompt"?, "bands"?, "file"?}
    constant: bool = False  # a picture instead of the forward pass
    device: str = "cpu"
    dtype: str = "float32"  # of torch, for the raw loop and the peers; ours chooses
    batch: int = 16  # pictures in a forward pass at most, for every server that batches

    def told(self, port: int = 0, **more: Any) -> dict[str, Any]:
        """To a script in peers/."""
        return {
            "folder": str(self.folder.absolute()), "steps": self.steps, "size": self.size, "constant": self.constant,
            "device": self.device, "dtype": self.dtype, "batch": self.batch, "codec": "project", "port": port, **more,
        }  # fmt: skip


def request(system: System, workload: Workload, order: Mapping[str, Any]) -> bytes:
    """The HTTP request for one picture, ready to be sent."""
    body: dict[str, Any] = {name: order[name] for name in ("seed", "label", "prompt", "bands") if name in order}
    picture = Path(order["file"]).read_bytes() if "file" in order else None
    path, kind = "/draw", "application/json"
    if system.ours:
        path = "/v1/images/translations" if picture else "/v1/images/generations"
        body |= {"model": workload.folder.name, "steps": workload.steps}
    if picture is not None and system.takes == "bytes":
        path += "?" + "&".join(f"{name}={value}" for name, value in body.items())
        data, kind = picture, "image/png"
    else:
        if picture is not None:
            body["image"] = base64.b64encode(picture).decode()
        data = json.dumps({"orders": [body]} if system.answer == "list" else body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: image/png, application/json\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Server:
    """A system at work on a workload, from `start` to `stop`."""

    def __init__(
        self, system: System, workload: Workload, python: Path, scratch: Path, on: Sequence[int] | None
    ) -> None:
        self.system, self.workload, self.python, self.on = system, workload, python, on
        self.scratch = scratch / f"{system.name[:12]}"
        self.port = free_port()
        self.ready_s = self.tuned_s = 0.0
        self.idle = 0.0  # processor seconds in a second in which it is asked nothing
        self.facts: dict[str, Any] = {}  # what /v1/models says of ours
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the root of its tree."""
        assert self.process is not None
        return self.process.pid

    @property
    def command(self) -> list[str]:
        """As it is started."""
        words = [word.format(port=self.port) for word in self.system.command]
        if self.system.ours and self.workload.constant:
            words = ["constant.py"]
        if words[0].endswith(".py"):
            words[0] = str(PEERS / words[0])
        return [str(self.python), *words]

    def start(self) -> None:
        """Until it has drawn its first picture, and ours has chosen its backend. Unavailable with its last words."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        variables = {"TMPDIR": str(self.scratch), "BENTOML_HOME": str(self.scratch), **self.system.variables}
        if self.system.ours:  # a copy: what an earlier measurement of backends has left beside the weights is not taken
            shutil.copytree(
                self.workload.folder, self.scratch / "weights" / self.workload.folder.name,
                ignore=shutil.ignore_patterns("profile.json", "training"),
            )  # fmt: skip
            variables |= {
                "FEWSTEP_WEIGHTS": str(self.scratch / "weights"), "FEWSTEP_DEVICE": self.workload.device,
                "FEWSTEP_MAX_BATCH": str(self.workload.batch), "PYTHONPATH": str(ROOT),
                "FEWSTEP_MAX_PIXELS": str(max(1 << 20, self.workload.batch * math.prod(self.workload.size))),
                "FEWSTEP_LOG_LEVEL": "warning",  # nobody writes a line for every request here
            }  # fmt: skip
            if self.workload.constant:
                variables["FEWSTEP_TUNE_SECONDS"] = "0"
        told = self.workload.told(self.port, **self.system.told)
        threads = len(self.on if self.on is not None else os.sched_getaffinity(0))
        where = PEERS if "bentoml" in self.system.command else self.scratch
        started = time.perf_counter()
        with cores(self.on), open(self.scratch / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.command, env=environment_of(threads, told, **variables), cwd=where, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        first = request(self.system, self.workload, self.workload.orders[0])
        end = started + START_S
        while (word := self._first(first)) != "200":
            if word and not word.startswith("503"):  # a server that is up, and will hardly change its mind
                end = min(end, time.perf_counter() + REFUSED_S)
            if self.process.poll() is not None or time.perf_counter() > end:
                last = self.last_words()
                self.stop()
                raise Unavailable(f"did not start: {word or 'no answer'}; its log ends with: {last}")
            time.sleep(0.05)
        self.ready_s = time.perf_counter() - started
        if self.system.ours:
            self._tune(started)
        before = cpu_seconds(self.pid)
        time.sleep(1)
        self.idle = cpu_seconds(self.pid) - before

    def _first(self, data: bytes) -> str:
        """Asks once, on a connection of its own: the status, with the answer's words if it is none; "" without one."""
        head, _, body = data.partition(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        connection = HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            return str(answer.status) if answer.status == 200 else f"{answer.status} {text[:200]!r}"
        except (OSError, HTTPException):
            return ""
        finally:
            connection.close()

    def _tune(self, started: float) -> None:
        """Until the backend is chosen by measurement, if this server says so."""
        while time.perf_counter() < started + TUNE_S:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=START_S)
            connection.request("GET", f"/v1/models/{self.workload.folder.name}")
            self.facts = json.loads(connection.getresponse().read())
            connection.close()
            if not (self.facts.get("backend") or {}).get("tuning"):
                break
            time.sleep(0.2)
        self.tuned_s = time.perf_counter() - started

    def pause(self) -> None:
        """Takes no processor time until `go`."""
        for pid in tree(self.pid):
            _signal(pid, signal.SIGSTOP)

    def go(self) -> None:
        """Again."""
        for pid in reversed(tree(self.pid)):
            _signal(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Asks the root to end, and ends what is left."""
        if self.process is None:
            return
        self.go()
        everyone = tree(self.pid)
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in everyone[1:]:
            _signal(pid, signal.SIGKILL)
        self.process = None

    def settle(self) -> bool:
        """Waits until it has done what nobody waits for any more; False if it works on for SETTLE_S."""
        end, before = time.perf_counter() + SETTLE_S, cpu_seconds(self.pid)
        while time.perf_counter() < end:
            time.sleep(0.2)
            now = cpu_seconds(self.pid)
            if now - before < 0.06 + 0.4 * self.idle:  # twice what it takes for nothing: some are never quite idle
                return True
            before = now
        return False

    def last_words(self) -> str:
        """The last line of its log."""
        lines = (self.scratch / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it said nothing"


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
