"""Describe this machine for a report, and sample what is used of it.

A thread samples GPU memory, power and temperature through NVML, and the processes' host memory, ten
times a second: peaks between two images are seen, and the event loop under measurement is not
disturbed.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from app import __version__
from app.domain import GpuSnapshot
from app.telemetry.gpu import Gpu, GpuFacts

_PACKAGES = ("torch", "diffusers", "transformers", "comfy-kitchen")
_INTERVAL_S = 0.1


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


def describe_machine(gpu: Gpu | None) -> Machine:
    """Ask NVML, the kernel and the installed packages."""
    facts = gpu.facts() if gpu else None
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


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample, *at_s* seconds after the start; None without a GPU or where NVML is silent."""

    at_s: float
    gpu_bytes: int | None
    host_bytes: int
    power_watts: float | None
    temperature_celsius: float | None


class Sampler:
    """A context manager that samples in a thread; *worker_pid* is None while there is none."""

    def __init__(self, read_gpu: Callable[[], GpuSnapshot | None]) -> None:
        self.readings: list[Reading] = []
        self.worker_pid: int | None = None
        self._read_gpu = read_gpu
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Sampler:
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def usage(self, first: int) -> Reading:
        """Return the maximum of each, and mean power, from reading *first* on; one is read now.

        The GPU's memory is counted without what was used before the start.
        """
        self._read()
        readings = self.readings[first:]
        used = [one.gpu_bytes for one in readings if one.gpu_bytes is not None]
        power = [one.power_watts for one in readings if one.power_watts is not None]
        heat = [one.temperature_celsius for one in readings if one.temperature_celsius is not None]
        before = self.readings[0].gpu_bytes
        return Reading(
            at_s=readings[-1].at_s,
            gpu_bytes=max(0, max(used) - before) if used and before is not None else None,
            host_bytes=max(one.host_bytes for one in readings),
            power_watts=statistics.fmean(power) if power else None,
            temperature_celsius=max(heat, default=None),
        )

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self._read()

    def _read(self) -> None:
        gpu = self._read_gpu()
        processes = (os.getpid(), self.worker_pid)
        self.readings.append(
            Reading(
                at_s=time.monotonic() - self._started,
                gpu_bytes=gpu.used_bytes if gpu else None,
                host_bytes=sum(_resident_bytes(pid) for pid in processes if pid),
                power_watts=gpu.power_watts if gpu else None,
                temperature_celsius=gpu.temperature_celsius if gpu else None,
            )
        )


def _resident_bytes(pid: int) -> int:
    """Return the resident set size of process *pid* in bytes; 0 where it cannot be read."""
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
