"""Sample GPU memory, power and temperature through NVML, and the processes' host memory.

A thread reads both ten times a second: peaks between two images are seen, and the event loop under
measurement is not disturbed.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil

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

    def now_s(self) -> float:
        """Return seconds since the start, as in `Reading.at_s`."""
        return time.monotonic() - self._started

    def usage(self, since_s: float) -> Reading:
        """Return the maximum of each, and mean power, since *since_s*; one more is read now.

        The GPU's memory is counted without what was used before the start.
        """
        self._read()
        readings = [reading for reading in self.readings if reading.at_s >= since_s]
        power = [one.power_watts for one in readings if one.power_watts is not None]
        before, most = self.readings[0].gpu_bytes, _most(one.gpu_bytes for one in readings)
        return Reading(
            at_s=readings[-1].at_s,
            gpu_bytes=None if before is None or most is None else max(0, most - before),
            host_bytes=max(one.host_bytes for one in readings),
            power_watts=statistics.fmean(power) if power else None,
            temperature_celsius=_most(one.temperature_celsius for one in readings),
        )

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            self._read()

    def _read(self) -> None:
        gpu = self._read_gpu()
        processes = (os.getpid(), self.worker_pid)
        self.readings.append(
            Reading(
                at_s=self.now_s(),
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


def _most(values: Iterable[Number | None]) -> Number | None:
    """Return the largest value that is not None."""
    return max((value for value in values if value is not None), default=None)
