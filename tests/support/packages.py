"""Installs packages as pip would, from where it would take them, by uv, in a tenth of the time.

    .venv/bin/python tests/support/packages.py [--target FOLDER] [--requirement FILE] [PACKAGE ...]

pip takes half a second of a processor for each package, whatever it is. Where uv cannot do it, for
what is set for pip here and means nothing to it, pip does. Knows nothing but the standard library:
it installs the rest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check")
SIX_MINUTES = 360
_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "constraint": "--constraint",
}
"""What says where pip takes packages from and which, and what uv calls it."""


def install(*words: str | Path, python: str | Path = sys.executable) -> None:
    """Install *words*, packages and options that both know, into the environment of *python*.

    Raises:
        AssertionError: pip could not either; the message has its last words.
        subprocess.TimeoutExpired: one of them took longer than six minutes.
    """
    given = [str(word) for word in words]
    settings = read(_run(sys.executable, *PIP, "config", "list").stdout)
    # Of all indexes the best version, as pip does it.
    rules = ("--index-strategy", "unsafe-best-match")
    quick = (_uv(), "pip", "install", "--quiet", "--python", str(python), *rules)
    trusted = {"SSL_CERT_FILE": settings["cert"]} if "cert" in settings else {}
    if _run(*quick, *sources(settings), *given, **trusted).returncode == 0:
        return
    slow = (*PIP, "--python", str(python), "install", "--quiet", "--no-compile")
    done = _run(sys.executable, *slow, *given)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def read(listed: str) -> dict[str, str]:
    """The settings of `pip config list`, several values of one divided by spaces."""
    found = re.findall(r"^(:env:|global|site|user|install)\.(\S+?)='(.*)'$", listed, re.MULTILINE)
    # The environment wins over the files, as in pip itself.
    found.sort(key=lambda entry: entry[0] == ":env:")
    return {name.strip("."): value.replace("\\n", " ").strip() for _, name, value in found}


def sources(settings: dict[str, str]) -> Iterator[str]:
    """What pip's settings say of the places that packages come from, as options of uv."""
    for name, option in _OPTIONS.items():
        for value in settings.get(name, "").split():
            yield from (option, value)
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        yield "--no-index"


def _uv() -> str:
    """The tests' own uv; where there is none yet, it is installed as it is locked."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        lock = (ROOT / "requirements-test.lock").read_text()
        (pinned,) = re.findall(r"^uv==\S+$", lock, re.MULTILINE)
        done = _run(sys.executable, *PIP, "install", "--quiet", "--no-deps", pinned)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return str(uv)


def _run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SIX_MINUTES,
        check=False,
    )


if __name__ == "__main__":
    install(*sys.argv[1:])
