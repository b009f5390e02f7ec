"""The workshop of the image check: Debian's debootstrap and buildah, on a storage of its own.

buildah 1.28 in chroot isolation with vfs needs no engine, no daemon and no overlay file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BASE = "localhost/klein-image-check-base:bookworm"
IMAGE = "localhost/klein-image-check:latest"
# What python:3.12-slim-bookworm has and a bare Debian has not.
INCLUDED = "python3,python3-venv,libpython3-dev,ca-certificates"
# The options of pip that say where packages come from.
SOURCES = {"index-url", "extra-index-url", "find-links", "trusted-host", "no-index", "cert"}


class CheckFailed(Exception):
    """A promise about the image does not hold; the message says which, and what was seen."""


def run(command: Sequence[str | Path], *, limit_s: float, **kwargs: Any) -> str:
    """Run *command* and return what it printed; on failure its last words are the message."""
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )
    try:
        said, complaints = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"no end within {limit_s:.0f} s: {shlex.join(words)[:300]}") from None
    finally:
        # buildah's children in the chroot would outlive it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        last_words = f"{said[-1500:]}{complaints[-1500:]}"
        raise CheckFailed(f"{process.returncode} from {shlex.join(words)[:300]}\n{last_words}")
    return str(said)


def wait_until(holds: Callable[[], bool], *, limit_s: float, what: str) -> None:
    """Ask *holds* until it says yes."""
    until = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > until:
            raise CheckFailed(f"waited {limit_s:.0f} s for {what}.")
        time.sleep(0.2)


class Workshop:
    """Holds the *kept* folder for one run; on leaving, only the base and the caches stay in it."""

    def __init__(self, kept: Path, scratch: Path, *, fresh: bool) -> None:
        self._kept = kept
        self._scratch = scratch
        self._fresh = fresh
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Workshop:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        lock = self._open.enter_context(self._kept.with_suffix(".lock").open("w"))
        wait_until(lambda: _locks(lock.fileno()), limit_s=900, what=f"another run in {self._kept}")
        if self._fresh and self._kept.exists():
            shutil.rmtree(self._kept)
        # 0755: the user of the image has to reach its root.
        (self._kept / "tmp").mkdir(parents=True, exist_ok=True)
        (self._kept / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        # What a killed run left.
        self._clean()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            self._clean()

    def _buildah(self, *words: str | Path, limit_s: float) -> str:
        """Call buildah on our own storage, so that nobody's images are touched."""
        storage: list[str | Path] = [
            "--root",
            self._kept / "storage",
            "--runroot",
            self._kept / "run",
        ]
        # Its cache mounts lie under TMPDIR.
        environ = os.environ | {"TMPDIR": str(self._kept / "tmp"), "BUILDAH_ISOLATION": "chroot"}
        command = ["buildah", *storage, "--storage-driver", "vfs", *words]
        return run(command, limit_s=limit_s, env=environ)

    def _policy(self) -> list[str | Path]:
        return ["--signature-policy", self._kept / "policy.json"]

    def _clean(self) -> None:
        self._buildah("rm", "--all", limit_s=120)
        for image in json.loads(self._buildah("images", "--json", limit_s=60)) or []:
            if BASE not in (image.get("names") or []):
                self._buildah("rmi", "--force", image["id"], limit_s=120)

    def make_base(self) -> None:
        """Make the base once: a minimal Debian with what the official Python image has."""
        if BASE in self._buildah("images", "--format", "{{.Name}}:{{.Tag}}", limit_s=60).split():
            return
        tree, archive = self._scratch / "base", self._scratch / "base.tar"
        options = ["--variant=minbase", f"--include={INCLUDED}"]
        try:
            run(["debootstrap", *options, "bookworm", tree], limit_s=900)
        except CheckFailed:
            _unmount_below(tree)
            raise
        shutil.rmtree(tree / "var/cache/apt/archives")
        run(["tar", "--create", "--file", archive, "--directory", tree, "."], limit_s=120)
        shutil.rmtree(tree)
        container = self._buildah("from", *self._policy(), "scratch", limit_s=60).strip()
        self._buildah("add", "--quiet", container, archive, "/", limit_s=120)
        self._buildah("commit", "--quiet", *self._policy(), container, BASE, limit_s=120)
        self._buildah("rm", container, limit_s=60)
        archive.unlink()

    def build(self, context: Path, extras: str = "") -> None:
        """Build the Dockerfile as it stands; only base and package sources are this machine's."""
        options: list[str | Path] = ["--format", "docker", "--pull-never", "--layers=false"]
        options += [*self._policy(), "--build-arg", f"BASE={BASE}"]
        options += ["--build-arg", f"EXTRAS={extras}"]
        mounts = pip_mounts(self._scratch)
        for source, target in mounts:
            options += ["--volume", f"{source}:{target}:ro"]
        if mounts:
            # This machine's own sources may have another build of torch, with other hashes.
            options += ["--build-arg", "LOCK=requirements.lock"]
        names: list[str | Path] = ["--tag", IMAGE, "--file", context / "Dockerfile"]
        self._buildah("build", *options, *names, context, limit_s=1800)

    def inspect(self) -> dict[str, Any]:
        """Return what the image says about itself."""
        answer = json.loads(self._buildah("inspect", "--type", "image", IMAGE, limit_s=60))
        facts: dict[str, Any] = answer["Docker"]
        return facts

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Give the root of a container made from the image."""
        options = ["--pull-never", *self._policy()]
        container = self._buildah("from", *options, IMAGE, limit_s=300).strip()
        try:
            yield Path(self._buildah("mount", container, limit_s=60).strip())
        finally:
            self._buildah("rm", container, limit_s=120)


def _unmount_below(tree: Path) -> None:
    """Unmount what a debootstrap that was ended has left, such as this machine's /proc."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for each in sorted(mounts, reverse=True):
        if Path(each).is_relative_to(tree):
            run(["umount", "--lazy", each], limit_s=60)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def pip_mounts(scratch: Path) -> list[tuple[Path, str]]:
    """Return the mounts that give pip in the build the sources it has here, folders included."""
    listed = run([sys.executable, "-m", "pip", "config", "list"], limit_s=60)
    found = re.findall(r"^(:env:|global|install)\.(\S+?)='(.*)'$", listed, re.MULTILINE)
    # The environment wins over the files, as in pip itself.
    found.sort(key=lambda entry: entry[0] == ":env:")
    options = {name: value.replace("\\n", " ") for _, name, value in found if name in SOURCES}
    if not options:
        return []
    written = scratch / "pip.conf"
    lines = (f"{name} = {value}\n" for name, value in options.items())
    written.write_text("[global]\n" + "".join(lines))
    words = (word.removeprefix("file://") for value in options.values() for word in value.split())
    local = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    # The pages of an index in a folder link to files beside it.
    folders = {path.parent if path.name == "simple" else path for path in local}
    return [(written, "/etc/pip.conf"), *((path, str(path)) for path in sorted(folders))]
