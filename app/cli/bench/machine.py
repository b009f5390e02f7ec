"""Describe this machine for a report: GPU, driver, CPU, memory, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from app import __version__
from app.telemetry.gpu import Gpu

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
        return f"{self.gpu}, {self.gpu_bytes / 1e9:.1f} GB, driver {self.driver or 'unknown'}"


def describe_machine(gpu: Gpu) -> Machine:
    """Ask NVML, the kernel and the installed packages."""
    snapshot = gpu.read()
    return Machine(
        gpu=snapshot.name if snapshot else None,
        gpu_bytes=snapshot.total_bytes if snapshot else None,
        driver=gpu.driver_version(),
        processor=_processor(),
        host_bytes=host_memory("MemTotal"),
        system=f"{platform.system()} {platform.release()}",
        versions=dict(_versions()),
    )


def host_memory(field: str) -> int:
    """Return *field* of /proc/meminfo in bytes; 0 where it is missing."""
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _versions() -> list[tuple[str, str]]:
    found = [("klein", __version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found
