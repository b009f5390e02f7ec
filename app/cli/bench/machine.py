"""Describe this machine for a report: GPU, driver, CPU, memory, versions."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from app import __version__
from app.telemetry.gpu import Gpu, GpuFacts

_PACKAGES = ("torch", "diffusers", "transformers", "comfy-kitchen")


@dataclass(frozen=True, slots=True)
class Machine:
    """GPU, driver and host; *gpu*, *gpu_bytes* and *driver* are None without a GPU."""

    gpu: str | None
    gpu_bytes: int | None
    driver: str | None
    processor: str
    host_bytes: int
    system: str
    versions: Mapping[str, str]

    @property
    def gpu_words(self) -> str:
        """The GPU and its driver on one line."""
        if self.gpu is None or self.gpu_bytes is None:
            return f"none; {self.processor}"
        return f"{self.gpu}, {self.gpu_bytes / 1e9:.1f} GB, driver {self.driver}"


def describe_machine(gpu: Gpu) -> Machine:
    """Ask NVML, the kernel and the installed packages."""
    facts = gpu.facts()
    known = facts if isinstance(facts, GpuFacts) else None
    return Machine(
        gpu=known.name if known else None,
        gpu_bytes=known.total_bytes if known else None,
        driver=known.driver if known else None,
        processor=_processor(),
        host_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        versions=_versions(),
    )


def _processor() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {"klein": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
