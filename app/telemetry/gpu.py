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
THROTTLE_REASONS = {
    "hw_thermal": "nvmlClocksEventReasonHwThermalSlowdown",
    "sw_thermal": "nvmlClocksEventReasonSwThermalSlowdown",
    "hw_power_brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
}
"""Why a GPU's clock is lower than it could be, by NVML's constants; idleness is no such reason."""

_ELSEWHERE = "a program outside this container"
_FIRST_NAMESPACE = 0xEFFFFFFC
"""The inode of the machine's own process ids (PROC_PID_INIT_INO in Linux's proc_ns.h)."""


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


def import_nvml() -> Any:
    """Import NVML's bindings, which a machine without a card need not have."""
    import pynvml

    return pynvml


class Gpu:
    """One GPU by NVML's UUID, or by NVML's index; `read` may be called from any thread.

    torch's index is another: it depends on CUDA_VISIBLE_DEVICES. *load_nvml* returns the `pynvml`
    module or, in tests, an object with the same functions; *cache_s* is how many seconds a reading
    is kept.
    """

    def __init__(
        self,
        key: str | int,
        *,
        load_nvml: Callable[[], Any] = import_nvml,
        clock: Callable[[], float] = time.monotonic,
        cache_s: float = CACHE_S,
    ) -> None:
        self._key = key
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

    def facts(self) -> GpuFacts | str:
        """Ask for everything that `read` leaves out; a str says why NVML cannot tell."""
        try:
            nvml = self._open()
            gpu, board = self._handles(nvml)
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(board)
            cuda = self._optional(nvml.nvmlSystemGetCudaDriverVersion)
            return GpuFacts(
                name=text(nvml.nvmlDeviceGetName(board)),
                driver=text(nvml.nvmlSystemGetDriverVersion()),
                capability=(int(major), int(minor)),
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                holders=self._holders(gpu),
                cuda=None if cuda is None else (int(cuda) // 1000, int(cuda) % 1000 // 10),
            )
        except Exception as error:
            return str(error).lower()

    def named_holders(self) -> tuple[Holder, ...]:
        """List the programs on the GPU whose names are known, the largest first; never fail.

        In a container and in WSL2 there are none: NVML tells the ids of processes that are not
        seen from there, or nothing.
        """
        try:
            with self._lock:
                nvml = self._open()
            found = self._holders(self._handles(nvml)[0])
        except Exception as error:
            _log.debug("NVML named no process: %s.", type(error).__name__)
            return ()
        return tuple(each for each in found if each.name != _ELSEWHERE)

    def _open(self) -> Any:
        """Return NVML, initialised once; raises whatever a machine without it raises."""
        if self._nvml is None:
            nvml = self._load_nvml()
            nvml.nvmlInit()
            self._nvml = nvml
        return self._nvml

    def _handles(self, nvml: Any) -> tuple[Any, Any]:
        """Return the handle, and that of the whole board where the GPU is a part of one (MIG)."""
        if isinstance(self._key, int):
            gpu = nvml.nvmlDeviceGetHandleByIndex(self._key)
        else:
            gpu = nvml.nvmlDeviceGetHandleByUUID(self._key)
            if self._key.startswith("MIG-"):
                return gpu, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu)
        return gpu, gpu

    def _snapshot(self, nvml: Any) -> GpuSnapshot:
        gpu, board = self._handles(nvml)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        return GpuSnapshot(
            name=text(nvml.nvmlDeviceGetName(board)),
            uuid=text(nvml.nvmlDeviceGetUUID(gpu)),
            used_bytes=int(memory.used),
            total_bytes=int(memory.total),
            utilization_ratio=self._optional(
                lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100
            ),
            power_watts=self._optional(lambda: nvml.nvmlDeviceGetPowerUsage(board) / 1000),
            temperature_celsius=self._optional(
                lambda: nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU)
            ),
            throttled=self._throttled(nvml, board),
        )

    def _throttled(self, nvml: Any, board: Any) -> dict[str, bool] | None:
        """Return which of `THROTTLE_REASONS` hold; None where the driver does not say."""
        try:
            bits = int(nvml.nvmlDeviceGetCurrentClocksEventReasons(board))
        except nvml.NVMLError:
            return None
        return {
            reason: bool(bits & getattr(nvml, name)) for reason, name in THROTTLE_REASONS.items()
        }

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
    """Return the program's name without its arguments, which may be secret.

    A program chooses its name itself: what a terminal would obey is left out.
    """
    try:
        # From a container the same number is another process, or none.
        if Path("/proc/self/ns/pid").stat().st_ino != _FIRST_NAMESPACE:
            return _ELSEWHERE
        name = Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n").decode(errors="replace")
    except OSError:
        return _ELSEWHERE
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "?"


def text(value: str | bytes) -> str:
    """Return what NVML's bindings give as text in some versions and as bytes in others."""
    return value.decode() if isinstance(value, bytes) else value
