"""What `KLEIN_MODEL`, `KLEIN_DEVICE` and the settings of adapters mean on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from app.domain import CPU, Device, GpuSnapshot, Lora
from app.engine.adapters.directory import FOLDER, SETTLE_S, Directory
from app.engine.adapters.shapes import linear_shapes
from app.engine.hub.hf_cache import find_snapshot
from app.engine.models.registry import MODELS, find_model, find_spec
from app.engine.quantization.formats import check_choice
from app.errors import StartupError
from app.settings import ALL, PER_CARD, Settings, complete_path
from app.telemetry.gpu import Gpu, GpuFacts
from app.telemetry.preflight import check_gpu, torch_cuda

_log = logging.getLogger(__name__)

KLEIN = "flux.2-klein-4b"
DEMO = "shapes"
SMALLEST_GPU_BYTES = 5_500_000_000
"""Total memory of a GPU sold with 6 GB; the smallest plan needs about 5 GB."""
LORA_RECORD = "loras.json"
"""Holds the hashes of adapters, in the cache."""
_LOOK_S = 2.0
"""To look for an adapter at the start."""


def read_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read the settings, and check what the registries of the engine alone know.

    Raises:
        StartupError: as `Settings.read`, and for a precision that is none.
    """
    settings = Settings.read(environ, **overrides)
    check_choice(settings.precision, PER_CARD)
    return settings


@dataclass(frozen=True, slots=True)
class Choice:
    """Which model is served, from which path (None: the cache or the package), and why."""

    key: str
    path: str | None
    reason: str

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded demo."""
        return self.key == DEMO and self.path is None


def choose_model(settings: Settings, gpu_now: GpuSnapshot | None) -> Choice:
    """Choose the model that `KLEIN_MODEL` means on this machine.

    Raises:
        StartupError: it is neither a catalogue key nor a path that exists.
    """
    name = settings.model
    if name == "auto":
        if settings.is_cpu:
            return Choice(DEMO, None, "KLEIN_DEVICE is cpu")
        if gpu_now is None:
            return Choice(DEMO, None, "no CUDA card was found")
        if gpu_now.total_bytes < SMALLEST_GPU_BYTES:
            return Choice(DEMO, None, f"{gpu_now.name} has less than 6 GB")
        return Choice(KLEIN, None, f"{gpu_now.name} can hold it")
    looks_like_path = "/" in name or name.startswith(".") or os.path.lexists(name)
    if looks_like_path and name not in MODELS:
        try:
            path = complete_path(Path(name))
        except ValueError as error:
            raise StartupError(f"KLEIN_MODEL is a path that cannot be used: {error}.") from None
        if not os.access(path, os.F_OK):
            raise StartupError(
                "KLEIN_MODEL is a path at which there is nothing; correct it and start again."
            )
        # A file keeps its name: in Hugging Face's cache it is a link to one named by a hash.
        path = path.parent.resolve() / path.name if path.is_file() else path.resolve()
        found = find_snapshot(path)
        reason = "KLEIN_MODEL is a path" + ("" if found == path else " in Hugging Face's cache")
        return Choice(find_spec(settings.variant).id, str(found), reason)
    return Choice(find_spec(name).id, None, "KLEIN_MODEL names it")


def choose_devices(settings: Settings, choice: Choice, gpu: Gpu) -> tuple[Device, ...]:
    """Choose what each worker computes on; *gpu* is any GPU, through which others are found.

    The demo model falls back to the CPU, unless KLEIN_DEVICE names a GPU.

    Raises:
        StartupError: a GPU cannot be used.
    """
    if settings.is_cpu:
        return _shares(len(settings.device))
    is_asked_for = "device" in settings.model_fields_set
    if choice.is_demo and not is_asked_for and gpu.read() is None:
        return (CPU,)
    is_all = settings.device == (ALL,)
    names = tuple(map(str, range(gpu.count()))) or ("0",) if is_all else settings.device
    found: list[Device] = []
    for name in names:
        try:
            found.append(_find_device(gpu.of(name), name, len(found), choice))
        except StartupError as error:
            if not is_all or (name == names[-1] and not found):
                raise
            _log.warning("Card %s is left out: %s", name, error.message)
    if len({each.uuid for each in found}) < len(found):
        raise StartupError("KLEIN_DEVICE names a card twice; name each once and start again.")
    return tuple(found)


def _find_device(gpu: Gpu, name: str, index: int, choice: Choice) -> Device:
    """Describe the GPU that KLEIN_DEVICE calls *name*."""
    if not choice.is_demo:
        check_gpu(gpu, torch_cuda())
    now, facts = gpu.read(), gpu.facts()
    if now is None:
        # Without NVML, CUDA alone knows the cards.
        return Device(index, name="GPU", uuid=name, number=int(name) if name.isdigit() else 0)
    return Device(
        index,
        now.name,
        now.uuid,
        total_bytes=now.total_bytes,
        capability=facts.capability if isinstance(facts, GpuFacts) else None,
        cpus=gpu.cpus(),
        number=None,
    )


def _shares(count: int) -> tuple[Device, ...]:
    if count == 1:
        return (CPU,)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return tuple(Device(index, uuid=f"cpu:{index}", threads=threads) for index in range(count))


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """Where adapters lie, which are fused, and the rank that GPU memory is planned for."""

    directory: Directory
    fused: tuple[Lora, ...]
    planned_rank: int


def lora_directory(settings: Settings, choice: Choice, *, settle_s: float = SETTLE_S) -> Directory:
    """Return the directory of adapters, to which a model in the package adds its own."""
    folders = [settings.lora_dir or settings.cache_dir / FOLDER]
    package = find_model(choice.key).folder
    if choice.path is None and package is not None:
        folders.append(package / FOLDER)
    return Directory(folders, record=settings.cache_dir / LORA_RECORD, settle_s=settle_s)


def choose_loras(settings: Settings, choice: Choice) -> LoraChoice:
    """Choose what is fused, and whether memory for adapters is planned.

    It is where somebody is known to use them: KLEIN_LORA_RANK or KLEIN_LORAS is set, or the folder
    holds an adapter of the model. Else the plan is what it is without adapters, and one that is
    added later takes what the plan has left.

    Raises:
        StartupError: an adapter of KLEIN_LORA_FUSE is not there.
    """
    if settings.lora_dir is not None and not settings.lora_dir.is_dir():
        _log.warning("KLEIN_LORA_DIR names no folder; until there is one no adapter is listed.")
    directory = lora_directory(settings, choice)
    fused = tuple(_find_fused(directory, *each) for each in settings.lora_fuse)
    return LoraChoice(directory, fused, planned_rank(settings, choice, directory))


def asked_rank(settings: Settings) -> int:
    """Return the rank that the settings ask memory for; 0 where they say nothing of adapters."""
    is_asked_for = bool(settings.loras) or "lora_rank" in settings.model_fields_set
    return settings.lora_rank if is_asked_for else 0


def planned_rank(settings: Settings, choice: Choice, directory: Directory) -> int:
    """Return the rank that memory is planned for: that of the settings, or of what lies there."""
    if rank := asked_rank(settings):
        return rank
    shapes = linear_shapes(find_model(choice.key).architecture)
    return settings.lora_rank if directory.holds_any(shapes, _LOOK_S) else 0


def _find_fused(directory: Directory, name: str, scale: float) -> Lora:
    """Find an adapter of KLEIN_LORA_FUSE; whether it fits, the engine says."""
    files = {file.name: file for file in directory.walk()[0]}
    if name not in files:
        near = ", ".join(get_close_matches(name, files, n=3))
        like = f"; names like it are {near}" if near else ""
        raise StartupError(
            f"KLEIN_LORA_FUSE names {name}, but there is no such adapter{like}. `klein lora list` "
            "shows those there are."
        )
    try:
        return Lora(name, scale, directory.hash(files[name]), str(files[name].path))
    except OSError as error:
        raise StartupError(
            f"The file of {name}, which KLEIN_LORA_FUSE names, cannot be read ({error.strerror})."
        ) from None
