"""The one reader of NVML: a GPU's state, at most once a second, and everything else at once.

A GPU is found by its UUID or PCI id, or by its number among those that `CUDA_VISIBLE_DEVICES`
leaves, in NVML's order, which is that of nvidia-smi. CUDA numbers them otherwise where that
variable, or `CUDA_DEVICE_ORDER`, says so: nothing here depends on it.

No torch here. Without a GPU, a driver or NVML a reading is None, and the metrics are absent rather
than zero.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain import GpuSnapshot

_log = logging.getLogger(__name__)

CACHE_S = 1.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


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


def show_only(uuid: str) -> None:
    """Have CUDA see this GPU alone, as number 0, in this process; before torch is imported.

    Without `PYTORCH_NVML_BASED_CUDA_CHECK`, asking torch whether there is a GPU initialises CUDA.
    """
    os.environ[_VISIBLE] = uuid
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def _load_nvml() -> Any:
    import pynvml

    return pynvml


class UnknownGpuError(Exception):
    """There is no such GPU; the message says what there is."""


class Gpu:
    """One GPU, by number, UUID or PCI id; `read` may be called from any thread.

    *load_nvml* returns the `pynvml` module or, in tests, an object with the same functions;
    *cache_s* is how many seconds a reading is kept.
    """

    def __init__(
        self,
        which: int | str = 0,
        *,
        load_nvml: Callable[[], Any] = _load_nvml,
        clock: Callable[[], float] = time.monotonic,
        cache_s: float = CACHE_S,
    ) -> None:
        self._which = str(which)
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

    def of(self, which: int | str) -> Gpu:
        """Return another GPU that is read in the same way."""
        return Gpu(which, load_nvml=self._load_nvml, clock=self._clock, cache_s=self._cache_s)

    def count(self) -> int:
        """Return the number of visible GPUs; 0 without a driver."""
        try:
            return len(_visible(self._open(), os.environ.get(_VISIBLE)))
        except Exception as error:
            _log.debug("NVML gave no count: %s.", type(error).__name__)
            return 0

    def check_exists(self) -> None:
        """Look whether there is such a GPU.

        Raises:
            UnknownGpuError: there is none.
        """
        nvml = self._open()
        try:
            self._find(nvml)
        except nvml.NVMLError:
            raise UnknownGpuError(f"no card is {self._which}; nvidia-smi -L lists them") from None

    def facts(self) -> GpuFacts | str:
        """Ask for everything that `read` leaves out; a str says why NVML cannot tell."""
        try:
            nvml = self._open()
            gpu = self._find(nvml)
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
        except UnknownGpuError as error:
            return str(error)
        except Exception as error:
            return str(error).lower()

    def cpus(self, devices: Path = Path("/sys/bus/pci/devices")) -> frozenset[int]:
        """Return the CPUs of the GPU's NUMA node, as the kernel names them; empty if unknown."""
        try:
            nvml = self._open()
            pci_id = _text(nvml.nvmlDeviceGetPciInfo(self._find(nvml)).busId).lower()
            # NVML writes the domain in eight digits, the kernel in four.
            folder = devices / pci_id[-len("0000:00:00.0") :]
            if int((folder / "numa_node").read_text()) < 0:
                return frozenset()
            return _cpus((folder / "local_cpulist").read_text())
        except Exception as error:
            _log.debug("The GPU's NUMA node is not known: %s.", type(error).__name__)
            return frozenset()

    def _open(self) -> Any:
        """Return NVML, initialised once; raises whatever a machine without it raises."""
        if self._nvml is None:
            nvml = self._load_nvml()
            nvml.nvmlInit()
            self._nvml = nvml
        return self._nvml

    def _find(self, nvml: Any) -> Any:
        """Return NVML's handle of this GPU.

        Raises:
            UnknownGpuError: there is none.
        """
        visible = _visible(nvml, os.environ.get(_VISIBLE))
        if self._which.isdigit():
            if int(self._which) < len(visible):
                return visible[int(self._which)]
            raise UnknownGpuError(
                f"there is no card {self._which}; this machine has {len(visible)}, counted from 0"
            )
        if ":" in self._which:
            return nvml.nvmlDeviceGetHandleByPciBusId(self._which.encode())
        return _by_uuid(nvml, visible, self._which)

    def _snapshot(self, nvml: Any) -> GpuSnapshot:
        gpu = self._find(nvml)
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


def _visible(nvml: Any, listed: str | None) -> list[Any]:
    """Return the handles of the GPUs that `CUDA_VISIBLE_DEVICES` leaves, whose value is *listed*.

    As in CUDA, the list ends at the first entry that is none, and an empty one leaves nothing
    (CUDA C++ Programming Guide, "CUDA Environment Variables").
    """
    every = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if listed is None:
        return every
    found = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdigit() and int(entry) < len(every):
            found.append(every[int(entry)])
            continue
        try:
            found.append(_by_uuid(nvml, every, entry))
        except UnknownGpuError:
            break
    return found


def _by_uuid(nvml: Any, gpus: list[Any], uuid: str) -> Any:
    """Return the GPU whose UUID begins with *uuid*, as in `CUDA_VISIBLE_DEVICES`."""
    found = [gpu for gpu in gpus if _text(nvml.nvmlDeviceGetUUID(gpu)).startswith(uuid)]
    if uuid.startswith("MIG-"):
        # A part of a GPU is not in the list.
        return nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    if len(found) != 1 or not uuid.startswith("GPU-"):
        what = "several cards begin" if found else "no card begins"
        raise UnknownGpuError(f"{what} with {uuid}; nvidia-smi -L lists them")
    return found[0]


def _cpus(listed: str) -> frozenset[int]:
    """Read the kernel's list of CPUs, such as `0-15,32-47`."""
    found: set[int] = set()
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _program(pid: int) -> str:
    """Return the program's name without its arguments, which may be secret."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a program outside this container"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
