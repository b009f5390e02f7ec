"""Sample GPU memory, power and temperature through NVML, and host memory from /proc.

A thread reads both ten times a second: peaks between two images are seen, and the event loop under
measurement is not disturbed.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.domain import GpuSnapshot

Number = TypeVar("Number", int, float)

_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample, *at_s* seconds after the start; None without a GPU or where NVML is silent."""

    at_s: float
    gpu_bytes: int | None
    host_bytes: int
    power_watts: float | None
    temperature_celsius: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Maximum of each, and mean power, over an interval of readings."""

    gpu_bytes: int | None
    host_bytes: int | None
    power_watts: float | None
    temperature_celsius: float | None


class Sampler:
    """A context manager that samples in a thread; *processes* returns the ids to sum up."""

    def __init__(
        self,
        read_gpu: Callable[[], GpuSnapshot | None],
        processes: Callable[[], list[int]],
    ) -> None:
        self.readings: list[Reading] = []
        self._read_gpu = read_gpu
        self._processes = processes
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def now_s(self) -> float:
        """Return seconds since the start, as in `Reading.at_s`."""
        return time.monotonic() - self._started

    def usage(self, since_s: float) -> Usage:
        """Aggregate the readings since *since_s*, one more taken now included."""
        self._read()
        readings = [reading for reading in self.readings if reading.at_s >= since_s]
        power = [one.power_watts for one in readings if one.power_watts is not None]
        return Usage(
            gpu_bytes=_most(one.gpu_bytes for one in readings),
            host_bytes=_most(one.host_bytes for one in readings),
            power_watts=statistics.fmean(power) if power else None,
            temperature_celsius=_most(one.temperature_celsius for one in readings),
        )

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self._read()

    def _read(self) -> None:
        gpu = self._read_gpu()
        self.readings.append(
            Reading(
                at_s=self.now_s(),
                gpu_bytes=gpu.used_bytes if gpu else None,
                host_bytes=sum(resident_bytes(pid) for pid in self._processes()),
                power_watts=gpu.power_watts if gpu else None,
                temperature_celsius=gpu.temperature_celsius if gpu else None,
            )
        )


def impatient_clock() -> Callable[[], float]:
    """Return a clock that makes `Gpu.read` ask NVML at each call."""
    ticks = itertools.count(step=1_000)
    return lambda: float(next(ticks))


def resident_bytes(pid: int) -> int:
    """Return the resident set size of process *pid* in bytes; 0 where it cannot be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _most(values: Iterable[Number | None]) -> Number | None:
    """Return the largest value that is not None."""
    return max((value for value in values if value is not None), default=None)
