"""What Triton needs to compile our kernels here, and the command that installs what is missing.

It imports no torch: `klein doctor` asks it too.
"""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

WITHOUT_KERNELS = 1.6
"""How many times as long a picture takes where no kernels of our own run.

Not measured by this project: it is what torch.compile's kernels, which ours replace, saved others.
In int8, klein base 9B took 1.64 s a step without and 1.04 s with them on an RTX 3090 (README of
ComfyUI-INT8-Fast). On an H200 a forward pass in bf16 took 1.4 times as long, the decoder 2.4 times.
"""

TRITON = "Triton"
HEADERS = "Python's headers"

INSTALLERS = {
    "apt-get": "sudo apt-get install gcc python3-dev",
    "dnf": "sudo dnf install gcc python3-devel",
    "zypper": "sudo zypper install gcc python3-devel",
    "pacman": "sudo pacman -S gcc",
}
"""Commands by the program that they need; the others' Python brings its headers with it."""
_BY_HAND = "install gcc and Python's headers by this system's own means"
_WITH_TRITON = "pip install --force-reinstall -r requirements.lock"
"""Triton comes with torch's build for CUDA."""


@dataclass(frozen=True, slots=True)
class CompilerFound:
    """What Triton needs; None or False for what is missing."""

    c_compiler: str | None
    has_triton: bool
    has_headers: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of what is missing."""
        parts = (
            ("a C compiler", self.c_compiler is not None),
            (HEADERS, self.has_headers),
            (TRITON, self.has_triton),
        )
        return tuple(name for name, is_there in parts if not is_there)


def find_compiler() -> CompilerFound:
    """Look for what Triton needs."""
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return CompilerFound(
        c_compiler=next((path for path in found if path), None),
        has_triton=importlib.util.find_spec("triton") is not None,
        has_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    )


def install_command(missing: Collection[str]) -> str:
    """Return the command that installs *missing*, by this system's own installer."""
    system = next((line for name, line in INSTALLERS.items() if shutil.which(name)), _BY_HAND)
    commands = [system] if set(missing) - {TRITON} else []
    return " && ".join(commands + [_WITH_TRITON] * (TRITON in missing))
