"""Read the GPU's state through NVML, at most once a second.

No torch here. Without a GPU, a driver or NVML a reading is None, and the metrics are absent rather
than zero.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.domain import GpuSnapshot

_log = logging.getLogger(__name__)

CACHE_S = 1.0


def _load_nvml() -> Any:
    import pynvml

    return pynvml


class Gpu:
    """One GPU by index; `read` may be called from any thread.

    *load_nvml* returns the `pynvml` module or, in tests, an object with the same functions.
    """

    def __init__(
        self,
        index: int,
        *,
        load_nvml: Callable[[], Any] = _load_nvml,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._load_nvml = load_nvml
        self._clock = clock
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._is_absent = False
        self._last: GpuSnapshot | None = None
        self._read_at = float("-inf")

    def read(self) -> GpuSnapshot | None:
        """Read the GPU, or return the last reading while it is younger than a second."""
        with self._lock:
            if self._is_absent:
                return None
            if self._clock() - self._read_at >= CACHE_S:
                self._last = self._read()
                self._read_at = self._clock()
            return self._last

    def driver_version(self) -> str | None:
        """Return the driver's version, or None without a driver."""
        if self.read() is None:
            return None
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def count(self) -> int:
        """Return the number of GPUs; 0 without a driver."""
        try:
            if self._nvml is None:
                nvml = self._load_nvml()
                nvml.nvmlInit()
                self._nvml = nvml
            return int(self._nvml.nvmlDeviceGetCount())
        except Exception as error:
            _log.debug("NVML gave no count: %s.", type(error).__name__)
            return 0

    def cuda_version(self) -> tuple[int, int] | None:
        """Return the latest CUDA version that the driver supports: (major, minor), or None."""
        if self._nvml is None:
            return None
        number = self._optional(lambda: self._nvml.nvmlSystemGetCudaDriverVersion())
        return None if number is None else (int(number) // 1000, int(number) % 1000 // 10)

    def holders(self) -> list[tuple[int, str, int]]:
        """Return the GPU's compute processes: process id, program, bytes; the largest first."""
        nvml = self._nvml
        if nvml is None:
            return []
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
            found = [
                (int(process.pid), _program(process.pid), int(process.usedGpuMemory or 0))
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            ]
        except nvml.NVMLError:
            return []
        return sorted(found, key=lambda holder: holder[2], reverse=True)

    def _read(self) -> GpuSnapshot | None:
        try:
            if self._nvml is None:
                nvml = self._load_nvml()
                nvml.nvmlInit()
                self._nvml = nvml
            return self._snapshot()
        except Exception as error:
            if self._nvml is None:
                self._is_absent = True
            _log.debug("NVML gave no reading: %s.", type(error).__name__)
            return None

    def _snapshot(self) -> GpuSnapshot:
        nvml = self._nvml
        gpu = nvml.nvmlDeviceGetHandleByIndex(self._index)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        utilization = self._optional(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
        power = self._optional(lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000)
        temperature = self._optional(
            lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        )
        return GpuSnapshot(
            name=_text(nvml.nvmlDeviceGetName(gpu)),
            uuid=_text(nvml.nvmlDeviceGetUUID(gpu)),
            used_bytes=int(memory.used),
            total_bytes=int(memory.total),
            utilization_ratio=utilization,
            power_watts=power,
            temperature_celsius=temperature,
        )

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
