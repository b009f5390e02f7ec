"""The one reader of NVML: the GPU's state, at most once a second, and everything else at once.

No torch here. Without a GPU, a driver or NVML a reading is None, and the metrics are absent rather
than zero.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain import GpuSnapshot

_log = logging.getLogger(__name__)

CACHE_S = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process on the GPU; *used_bytes* is None where the driver does not report it."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What does not change from second to second, and who holds the memory, the largest first.

    *capability* is (major, minor); *cuda* the latest version that the driver supports, None where
    it is too old to say.
    """

    name: str
    driver: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]
    cuda: tuple[int, int] | None = None


def _load_nvml() -> Any:
    import pynvml

    return pynvml


class Gpu:
    """One GPU by index; `read` may be called from any thread.

    *load_nvml* returns the `pynvml` module or, in tests, an object with the same functions;
    *cache_s* is how many seconds a reading is kept.
    """

    def __init__(
        self,
        index: int,
        *,
        load_nvml: Callable[[], Any] = _load_nvml,
        clock: Callable[[], float] = time.monotonic,
        cache_s: float = CACHE_S,
    ) -> None:
        self._index = index
        self._load_nvml = load_nvml
        self._clock = clock
        self._cache_s = cache_s
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._last: GpuSnapshot | None = None
        self._read_at = -math.inf

    def read(self) -> GpuSnapshot | None:
        """Read the GPU, or return the last reading while it is younger than *cache_s*."""
        with self._lock:
            if self._clock() - self._read_at >= self._cache_s:
                try:
                    self._last = self._snapshot(self._open())
                except Exception as error:
                    self._last = None
                    _log.debug("NVML gave no reading: %s.", type(error).__name__)
                # What is not there at the first reading is not asked for again.
                self._read_at = math.inf if self._nvml is None else self._clock()
            return self._last

    def count(self) -> int:
        """Return the number of GPUs; 0 without a driver."""
        try:
            return int(self._open().nvmlDeviceGetCount())
        except Exception as error:
            _log.debug("NVML gave no count: %s.", type(error).__name__)
            return 0

    def facts(self) -> GpuFacts | str:
        """Ask for everything that `read` leaves out; a str says why NVML cannot tell."""
        try:
            nvml = self._open()
            if self._index >= (count := nvml.nvmlDeviceGetCount()):
                return f"there is no card {self._index}; this machine has {count}, counted from 0"
            gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
            cuda = self._optional(nvml.nvmlSystemGetCudaDriverVersion)
            return GpuFacts(
                name=_text(nvml.nvmlDeviceGetName(gpu)),
                driver=_text(nvml.nvmlSystemGetDriverVersion()),
                capability=(int(major), int(minor)),
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                holders=self._holders(gpu),
                cuda=None if cuda is None else (int(cuda) // 1000, int(cuda) % 1000 // 10),
            )
        except Exception as error:
            return str(error).lower()

    def _open(self) -> Any:
        """Return NVML, initialised once; raises whatever a machine without it raises."""
        if self._nvml is None:
            nvml = self._load_nvml()
            nvml.nvmlInit()
            self._nvml = nvml
        return self._nvml

    def _snapshot(self, nvml: Any) -> GpuSnapshot:
        gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        return GpuSnapshot(
            name=_text(nvml.nvmlDeviceGetName(gpu)),
            uuid=_text(nvml.nvmlDeviceGetUUID(gpu)),
            used_bytes=int(memory.used),
            total_bytes=int(memory.total),
            utilization_ratio=self._optional(
                lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100
            ),
            power_watts=self._optional(lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            temperature_celsius=self._optional(
                lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
            ),
        )

    def _holders(self, gpu: Any) -> tuple[Holder, ...]:
        """List the processes on the GPU; none where the driver names none."""
        found: dict[int, Holder] = {}
        for kind in ("Compute", "Graphics"):
            try:
                processes = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses")(gpu)
            except self._nvml.NVMLError:
                continue
            for process in processes:
                found[process.pid] = Holder(
                    process.pid, _program(process.pid), process.usedGpuMemory
                )
        return tuple(sorted(found.values(), key=lambda one: one.used_bytes or 0, reverse=True))

    def _optional(self, read: Callable[[], float]) -> float | None:
        """Return None where the GPU answers NOT_SUPPORTED: no reading, not an error."""
        try:
            return float(read())
        except self._nvml.NVMLError:
            return None


def _program(pid: int) -> str:
    """Return the program's name without its arguments, which may be secret."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a program outside this container"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
