"""Collect the facts that `klein doctor` reports; `checks` interprets them.

Each source may be missing and says so: NVML, torch, a compiler, the cache's folder. Only
`ask_torch` imports torch, since that takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.cli.bench.machine import host_memory
from app.engine.hub import trust
from app.engine.hub.download import missing_bytes
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import files_for
from app.engine.quantization.formats import FORMATS


@dataclass(frozen=True, slots=True)
class Holder:
    """A process on the GPU; *used_bytes* is None where the driver does not report it."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What NVML reports of the GPU; *capability* is (major, minor)."""

    name: str
    driver: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class TorchFound:
    """What torch reports; *runs* names the formats whose kernels passed their probes."""

    version: str
    cuda: str | None
    sees_gpu: bool
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompilerFound:
    """What torch.compile needs; None or False for what is missing."""

    c_compiler: str | None
    has_triton: bool
    has_headers: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of what is missing."""
        parts = (
            ("a C compiler", self.c_compiler is not None),
            ("Python's headers", self.has_headers),
            ("Triton", self.has_triton),
        )
        return tuple(name for name, is_there in parts if not is_there)


@dataclass(frozen=True, slots=True)
class CacheFound:
    """The cache folder and the disk that holds it."""

    folder: str
    total_bytes: int
    missing_bytes: int
    disk_free_bytes: int
    is_writable: bool
    open_because: str = ""
    """Who else may write there; empty where nobody may."""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HostFound:
    """The host's memory."""

    total_bytes: int
    available_bytes: int


def load_nvml() -> Any:
    """Return the `pynvml` module."""
    import pynvml

    return pynvml


def ask_gpu(index: int, load: Callable[[], Any] = load_nvml) -> GpuFacts | str:
    """Ask NVML about GPU *index*; return the reason as a str where it cannot tell."""
    nvml = load()
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        if index >= count:
            return f"there is no card {index}; this machine has {count}, counted from 0"
        return _read_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as error:
        return str(error).lower()


def ask_torch(index: int | None) -> TorchFound:
    """Import torch, and probe its kernels on GPU *index* unless that is None."""
    import torch

    with warnings.catch_warnings():
        # torch warns of too old a driver here; `checks` reports that itself.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index is None or index >= count:
        return TorchFound(str(torch.__version__), torch.version.cuda, sees_gpu=False)
    from app.engine.quantization.probe import probe_gpu

    facts = probe_gpu(torch.device("cuda", index))
    return TorchFound(
        str(torch.__version__),
        torch.version.cuda,
        sees_gpu=True,
        runs=tuple(facts.runs) if facts else (),
    )


def ask_compiler() -> CompilerFound:
    """Look for what torch.compile needs."""
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return CompilerFound(
        c_compiler=next((path for path in found if path), None),
        has_triton=importlib.util.find_spec("triton") is not None,
        has_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    )


def ask_cache(variant: ModelEntry, folder: Path, precision: str) -> CacheFound:
    """Count the bytes that *variant* needs at *precision*, and those not downloaded yet."""
    wanted = FORMATS[precision].file
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    return CacheFound(
        folder=str(folder),
        total_bytes=sum(file.size_bytes for file in files_for(variant, wanted)),
        missing_bytes=missing_bytes(variant, folder, wanted),
        disk_free_bytes=shutil.disk_usage(above).free,
        is_writable=os.access(above, os.W_OK | os.X_OK),
        open_because=trust.why_open(folder, folder),
        remedy=trust.remedy(folder),
    )


def ask_host() -> HostFound:
    """Read total and available memory from /proc/meminfo."""
    return HostFound(host_memory("MemTotal"), host_memory("MemAvailable"))


def _read_gpu(nvml: Any, handle: Any) -> GpuFacts:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return GpuFacts(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        capability=(int(major), int(minor)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        holders=_holders(nvml, handle),
    )


def _holders(nvml: Any, handle: Any) -> tuple[Holder, ...]:
    """List the processes on the GPU, the largest first; none where the driver names none."""
    found: dict[int, Holder] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            processes = ask(handle)
        except nvml.NVMLError:
            continue
        for process in processes:
            found[process.pid] = Holder(
                process.pid, _process_name(process.pid), process.usedGpuMemory
            )
    return tuple(sorted(found.values(), key=lambda one: one.used_bytes or 0, reverse=True))


def _process_name(pid: int) -> str:
    """Return the program's name without its arguments, which may be secret."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process outside this container"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
