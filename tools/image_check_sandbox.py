"""A container without an engine: namespaces, a read-only root, one volume, the image's user.

Run as a program, this file is what happens inside: it confines itself and becomes the service.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.image_check_build import CheckFailed

NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts")
# Docker's own options for a tmpfs.
TMPFS = "nosuid,nodev,noexec,mode=1777,size=1g"

# Runs in the container: one request, the answer as JSON.
REQUEST = """
import base64, http.client, json, sys
method, path, host, body = sys.argv[1:5]
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
headers = {"Host": host, "Content-Type": "application/json"}
connection.request(method, path, body=body or None, headers=headers)
answer = connection.getresponse()
print(json.dumps([answer.status, answer.getheader("Content-Type"),
                  base64.b64encode(answer.read()).decode()]))
"""


@dataclass(frozen=True)
class Answer:
    """What one request brought."""

    status: int
    type: str | None
    body: bytes


class Place:
    """Where programs of the image run: its root, a fresh volume, its and compose's environment."""

    def __init__(
        self, rootfs: Path, config: dict[str, Any], environ: Mapping[str, str], scratch: Path
    ) -> None:
        self.rootfs = rootfs
        self.config = config
        self.environ = dict(entry.split("=", 1) for entry in config["Env"]) | dict(environ)
        self.volume = scratch / "volume"
        # As an engine makes a fresh named volume: with the owner of its place in the image.
        owner = (rootfs / "models").stat()
        self.volume.mkdir()
        os.chown(self.volume, owner.st_uid, owner.st_gid)
        self.volume.chmod(owner.st_mode & 0o777)


class Running:
    """A program in the sandbox as its PID 1; a context manager that leaves nothing running."""

    def __init__(
        self, place: Place, words: Sequence[str], changed: Mapping[str, str] | None = None
    ) -> None:
        self._environ = place.environ | dict(changed or {})
        uid, gid = place.config["User"].split(":")
        powers = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        user = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        self._as_user = ["/usr/bin/setpriv", *user, *powers, "--"]
        orders = {
            "rootfs": str(place.rootfs),
            "volume": str(place.volume),
            "directory": place.config["WorkingDir"],
            "command": [*self._as_user, *words],
            "environ": self._environ,
        }
        # Appended to, so that reading never moves the place where it writes.
        self._output = tempfile.TemporaryFile("a+")  # noqa: SIM115 - closed on leaving
        this = [sys.executable, str(Path(__file__).resolve()), json.dumps(orders)]
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--propagation", "private"]
        self._unshare = subprocess.Popen(
            [*unshare, "--", *this],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        # Its child is the namespace's PID 1: with it, everything in there ends.
        self._unshare.kill()
        self._unshare.wait(30)
        self._output.close()

    def output(self) -> str:
        """What was printed so far."""
        self._output.seek(0)
        return self._output.read()

    def wait(self, limit_s: float) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self._unshare.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = f"no end within {limit_s:.0f} s:\n{self.output()[-3000:]}"
            raise CheckFailed(late) from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program, as an engine does."""
        os.kill(self._first(), number)

    def execute(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run *words* beside the program, as `docker exec` does."""
        target = ["--target", str(self._first())]
        return subprocess.run(
            ["nsenter", *target, *NAMESPACES, "--root", "--wd", *self._as_user, *words],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def request(
        self, method: str, path: str, *, host: str = "localhost", body: object | None = None
    ) -> Answer:
        """Ask the service from inside the container."""
        text = "" if body is None else json.dumps(body)
        done = self.execute(["python3", "-IS", "-c", REQUEST, method, path, host, text])
        if done.returncode != 0:
            raise CheckFailed(f"no answer from {path}: {done.stderr[-500:]}")
        status, kind, content = json.loads(done.stdout)
        return Answer(status, kind, base64.b64decode(content))

    def is_ready(self) -> bool:
        """Whether /health/ready says so; a service that has ended never will."""
        if self._unshare.poll() is not None:
            ended = f"the service ended with {self._unshare.returncode}"
            raise CheckFailed(f"{ended}:\n{self.output()[-3000:]}")
        try:
            return self.request("GET", "/health/ready").status == 200
        except CheckFailed:
            return False

    def _first(self) -> int:
        """The number that this machine gives the program that is PID 1 in there."""
        pid = self._unshare.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(children) != 1:
            raise CheckFailed(f"the program is gone:\n{self.output()[-3000:]}")
        return int(children[0])


def confine(orders: dict[str, Any]) -> None:
    """Become the program, in the namespaces made for it: mounts, loopback, root, user."""
    root = Path(orders["rootfs"])
    _mount("--bind", root, root)
    _mount("--bind", orders["volume"], root / "models")
    _mount("-t", "proc", "-o", "nosuid,nodev,noexec", "proc", root / "proc")
    _mount("-t", "tmpfs", "-o", TMPFS, "tmpfs", root / "tmp")
    _mount("-t", "tmpfs", "-o", "nosuid,mode=755", "tmpfs", root / "dev")
    for name in ("null", "zero", "full", "random", "urandom"):
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", root / "dev" / name)
    (root / "dev/shm").mkdir()
    _mount("-t", "tmpfs", "-o", TMPFS, "tmpfs", root / "dev/shm")
    (root / "dev/fd").symlink_to("/proc/self/fd")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    _mount("-o", "remount,bind,ro", root)
    _bring_loopback_up()
    os.chroot(root)
    os.chdir(orders["directory"])
    os.execve(orders["command"][0], orders["command"], orders["environ"])


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *(str(word) for word in words)], check=True)


def _bring_loopback_up() -> None:
    """Do what `ip link set lo up` does, where there may be no `ip`."""
    set_flags, up_and_running = 0x8914, 0x1 | 0x40
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", up_and_running))


if __name__ == "__main__":
    confine(json.loads(sys.argv[1]))
