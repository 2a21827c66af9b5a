"""Install, start, pause, stop and observe the servers of the serving benchmark, and the processes beside them.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from distillers.benchmarks.serving.plan import System, Workload

PEERS = Path(__file__).parent / "peers"
ROOT = Path(__file__).parents[3]  # of both packages: the repository, or site-packages
START_S, REFUSED_S, STOP_S, TUNE_S, SETTLE_S = 120.0, 20.0, 15.0, 240.0, 60.0
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Unavailable(Exception):
    """Report a peer that cannot be installed or started: it is not measured, and the tables say why."""


# --- the environment


def install(system: System, place: Path) -> Path:
    """Make a system's environment below `place` where it is missing, and return its Python.

    Raises:
        Unavailable: pip failed, with its last words.
    """
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
    """Return the installed versions of the packages that a system pins."""
    names = [package.partition("==")[0].partition("[")[0] for package in system.packages]
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


# --- processes


@contextmanager
def run_on(numbers: Sequence[int] | None) -> Iterator[None]:
    """Run processes that are started inside the block on these processors; None leaves it to the system."""
    if numbers is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, numbers)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment_variables(threads: int, options: Mapping[str, Any], **more: str) -> dict[str, str]:
    """Return the variables of a process that computes: its options, and as many threads as it has processors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEWSTEP_", "PYTHON"))}
    openmp = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return {**kept, **openmp, "FEWSTEP_BENCHMARK": json.dumps(dict(options)), **more}


class JsonProcess:
    """Run a process of our own that takes commands as JSON lines and answers each with one; close it at the end."""

    def __init__(self, command: Sequence[str], on: Sequence[int] | None, environment: dict[str, str]) -> None:
        with run_on(on):
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )

    def send(self, **command: Any) -> None:
        """Send a command without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        return dict(json.loads(line))

    def ready(self, seconds: float) -> bool:
        """Wait so long at most for an answer, and say whether there is one."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(**command)
        return self.receive()

    def __enter__(self) -> JsonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process by closing its input; kill it if it does not end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def tree(root: int) -> list[int]:
    """Return the numbers of a process and of all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    pids = [root]
    for pid in pids:
        pids += children.get(pid, [])
    return pids


def cpu_seconds(root: int) -> float:
    """Return the processor seconds of a process tree, with those of children that have ended and were waited for."""
    return sum(sum(map(int, fields[11:15])) for pid in tree(root) if (fields := _stat(pid))) / TICKS


def rss_mb(root: int) -> float:
    """Return the resident memory of a process tree in MB; shared pages count for each process that shares them."""
    pages = 0
    for pid in tree(root):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _stat(pid: int) -> list[str]:
    """Read /proc/PID/stat from the state on: 1 is the parent, 11 to 14 are ticks; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


# --- a server


def request(system: System, workload: Workload, order: Mapping[str, Any]) -> bytes:
    """Write the HTTP request for one picture."""
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
    """Run a system on a workload, from `start` to `stop`."""

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
        """The number of the server's first process, from which all others descend."""
        assert self.process is not None
        return self.process.pid

    @property
    def command(self) -> list[str]:
        """The command line that starts the server."""
        words = [word.format(port=self.port) for word in self.system.command]
        if self.system.ours and self.workload.constant:
            words = ["constant.py"]
        if words[0].endswith(".py"):
            words[0] = str(PEERS / words[0])
        return [str(self.python), *words]

    def start(self) -> None:
        """Start the server and wait for its first picture, and for ours to choose its backend.

        Raises:
            Unavailable: it ended, or has drawn nothing in time, with the last line of its log.
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        variables = {"TMPDIR": str(self.scratch), "BENTOML_HOME": str(self.scratch), **self.system.variables}
        if self.system.ours:  # a copy: what an earlier measurement of backends has left beside the weights is not taken
            shutil.copytree(
                self.workload.folder,
                self.scratch / "weights" / self.workload.folder.name,
                ignore=shutil.ignore_patterns("profile.json", "training"),
            )
            variables |= {
                "FEWSTEP_WEIGHTS": str(self.scratch / "weights"),
                "FEWSTEP_DEVICE": self.workload.device,
                "FEWSTEP_MAX_BATCH": str(self.workload.batch),
                "PYTHONPATH": str(ROOT),
                "FEWSTEP_MAX_PIXELS": str(max(1 << 20, self.workload.batch * math.prod(self.workload.size))),
                "FEWSTEP_LOG_LEVEL": "warning",  # nobody writes a line for every request here
            }
            if self.workload.constant:
                variables["FEWSTEP_TUNE_SECONDS"] = "0"
        options = self.workload.script_options(self.port, **self.system.options)
        threads = len(self.on if self.on is not None else os.sched_getaffinity(0))
        where = PEERS if "bentoml" in self.system.command else self.scratch
        started = time.perf_counter()
        with run_on(self.on), open(self.scratch / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=environment_variables(threads, options, **variables),
                cwd=where,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        first = request(self.system, self.workload, self.workload.orders[0])
        end = started + START_S
        while (answer := self._ask(first)) != "200":
            if answer and not answer.startswith("503"):  # a server that is up, and will hardly change its mind
                end = min(end, time.perf_counter() + REFUSED_S)
            if self.process.poll() is not None or time.perf_counter() > end:
                last = self.last_line()
                self.stop()
                raise Unavailable(f"did not start: {answer or 'no answer'}; its log ends with: {last}")
            time.sleep(0.05)
        self.ready_s = time.perf_counter() - started
        if self.system.ours:
            self._tune(started)
        before = cpu_seconds(self.pid)
        time.sleep(1)
        self.idle = cpu_seconds(self.pid) - before

    def _ask(self, data: bytes) -> str:
        """Ask once and return the status, with the body's start unless it is 200; "" without an answer."""
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
        """Wait until our server has measured its backends and chosen one."""
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
        """Stop all processes of the server, so that they take no processor time until `resume`."""
        for pid in tree(self.pid):
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes of a paused server go on."""
        for pid in reversed(tree(self.pid)):
            _signal(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ask the server to end, and kill what is left of it."""
        if self.process is None:
            return
        self.resume()
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

    def wait_until_idle(self) -> bool:
        """Wait until the server has worked off its queue; return False if it is still busy after SETTLE_S."""
        end, before = time.perf_counter() + SETTLE_S, cpu_seconds(self.pid)
        while time.perf_counter() < end:
            time.sleep(0.2)
            now = cpu_seconds(self.pid)
            if now - before < 0.06 + 0.4 * self.idle:  # twice what it takes for nothing: some are never quite idle
                return True
            before = now
        return False

    def last_line(self) -> str:
        """Read the last line of the server's log."""
        lines = (self.scratch / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it said nothing"


def _signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def free_port() -> int:
    """Find a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
