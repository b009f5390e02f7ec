"""What `KLEIN_MODEL` and `KLEIN_DEVICE` mean on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.domain import GpuSnapshot
from app.engine.hub.hf_cache import find_snapshot
from app.engine.models.registry import MODELS, find_spec
from app.engine.quantization.formats import check_choice
from app.errors import StartupError
from app.settings import Settings, complete_path
from app.telemetry.gpu import Gpu
from app.telemetry.preflight import check_gpu, torch_cuda

KLEIN = "flux.2-klein-4b"
DEMO = "shapes"
SMALLEST_GPU_BYTES = 5_500_000_000
"""Total memory of a GPU sold with 6 GB; the smallest plan needs about 5 GB."""


def read_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read the settings, and check what the registries of the engine alone know.

    Raises:
        StartupError: as `Settings.read`, and for a precision that is none.
    """
    settings = Settings.read(environ, **overrides)
    check_choice(settings.precision)
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
        if settings.device == "cpu":
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


def choose_device(settings: Settings, choice: Choice, gpu: Gpu) -> int | None:
    """Choose the index of the GPU; None means the CPU.

    The demo model falls back to the CPU, unless KLEIN_DEVICE names a GPU.

    Raises:
        StartupError: the GPU cannot be used.
    """
    if settings.device == "cpu":
        return None
    if choice.is_demo:
        is_asked_for = "device" in settings.model_fields_set
        return settings.device if is_asked_for or gpu.read() is not None else None
    check_gpu(gpu, settings.device, torch_cuda())
    return settings.device
