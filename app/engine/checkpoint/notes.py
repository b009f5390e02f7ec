"""What a transformer's file says of its own quantization, as `klein selftest` reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.engine.checkpoint.detect import open_checkpoint
from app.engine.checkpoint.files import ComponentFiles
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.checkpoint.transformer import read_transformer

_INPUT_SCALES = (".input_scale", ".scale_input")
_METADATA_CHARACTERS = 50_000
PLACEHOLDER = 1.0
"""The input scale of a layer that was not calibrated."""


@dataclass(frozen=True, slots=True)
class FileNotes:
    """The fp8 layers of one transformer; *input_scales* by the file's own names."""

    fp8_layers: int
    full_precision_layers: int
    """Layers for which the file requires a matmul in full precision."""
    input_scales: Mapping[str, float]
    metadata: str
    """The header's `_quantization_metadata`, cut where it is long."""

    @property
    def summary(self) -> str:
        """One line of figures."""
        if not self.fp8_layers:
            return "no fp8 layers in the file"
        scales = [each for each in self.input_scales.values() if each != PLACEHOLDER]
        between = f", {min(scales):.3g} to {max(scales):.3g}" if scales else ""
        return (
            f"{self.fp8_layers} fp8 layers, {len(scales)} with an input_scale{between}, "
            f"{len(self.input_scales) - len(scales)} with the placeholder, "
            f"{self.full_precision_layers} in full precision"
        )


def read_notes(path: Path, vae: Path | None = None) -> FileNotes:
    """Read the notes and scales of the transformer at *path*, a file or a model's folder.

    *vae* is KLEIN_VAE: the folder may hold no other.

    Raises:
        StartupError: it cannot be read.
    """
    is_model = (path / "model_index.json").is_file()
    files = [path] if path.is_file() else [] if is_model else sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        with SafetensorsFile(files[0]) as file:
            return _notes_of(read_transformer(file, None))
    checkpoint = open_checkpoint(path, vae=vae)
    with checkpoint.files:
        return _notes_of(checkpoint.transformer)


def _notes_of(part: ComponentFiles) -> FileNotes:
    scales: dict[str, float] = {}
    metadata = ""
    for source in part.sources:
        with SafetensorsFile(source) as file:
            metadata += file.metadata.get("_quantization_metadata", "")
            for name, tensor in file.tensors.items():
                if name.endswith(_INPUT_SCALES):
                    scales[name] = float(tensor.read().float().max())
    return FileNotes(
        fp8_layers=len(part.quantized),
        full_precision_layers=sum(each.is_full_precision for each in part.quantized.values()),
        input_scales=scales,
        metadata=metadata[:_METADATA_CHARACTERS],
    )
