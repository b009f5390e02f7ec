"""A real service in a subprocess, on a loopback port of its own; stopped by its process id."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar

from tests.support.fork_server import ROOT, ForkServer, Process


class Server:
    """`with Server("--model", folder) as server:` is a service that answers.

    *module* is what Python runs: the service itself or the scripted one. Settings are given without
    their prefix: `queue_images=4`.
    """

    fork_server: ClassVar[ForkServer | None] = None
    """Where all but the service itself are forked, which saves the second of a start."""

    program: Path | None = None
    """A `klein` that was installed elsewhere, to be run in the place of *module*."""

    def __init__(self, *arguments: str, module: str = "app", **settings: object) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")}
        environ |= {f"KLEIN_{key.upper()}": str(value) for key, value in settings.items()}
        environ.setdefault("KLEIN_PORT", "0")
        environ["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS", "2")
        self.process: Process
        output: IO[str]
        if module != "app" and self.fork_server is not None:
            forked = self.fork_server.fork(module, arguments, environ)
            self.process, output = forked, os.fdopen(forked.output)
        else:
            subcommand = ["serve"] if module == "app" else []
            run = [str(self.program)] if self.program else [sys.executable, "-m", module]
            started = subprocess.Popen(
                [*run, *subcommand, *arguments],
                # From a folder of its own an installed one finds nothing of this checkout.
                cwd=self.program.parent if self.program else ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert started.stdout is not None
            self.process, output = started, started.stdout
        self._output = output
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self.process.kill()
            self.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All that the process has printed."""
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        """The service's address, once it listens."""
        return self.wait_for(r"Listening at (\S+) ").group(1)

    def wait_for(self, pattern: str, *, timeout_s: float = 120.0) -> re.Match[str]:
        """Wait for a line that matches *pattern*."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self.lines:
                    if found := re.search(pattern, line):
                        return found
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    raise AssertionError(f"no line matched {pattern!r} in:\n{self.log}")
                self._changed.wait(min(left, 1.0))

    def wait_until_ready(self, *, timeout_s: float = 120.0) -> None:
        """Wait for the line that says so."""
        self.wait_for(r"Ready at", timeout_s=timeout_s)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """GET *path*: status, headers (lower case), body."""
        return self.request("GET", path, None, **headers)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """POST *body* as JSON: status, headers (lower case), body."""
        headers.setdefault("content-type", "application/json")
        return self.request("POST", path, json.dumps(body).encode(), **headers)

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request; underscores in header names stand for dashes."""
        request = urllib.request.Request(
            self.url + path,
            data=body,
            method=method,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return (
                    answer.status,
                    {k.lower(): v for k, v in answer.headers.items()},
                    answer.read(),
                )
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a scrape's samples that have these labels; 0 where there is none."""
        text = self.get("/metrics")[2].decode()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if re.match(rf"{name}[{{ ]", line)
            and all(f'{key}="{value}"' in line for key, value in labels.items())
        )

    def worker_pid(self) -> int:
        """The process id of the only worker."""
        (pid,) = self.worker_pids()
        return pid

    def worker_pids(self) -> list[int]:
        """The process ids of the workers: spawned, or forked from the fork server."""
        import psutil

        pids: list[int] = []
        for child in psutil.Process(self.process.pid).children():
            # One may end meanwhile.
            with contextlib.suppress(psutil.Error):
                command = " ".join(child.cmdline())
                if "spawn_main" in command:
                    pids.append(child.pid)
                elif "multiprocessing.forkserver" in command:
                    pids += [each.pid for each in child.children()]
        return pids

    def stop(self, *, timeout_s: float = 60.0) -> int:
        """SIGTERM, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s)

    def wait(self, *, timeout_s: float = 60.0) -> int:
        """Wait for the process to end and return the exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop:\n{self.log}") from None
        finally:
            self._reader.join(5)
            self._output.close()
        return code

    def _read(self) -> None:
        for line in self._output:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()
