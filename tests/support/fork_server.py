"""Forks scripted services from a process that has imported what all of them import.

A service that starts on its own spends a second of a core on its imports, and the tests start
dozens. Forked, it is a process of its own all the same: its module runs as `__main__`, with its own
environment, output, signals and children; only its imports are there before.

    python -m tests.support.fork_server 5

answers requests on the socket 5, until the other end closes.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Protocol

ROOT = Path(__file__).resolve().parents[2]

_REQUEST_BYTES = 1 << 18


class Process(Protocol):
    """What a test needs of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, if it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code, negative after a signal."""

    def send_signal(self, sig: int) -> None:
        """Send *sig*, unless it has ended."""

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""


class ForkServer:
    """The test's end; the process behind it starts with the first request."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, module: str, arguments: tuple[str, ...], environ: dict[str, str]) -> Forked:
        """Run *module* in a fork; `Forked.output` is what it prints."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        output, its_output = os.pipe()
        status, its_status = os.pipe()
        request = {"module": module, "arguments": arguments, "environ": environ}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [its_output, its_status])
        os.close(its_output)
        os.close(its_status)
        return Forked(output, status)

    def close(self) -> None:
        """End the process; services that run stay."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()
            self._connection = self._process = None

    def _start(self) -> None:
        self._connection, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.support.fork_server", str(its.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()])
        its.close()


class Forked:
    """A service that was forked."""

    def __init__(self, output: int, status: int) -> None:
        self.output = output
        self._status = os.fdopen(status, "r", buffering=1)
        self.pid = int(self._status.readline())
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code, negative after a signal."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"service {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """Send *sig*, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self._code is None and select.select([self._status], [], [], timeout_s)[0]:
            self._code = int(self._status.readline())
            self._status.close()
        return self._code


def main(connection: socket.socket) -> None:
    """Fork as asked, until nobody asks any more."""
    # Not the modules that are to run: what is imported already would not run anew.
    for name in ("app.cli.serve", "app.api.app", "app.api.server", "app.telemetry.gpu"):
        import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who watches a service is not waited for
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 2)
        if not data:
            return
        output, status = descriptors
        if os.fork() == 0:
            connection.close()
            _watch(status)
            _become(**json.loads(data), output=output)
        os.close(output)
        os.close(status)


def _watch(status: int) -> None:
    """Return in one more fork; tell its number and, when it has ended, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\n".encode())
    os._exit(0)


def _become(module: str, arguments: list[str], environ: dict[str, str], output: int) -> NoReturn:
    """Be *module*, as `python -m` would make it."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
