"""The two services that are compared: each a process of its own, asked through its own HTTP.

ComfyUI says over a websocket when a picture is done, or to who asks for its history. The second
needs no further library and is what is used here. ComfyUI is left alone for four fifths of its
quickest picture and then asked every `POLL_S`, so its seconds are too long by at most that and one
answer. Its own clock, from its first node to its last, stands in the row's `stages` beside them.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.bench_http import read_timings
from benchmarks.comfyui import workflow

_ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.005
_START_S = 600.0
"""Patience for a first start, which compiles, and for a first picture, which loads."""


@dataclass(frozen=True)
class Picture:
    """A PNG, the seconds from the first byte sent to its last read, and those of its stages."""

    body: bytes
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


class Service(ABC):
    """A server in a process of its own; `with` starts it, waits until it is ready, and ends it."""

    row = ""
    ready_path = ""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_S)

    @abstractmethod
    def ask(self, prompt: str, side: int, seed: int) -> Picture:
        """Have one square picture made, and wait for it."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Say for the row what it is and how it is set up; asked while it runs."""

    @abstractmethod
    def _start(self, output: int) -> subprocess.Popen[bytes]:
        """Start the process, its output to a file's descriptor."""

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = self._start(log.fileno())
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def request(self, method: str, path: str, body: object = None) -> tuple[bytes, dict[str, str]]:
        """Send JSON over the kept connection, and return the answer's body and headers.

        Raises:
            RuntimeError: the answer is no 200; what it says.
        """
        headers = {} if body is None else {"content-type": "application/json"}
        sent = None if body is None else json.dumps(body)
        self._connection.request(method, path, sent, headers)
        answer = self._connection.getresponse()
        read = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status}: {read[:2000].decode()}")
        return read, {key.lower(): value for key, value in answer.getheaders()}

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                last = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{self.row} did not start, exit code {code}:\n{last}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            self.request("GET", self.ready_path)
        except (OSError, RuntimeError, http.client.HTTPException):
            self._connection.close()
            return False
        return True

    def _stop(self) -> None:
        self._connection.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Klein(Service):
    """This service, with the settings of the environment but for what is given here."""

    row = "klein.http"
    ready_path = "/health/ready"

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        super().__init__(folder)
        own = {"port": self.port, "log_level": "warning"} | dict(settings)
        self.environ = os.environ | {f"KLEIN_{key.upper()}": str(own[key]) for key in own}
        self._reserved = 0

    def ask(self, prompt: str, side: int, seed: int) -> Picture:
        """Have one square picture made, and wait for it."""
        body = {"prompt": prompt, "width": side, "height": side, "seed": seed}
        begun = time.perf_counter()
        picture, headers = self.request("POST", "/generate", body | {"num_inference_steps": 4})
        seconds = time.perf_counter() - begun
        self._reserved = int(headers.get("x-klein-peak-vram-bytes") or 0)
        found = read_timings(headers.get("server-timing", ""))
        return Picture(picture, seconds, {stage: ms / 1000 for stage, ms in found.items()})

    def facts(self) -> dict[str, Any]:
        """Say the precision and the memory plan."""
        worker = json.loads(self.request("GET", "/health")[0])["worker"]
        known = {key: worker[key] for key in ("precision", "plan")}
        return known | {"peak_reserved_bytes": self._reserved or None}

    def _start(self, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            cwd=_ROOT,
            env=self.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class Comfy(Service):
    """ComfyUI's own server, from a checkout, without its web page and without what others add."""

    row = "comfyui.http"
    ready_path = "/system_stats"

    def __init__(
        self,
        folder: Path,
        checkout: Path,
        models: Path,
        python: str = sys.executable,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._checkout = checkout
        self._models = models
        self._python = python
        self._arguments = list(arguments)
        self._quickest_s = 0.0

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._check_nodes()
        except BaseException:
            self._stop()
            raise
        return self

    def ask(self, prompt: str, side: int, seed: int) -> Picture:
        """Have one square picture made, wait for it, and fetch the PNG that it has saved."""
        graph = workflow.klein(prompt, side, seed)
        begun = time.perf_counter()
        number = json.loads(self.request("POST", "/prompt", {"prompt": graph})[0])["prompt_id"]
        time.sleep(0.8 * self._quickest_s)
        done = self._done(number)
        image = done["outputs"]["save"]["images"][0]
        asked = {key: image[key] for key in ("filename", "subfolder", "type")}
        body, _ = self.request("GET", f"/view?{urllib.parse.urlencode(asked)}")
        seconds = time.perf_counter() - begun
        told = {name: facts["timestamp"] for name, facts in done["status"]["messages"]}
        own_s = (told["execution_success"] - told["execution_start"]) / 1000
        self._quickest_s = min(own_s, self._quickest_s or own_s)
        return Picture(body, seconds, {"execution": own_s})

    def facts(self) -> dict[str, Any]:
        """Say the versions of ComfyUI and its torch, the commit and the arguments."""
        system = json.loads(self.request("GET", "/system_stats")[0])["system"]
        found = {
            "version": system.get("comfyui_version"),
            "torch": system.get("pytorch_version"),
            "commit": _commit(self._checkout),
            "arguments": self._arguments,
        }
        return {"comfyui": found}

    def _done(self, number: str) -> dict[str, Any]:
        """Wait for the end of a picture's entry in the history.

        Raises:
            RuntimeError: it failed, with what ComfyUI says of it, or the server has ended.
        """
        while number not in (found := json.loads(self.request("GET", f"/history/{number}")[0])):
            time.sleep(POLL_S)
        done: dict[str, Any] = found[number]
        if done["status"]["status_str"] != "success":
            said: dict[str, Any] = dict(done["status"]["messages"]).get("execution_error", {})
            raise RuntimeError(
                f"ComfyUI made no picture, in {said.get('node_type')}: "
                f"{said.get('exception_type')}: {said.get('exception_message', '')[:500]}"
            )
        return done

    def _check_nodes(self) -> None:
        kinds = {node["class_type"] for node in workflow.klein("", 64, 0).values()}
        known = json.loads(self.request("GET", "/object_info")[0])
        if missing := sorted(kinds - set(known)):
            version = self.facts()["comfyui"]["version"]
            raise RuntimeError(f"ComfyUI {version} is too old: it has no {', '.join(missing)}")

    def _start(self, output: int) -> subprocess.Popen[bytes]:
        own = {name: self._folder / name for name in ("page", "output", "temp", "input", "user")}
        for path in own.values():
            path.mkdir(exist_ok=True)
        # JSON is YAML. The models stay where they are, whatever is in the checkout's own folder.
        models = self._folder / "models.yaml"
        models.write_text(
            json.dumps(
                {"klein": {"base_path": str(self._models), **{k: k for k in workflow.FILES}}}
            )
        )
        command = [self._python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--front-end-root", str(own.pop("page")), "--disable-auto-launch"]
        for name, path in own.items():
            command += [f"--{name}-directory", str(path)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-all-custom-nodes"]
        command += ["--extra-model-paths-config", str(models), *self._arguments]
        return subprocess.Popen(
            command, cwd=self._checkout, stdout=output, stderr=subprocess.STDOUT
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _commit(checkout: Path) -> str | None:
    """Say the checkout's commit; None where it is no repository of git."""
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
