"""From a config to a loaded model: find the files, choose precision and plan, build the parts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from app.domain import LoadProgress, ModelCard, ModelInfo
from app.engine import catalog
from app.engine.checkpoint import Checkpoint, open_checkpoint
from app.engine.config import EngineConfig
from app.engine.fit import check_fit
from app.engine.loaders import klein, shapes
from app.engine.parts import Parts
from app.engine.precision import Precision, choose_precision
from app.engine.residency import Residency
from app.errors import StartupError

_log = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]

_SMALL_BYTES = 1_000_000_000
_WORKING_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Files:
    """Where the model lies: *is_ours* when it was downloaded by the catalogue's entry."""

    path: Path
    revision: str
    is_ours: bool


@dataclass(frozen=True, slots=True)
class Started:
    """A model ready for its first picture."""

    parts: Parts
    files: Files
    precision: Precision
    plan: str
    plan_reasons: tuple[str, ...]

    def info(self, config: EngineConfig, warm_up_s: float, load_s: float) -> ModelInfo:
        """Say what was loaded and how."""
        is_card = self.parts.device.type == "cuda"
        return ModelInfo(
            model=config.model,
            revision=self.files.revision,
            device=torch.cuda.get_device_name(self.parts.device) if is_card else "cpu",
            precision=self.precision.name,
            precision_reason=self.precision.reason,
            plan=self.plan,
            plan_reasons=self.plan_reasons,
            max_pixels=(config.max_pixels,) * 5,
            torch=torch.__version__,
            cuda=torch.version.cuda if is_card else None,
            weights_bytes=self.parts.weights_bytes,
            warm_up_s=warm_up_s,
            load_s=load_s,
        )


def start(config: EngineConfig, card: ModelCard, scratch: Path, on_progress: OnProgress) -> Started:
    """Do everything up to the warm-up picture.

    Raises:
        StartupError: files, parts or card do not do; one sentence says which and what to do.
    """
    device = find_device(config)
    precision = choose_precision(
        config.precision, has_card=device.type == "cuda", is_small=_is_small(config)
    )
    files = _find(config, precision, scratch, on_progress)
    checkpoint = open_checkpoint(files.path)
    try:
        check_fit(checkpoint, is_klein=files.is_ours and card.hub_id is not None)
        is_resident, plan, reasons = _plan(config, checkpoint, device, precision)
        parts = klein.build(
            checkpoint,
            device=device,
            dtype=precision.dtype,
            residency=Residency(device, is_resident=is_resident),
            max_sequence_length=card.max_sequence_length,
            is_distilled=_is_distilled(checkpoint.is_distilled, card),
            on_progress=on_progress,
        )
    finally:
        checkpoint.close()
    return Started(parts, files, precision, plan, reasons)


def _find(
    config: EngineConfig, precision: Precision, scratch: Path, on_progress: OnProgress
) -> Files:
    if config.path is not None:
        return Files(Path(config.path), "local", is_ours=False)
    entry = catalog.entry(config.model)
    if entry.is_embedded:
        path, revision = shapes.locate(scratch)
        return Files(path, revision, is_ours=True)
    from app.engine.download import ensure

    path = ensure(entry, Path(config.cache_dir), precision.name, on_progress)
    return Files(path, entry.revision, is_ours=True)


def find_device(config: EngineConfig) -> torch.device:
    """Find the card, or say in one sentence why there is none."""
    if config.device is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StartupError(
            "No CUDA card can be used; check the driver with nvidia-smi, or set KLEIN_DEVICE=cpu."
        )
    if config.device >= torch.cuda.device_count():
        raise StartupError(
            f"There is no card {config.device}; this machine has {torch.cuda.device_count()}, "
            "counted from 0. Set KLEIN_DEVICE to one of them."
        )
    torch.cuda.set_device(config.device)
    return torch.device("cuda", config.device)


def _is_small(config: EngineConfig) -> bool:
    """Whether the weights are of test or demo size."""
    if config.path is None:
        return catalog.entry(config.model).is_embedded
    path = Path(config.path)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) < _SMALL_BYTES


def _plan(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, precision: Precision
) -> tuple[bool, str, tuple[str, ...]]:
    """Decide whether all networks stay on the card; return that, the plan and its reasons."""
    if device.type == "cpu":
        return True, "host", ("the model runs on the processor",)
    parts = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
    counts = (math.prod(slot.shape) for part in parts for slot in part.slots.values())
    needed = sum(counts) * precision.dtype.itemsize + _WORKING_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    numbers = f"needed {needed / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
    if config.offload in ("model", "disk"):
        return False, "offload", ("as asked for", numbers)
    if config.offload == "none" or needed <= free:
        return True, "resident", (numbers,)
    return False, "offload", (f"the networks do not fit together: {numbers}",)


def _is_distilled(found: bool | None, card: ModelCard) -> bool:
    """The catalogue decides; a folder that says otherwise is told of in the log."""
    if found is not None and found != card.is_distilled:
        _log.warning(
            "The folder says is_distilled=%s, but it is served as %s, which says otherwise.",
            found,
            card.id,
        )
    return card.is_distilled
