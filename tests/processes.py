"""Start Python programs in processes of their own that need not import torch and diffusers again: five seconds each.

A nursery imports them once. A program is forked from it and then runs as `python ARGUMENTS` does: with its own
arguments, environment, folder, streams, signals and exit code, and without the modules of this project, which it
imports itself. What a process does before torch is imported is tested with `subprocess` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from types import ModuleType
from typing import Any

PRELOADED = (
    "torch._dynamo", "diffusers.models.unets.unet_2d", "diffusers.models.transformers", "diffusers.loaders.peft",
    "transformers", "accelerate", "peft", "scipy.stats", "safetensors.torch", "PIL.Image",
    "fastapi", "uvicorn", "httpx", "prometheus_client", "typer", "rich",
)  # fmt: skip
NUMBER = 10  # bytes of a number that the nursery sends


class Popen(subprocess.Popen):
    """`subprocess.Popen` for a command that begins with `sys.executable`."""

    def _execute_child(self, args: list[str], *given: Any) -> None:
        _, preexec, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_ = given
        assert args[0] == sys.executable and preexec is None
        told = {"arguments": args[1:], "env": dict(os.environ if env is None else env), "cwd": str(cwd or os.getcwd())}
        streams = [number if fd == -1 else fd for number, fd in enumerate((p2cread, c2pwrite, errwrite))]
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.connect(nursery())
        socket.send_fds(self.channel, [b" "], streams)
        with self.channel.makefile("w") as file:
            file.write(json.dumps(told) + "\n")
        self.pid = int(self.channel.recv(NUMBER, socket.MSG_WAITALL))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """Learn the exit status from the nursery, whose child it is, as `os.waitpid` would tell it."""
        if not select.select([self.channel], [], [], 0 if flags & os.WNOHANG else None)[0]:
            return 0, 0
        with self.channel:
            return self.pid, int(self.channel.recv(NUMBER, socket.MSG_WAITALL) or 0xFF00)  # the nursery has died

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def run(command: list[str], *, timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text, for a command that begins with `sys.executable`."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(command, **pipes, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@cache
def nursery() -> str:
    """Start the nursery; the address that it listens at. It ends when this process has ended."""
    folder = tempfile.TemporaryDirectory(prefix="nursery")
    address = os.path.join(folder.name, "socket")
    process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return address


def tend(address: str) -> list[str]:
    """Fork a program for each connection and report how it ended; returns its arguments in the forked process."""
    for module in PRELOADED:
        importlib.import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    os.write(1, b"ready\n")
    channels: dict[int, socket.socket] = {}  # by the program's process id
    while True:
        ready = select.select([0, listener, ended], [], [])[0]
        if 0 in ready:
            os._exit(0)
        if ended in ready:
            os.read(ended, 1000)
            for pid in list(channels):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    with channels.pop(pid) as channel, contextlib.suppress(OSError):  # perhaps nobody waits for it
                        channel.sendall(b"%*d" % (NUMBER, status))
        if listener in ready:
            channel, _ = listener.accept()
            streams = socket.recv_fds(channel, 1, 3)[1]
            with channel.makefile("r") as file:
                told = json.loads(file.readline())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
                for number, fd in enumerate(streams):
                    os.dup2(fd, number)
                os.closerange(3, 1 << 16)
                os.environ.clear()
                os.environ.update(told["env"])
                os.chdir(told["cwd"])
                arguments: list[str] = told["arguments"]
                return arguments
            for fd in streams:
                os.close(fd)
            channels[pid] = channel
            channel.sendall(b"%*d" % (NUMBER, pid))


def become(arguments: list[str]) -> None:
    """Run what `python ARGUMENTS` runs, as from a terminal: tests that nohup runs ignore its end."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    kind, name, sys.argv = arguments[0], arguments[1] if len(arguments) > 1 else "", arguments[1:]
    sys.path[0] = os.getcwd()
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0], main = "-c", ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(name, "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    become(tend(sys.argv[1]))
