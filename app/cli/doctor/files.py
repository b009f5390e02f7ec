"""Judge the files at a path by their headers: what is there, what comes from where, what is amiss.

The checks are those of a start, up to the first weight; nothing is hashed, linked or downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from app.engine.hub.download import find_shared
from app.engine.models.entry import ModelEntry
from app.engine.models.flux2_klein import TOKENIZER
from app.errors import StartupError

if TYPE_CHECKING:
    from app.engine.checkpoint.files import Checkpoint, ComponentFiles

_PLACES = {
    "transformer": ("transformer", "diffusion_models", "unet", "."),
    "text encoder": ("text_encoder", "text_encoders", "clip"),
    "VAE": ("vae",),
}


@dataclass(frozen=True, slots=True)
class FilesFound:
    """What lies at the path; *layout* is None and *problem* set where it cannot be loaded."""

    layout: str | None
    parts: Mapping[str, str]
    """For each component, in words: its file, size and stored precision, or that it is missing."""
    problem: str = ""


def examine_files(path: Path, vae: Path | None, entry: ModelEntry, cache: Path) -> FilesFound:
    """Judge what lies at *path*, to be served as *entry*; *vae* and *cache* are settings."""
    # Imports torch and diffusers, so only where a path is given.
    from app.engine.checkpoint.compatibility import check_compatibility
    from app.engine.checkpoint.detect import open_checkpoint
    from app.engine.pipeline.build import check_parts

    with ExitStack() as stack:
        parts = Path(stack.enter_context(TemporaryDirectory(prefix="klein-parts-")))

        def find_parts() -> Path | None:
            """Return a folder of links to what an earlier download left."""
            shared = find_shared(entry, cache)
            for file, found in shared.items():
                (parts / file.path).parent.mkdir(parents=True, exist_ok=True)
                (parts / file.path).symlink_to(found)
            return parts if shared else None

        try:
            checkpoint = open_checkpoint(path, elsewhere=find_parts, vae=vae)
            stack.enter_context(checkpoint.files)
            check_compatibility(checkpoint, entry.architecture, is_ours=False)
            check_parts(checkpoint)
        except StartupError as error:
            return FilesFound(None, _survey(path, vae), error.message)
        other = f"the download of {entry.spec.id} at {entry.revision[:8]}"
        return FilesFound(checkpoint.layout, _describe(checkpoint, parts, other))


def examine_vae(path: Path) -> FilesFound:
    """Judge the file that KLEIN_VAE names, where the model's other files are the catalogue's."""
    from app.engine.checkpoint.detect import open_vae
    from app.engine.checkpoint.safetensors_io import SafetensorsFile
    from app.engine.pipeline.build import check_vae

    parts, problem = {"VAE": f"{path} (KLEIN_VAE)"}, ""
    with ExitStack() as stack:
        try:
            check_vae(open_vae(path, lambda file: stack.enter_context(SafetensorsFile(file))))
        except StartupError as error:
            problem = error.message
    return FilesFound(None, parts, problem)


def _describe(checkpoint: Checkpoint, parts: Path, other: str) -> dict[str, str]:
    """Say which files each component is; those that lie in *parts* are from *other*."""
    described = {}
    for name, part in (
        ("transformer", checkpoint.transformer),
        ("text encoder", checkpoint.encoder),
        ("VAE", checkpoint.vae),
    ):
        size = sum(path.stat().st_size for path in part.sources)
        names = ", ".join(path.name for path in part.sources)
        place = f", from {other}" if part.sources[0].is_relative_to(parts) else ""
        described[name] = f"{names} ({_precision(part)}, {size / 1e9:.2f} GB){place}"
    tokenizer = checkpoint.tokenizer
    described["tokenizer"] = (
        "the package's, Qwen3's"
        if tokenizer == TOKENIZER
        else f"from {other}"
        if tokenizer.is_relative_to(parts)
        else "the folder's own"
    )
    return described


def _precision(part: ComponentFiles) -> str:
    """Name the format that most weights of *part* are stored in."""
    from app.engine.checkpoint.safetensors_io import NAMES

    if part.quantized:
        return f"fp8, {len(part.quantized)} layers"
    weights: Counter[str] = Counter()
    for slot in part.slots.values():
        weights[NAMES[slot.dtype]] += prod(slot.shape)
    return weights.most_common(1)[0][0]


def _survey(path: Path, vae: Path | None) -> dict[str, str]:
    """Say which components have files at *path* at all, where they cannot be opened together."""
    folder = path
    if path.is_file():
        is_comfy = path.parent.name in _PLACES["transformer"]
        folder = path.parent.parent if is_comfy else path.parent
    found = {}
    for name, places in _PLACES.items():
        files = [
            str(file.relative_to(folder))
            for place in places
            for file in sorted((folder / place).glob("*.safetensors"))
        ]
        found[name] = ", ".join(files) or "missing"
    if path.is_file():
        found["transformer"] = path.name
    if vae is not None:
        found["VAE"] = f"{vae} (KLEIN_VAE)"
    return found
