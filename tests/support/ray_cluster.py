"""A Ray cluster with Serve in HAProxy mode, in a network of its own that has only loopback.

Ray opens some twenty ports, some of them on every address whatever it is told; in a network
namespace nobody else can reach them, and they collide with nothing. The calling thread enters it as
well, so the tests ask and listen there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from tests.support.fork_server import ROOT

PYTHON = ROOT / ".venv" / "ray" / "bin" / "python"
"""What sees Ray; a benchmark may have it in its own environment."""
_PROGRAMS = {
    "python": (),
    "ray": ("-m", "ray.scripts.scripts"),
    "serve": ("-c", "from ray.serve.scripts import cli; cli()"),
}
PORT = 8000
_CLONE_NEWNET = 0x40000000
# linux/sockios.h and linux/if.h; `ip` is not installed everywhere.
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_TOKEN = "a-token-of-the-tests-alone-with-64-characters-as-rays-own-have-it"
_APPLICATION = "app.cluster.replica:application"
_SCRIPTED = "tests.support.ray_replica:application"


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Be in a new network namespace, whose loopback is up; needs root."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(result: int) -> None:
        if result != 0:
            raise PermissionError(ctypes.get_errno(), "a network namespace needs root")

    with Path("/proc/thread-self/ns/net").open() as before:
        enter(libc.unshare(_CLONE_NEWNET))
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                up = struct.pack("16sh14x", b"lo", _IFF_UP)
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
            yield
        finally:
            enter(libc.setns(before.fileno(), _CLONE_NEWNET))


def wait_until(holds: Callable[[], object], limit_s: float = 60.0) -> float:
    """Ask again until it holds; return the seconds that it took."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < limit_s, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - begun


class Answer:
    """One answer over HTTP: status, headers (lower case), body."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def pid(self) -> int:
        """The process of the replica that gave it."""
        return int(self.headers["x-replica-pid"])


class _Connection(http.client.HTTPConnection):
    """A connection that sends its request in one piece, or its head some time before its body.

    HAProxy as Ray configures it passes on what has come, and tries only those requests again that
    were complete then. Where the two parts are sent at once, chance decides.
    """

    def __init__(self, port: int, *, is_in_two: bool) -> None:
        super().__init__("127.0.0.1", port, timeout=120)
        self._is_in_two = is_in_two
        self._pieces: list[Any] = []

    def send(self, data: Any) -> None:
        """Keep it until the request is complete."""
        self._pieces.append(data)

    def getresponse(self) -> http.client.HTTPResponse:
        """Send the request, and wait for the answer."""
        self.connect()
        assert self.sock is not None
        for piece in self._pieces if self._is_in_two else [b"".join(self._pieces)]:
            self.sock.sendall(piece)
            time.sleep(0.1 * self._is_in_two)
        return super().getresponse()


def ask(
    method: str, path: str, body: object = None, *, port: int = PORT, is_in_two: bool = False
) -> Answer:
    """One request on a connection of its own; status 0 where there was no answer."""
    connection = _Connection(port, is_in_two=is_in_two)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        headers = {key.lower(): value for key, value in answer.getheaders()}
        return Answer(answer.status, headers, answer.read())
    except (OSError, http.client.HTTPException):
        return Answer(0, {}, b"")
    finally:
        connection.close()


def generate(seed: int = 1, *, is_in_two: bool = False, **fields: Any) -> Answer:
    """Ask for a picture."""
    body = {"prompt": "a fox", "seed": seed, "width": 256, "height": 256, **fields}
    return ask("POST", "/generate", body, is_in_two=is_in_two)


def _path() -> str:
    """Where modules are looked for first: here, then where the caller has them."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


class Cluster:
    """Ray's processes; deployed to by the commands that docs/scale.md tells."""

    def __init__(self, folder: Path, python: Path = PYTHON, **settings: str) -> None:
        self.folder = folder
        self._python = python
        self._settings = {
            "KLEIN_DEVICE": "cpu",
            "KLEIN_MODEL": "flux.2-klein-4b",
            "KLEIN_TRUST_NETWORK": "true",
            "KLEIN_CACHE_DIR": str(folder / "cache"),
            **settings,
        }
        # Sockets below it must have short paths.
        self._short = Path(tempfile.mkdtemp(prefix="kr-", dir="/tmp"))
        token = folder / "token"
        token.write_text(_TOKEN)
        self.environ = self._make_environ(token)
        self._nodes: list[subprocess.Popen[str]] = []
        self._logs: list[IO[str]] = []

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _make_environ(self, token: Path) -> dict[str, str]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "RAY_"))}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        environ.pop("OMP_NUM_THREADS", None)
        environ["PYTHONPATH"] = _path()
        haproxy = {
            f"RAY_SERVE_HAPROXY_{name}": str(self._short / file)
            for name, file in (
                ("CONFIG_FILE_LOC", "haproxy.cfg"),
                ("SOCKET_PATH", "admin.sock"),
                ("SERVER_STATE_BASE", ""),
                ("SERVER_STATE_FILE", "state"),
                ("METRICS_SOCKET_PATH", "metrics.sock"),
            )
        }
        return {
            **environ,
            **json.loads(self.klein("cluster", "environ", "--json")),
            **haproxy,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            # A machine that others use too is slower than Ray's own limits expect.
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
            "RAY_TMPDIR": str(self._short),
            "PYTHONWARNINGS": "ignore",
        }

    def klein(self, *words: str) -> str:
        """Run the command `klein` of the environment that has no Ray."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")}
        done = subprocess.run(
            [sys.executable, "-m", "app", *words],
            env=environ | self._settings | {"PYTHONPATH": _path()},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ray(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a program of Ray's environment to its end."""
        return subprocess.run(
            self._command(*words),
            env={**self.environ, "RAY_ADDRESS": "127.0.0.1:6379", **environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def _command(self, program: str, *words: str) -> list[str]:
        return [str(self._python), *_PROGRAMS[program], *words]

    def start(self, *words: str, address: str = "127.0.0.1", cpus: int = 8) -> None:
        """Start a node and wait until it takes part."""
        place: tuple[str, ...] = ("--head", "--include-dashboard=false")
        if self._nodes:
            place = ("--address=127.0.0.1:6379",)
        log = self.folder / f"node-{len(self._nodes)}.log"
        self._logs.append(log.open("w"))
        self._nodes.append(
            subprocess.Popen(
                [
                    *self._command("ray", "start", *place, "--block", f"--num-cpus={cpus}"),
                    f"--node-ip-address={address}",
                    *("--object-store-memory=100000000", *words),
                ],
                env=self.environ,
                cwd=ROOT,
                stdout=self._logs[-1],
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

        def is_up() -> bool:
            assert self._nodes[-1].poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_until(is_up, 150)

    def kill_node(self, number: int) -> None:
        """End all processes of a node at once, as a machine does that loses its power."""
        node = psutil.Process(self._nodes[number].pid)
        for process in (*node.children(recursive=True), node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def deploy(
        self, script: str | None, *words: str, proxy_location: str | None = None, **settings: str
    ) -> Path:
        """Deploy what `klein cluster config` writes, with scripted pictures unless *script* is
        None; do not wait until it is ready.

        Two nodes of one machine need another *proxy_location*: HAProxy's ports are taken there.
        """
        file = self.folder / "klein.yaml"
        before = dict(self._settings)
        self._settings.update(settings)
        try:
            self.klein("cluster", "config", "-o", str(file), *words)
        finally:
            self._settings = before
        if script is not None:
            changes = {_APPLICATION: _SCRIPTED, "args: {}": f"args: {{script: [{script}]}}"}
            file.write_text(_replaced(file.read_text(), changes))
        if proxy_location is not None:
            changes = {'"EveryNode"': f'"{proxy_location}"'}
            file.write_text(_replaced(file.read_text(), changes))
        done = self.ray("serve", "run", "--non-blocking", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        return file

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::ServeRepli"):
                    found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster."""
        found: list[psutil.Process] = []
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(node.pid).children(recursive=True)
        return found

    def worker(self, replica: int) -> psutil.Process:
        """The process of *replica* that computes: forked from its fork server, or spawned."""
        for child in psutil.Process(replica).children():
            command = " ".join(child.cmdline())
            if "spawn_main" in command:
                return child
            if "multiprocessing.forkserver" in command and (forked := child.children()):
                return forked[0]
        raise AssertionError("the replica has no worker")

    def haproxy(self) -> list[psutil.Process]:
        """HAProxy's processes, more than one while it is reloaded."""
        return [each for each in self.processes() if self._is_haproxy(each)]

    def _is_haproxy(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.name() == "haproxy" and process.status() != psutil.STATUS_ZOMBIE
        return False

    def wait_for(self, replicas: int, limit_s: float = 180.0) -> None:
        """Wait until HAProxy has so many replicas, and all of them answer."""
        wait_until(lambda: len(self._servers()) == replicas, limit_s)

    def _servers(self) -> list[str]:
        """The replicas that HAProxy counts as up, by its statistics."""
        answer = ask("GET", "/stats;csv", port=8404)
        rows = [line.split(",") for line in answer.body.decode().splitlines()]
        return [
            row[1]
            for row in rows
            if len(row) > 17 and "SERVE_REPLICA" in row[1].upper() and row[17].startswith("UP")
        ]

    def listening(self) -> set[tuple[str, str, str]]:
        """What listens here: the process's name, the address, and the port where it is fixed."""
        done = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True)
        found = set()
        for line in done.stdout.splitlines():
            place, names = line.split()[3], re.findall(r'\("([^"]+)",pid', line)
            address, _, port = place.rpartition(":")
            found.add((names[0] if names else "?", address.strip("[]"), port))
        return found

    def ports(self) -> list[int]:
        """Where the replicas answer HTTP; none has the port of one that has gone."""
        served = {(name, int(port)) for name, _, port in self.listening() if "ServeRepli" in name}
        return sorted(port for _, port in served if 30_000 <= port <= 31_000)

    def running(self) -> dict[int, int]:
        """How many pictures each replica has, made or waiting, by its process; asked of each."""
        found = {}
        for port in self.ports():
            answer = ask("GET", "/health", port=port)
            if answer.status == 200:
                queue = json.loads(answer.body)["queue"]
                found[answer.pid] = queue["running"] + queue["size"]
        return found

    def stop(self) -> None:
        """End every node, the head last."""
        left = self.processes()
        for node in reversed(self._nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(20)
                    continue
                node.kill()
                node.wait()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        for log in self._logs:
            log.close()
        shutil.rmtree(self._short, ignore_errors=True)
