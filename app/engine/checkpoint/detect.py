"""Detect the layout of a checkpoint by its content, and open it component by component.

Known are diffusers' folder, the same with the transformer as one file at its top (as the
catalogue's download puts it), ComfyUI's models folder as it stands, and one file beside any of
them. Where a folder holds no tokenizer, as ComfyUI's, it is the package's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from app.engine.checkpoint import qwen3
from app.engine.checkpoint import vae as vae_files
from app.engine.checkpoint.files import Checkpoint, ComponentFiles, read_config, slots_of
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.checkpoint.transformer import read_transformer
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B, TOKENIZER
from app.errors import StartupError

_log = logging.getLogger(__name__)

_COMFY_TRANSFORMERS = ("diffusion_models", "unet")
_COMFY_ENCODERS = ("text_encoders", "clip")

Elsewhere = Callable[[], Path | None]
Open = Callable[[Path], SafetensorsFile]
"""Opens a file, which is closed with the checkpoint's others."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Formats that can run code: files with these names are not opened."""


def open_checkpoint(
    path: Path,
    *,
    elsewhere: Elsewhere = lambda: None,
    vae: Path | None = None,
    is_mapped: bool = False,
) -> Checkpoint:
    """Detect the layout of *path* by its content and open it.

    Where *path* is a transformer alone, the other components are looked for in what *elsewhere*
    returns, a folder in diffusers' layout; it is called only then. The file *vae* takes the place
    of the model's VAE. With *is_mapped* weights stay in the files (`SafetensorsFile`).

    Raises:
        StartupError: the layout is unknown, or a file of it is damaged or unsupported.
    """
    if not path.exists():
        raise StartupError(f"There is no model at {path}; correct the path and start again.")
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise _pickled(path)
    try:
        return _open(path, elsewhere, vae, is_mapped=is_mapped)
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        # Names and shapes may be anything; they are validated where each is needed.
        # It may also be a bug of this program, which the sentence would hide.
        _log.warning("The files do not fit together.", exc_info=True)
        raise StartupError(
            f"{path.name} cannot be used: what its files say of themselves does not fit together "
            f"({type(error).__name__}); it belongs to another model or is damaged."
        ) from None


def _open(path: Path, elsewhere: Elsewhere, vae: Path | None, *, is_mapped: bool) -> Checkpoint:
    with ExitStack() as opened:

        def open_file(file: Path) -> SafetensorsFile:
            return opened.enter_context(SafetensorsFile(file, is_mapped=is_mapped))

        given = None if vae is None else open_vae(vae, open_file)
        if path.is_file():
            checkpoint = _open_file(path, elsewhere, open_file, given)
        elif (path / "model_index.json").is_file():
            checkpoint = _open_diffusers(path, open_file, given)
        elif any((path / name).is_dir() for name in _COMFY_TRANSFORMERS):
            checkpoint = _open_comfy(path, None, open_file, given)
        elif len(alone := sorted(path.glob("*.safetensors"))) == 1:
            checkpoint = _open_file(alone[0], elsewhere, open_file, given)
        else:
            raise StartupError(
                f"{path} is no model that is known; give a folder with a model_index.json, "
                "ComfyUI's models folder, or a transformer in one safetensors file."
            )
        checkpoint.files = opened.pop_all()
        return checkpoint


def _open_diffusers(
    path: Path,
    open_file: Open,
    vae: ComponentFiles | None,
    transformer_file: Path | None = None,
) -> Checkpoint:
    index = read_config(path / "model_index.json")
    config = read_config(path / "transformer" / "config.json")
    own = sorted(path.glob("*.safetensors"))
    is_folder = any((path / "transformer").glob("*.safetensors"))
    if transformer_file is None and len(own) == 1 and not is_folder:
        transformer_file = own[0]
    transformer = (
        _open_folder(path / "transformer", config, open_file)
        if transformer_file is None
        else read_transformer(open_file(transformer_file), config)
    )

    def open_part(name: str) -> ComponentFiles:
        return _open_folder(path / name, read_config(path / name / "config.json"), open_file)

    return Checkpoint(
        layout="diffusers folder" + (f" with {transformer_file.name}" if transformer_file else ""),
        transformer=transformer,
        encoder=open_part("text_encoder"),
        vae=vae or open_part("vae"),
        scheduler=read_config(path / "scheduler" / "scheduler_config.json"),
        tokenizer=_find_tokenizer(path),
        is_distilled=index.get("is_distilled"),
    )


def _open_file(
    path: Path, elsewhere: Elsewhere, open_file: Open, vae: ComponentFiles | None
) -> Checkpoint:
    """Open one file as the transformer; the other components are those of the folder it is in."""
    if path.parent.name in _COMFY_TRANSFORMERS:
        return _open_comfy(path.parent.parent, path, open_file, vae)
    for find in (lambda: path.parent, elsewhere):
        if (folder := find()) is not None and (folder / "model_index.json").is_file():
            return _open_diffusers(folder, open_file, vae, path)
    raise StartupError(
        f"{path.name} holds the transformer only; put it beside a diffusers folder's "
        "model_index.json or into ComfyUI's models/diffusion_models, or download the model once."
    )


def _open_comfy(
    path: Path, transformer_file: Path | None, open_file: Open, vae: ComponentFiles | None
) -> Checkpoint:
    transformer = transformer_file or _only(path, _COMFY_TRANSFORMERS, "klein")
    encoder = open_file(_only(path, _COMFY_ENCODERS, "qwen_3_4b"))
    return Checkpoint(
        layout="ComfyUI models folder",
        transformer=read_transformer(open_file(transformer), None),
        encoder=qwen3.read_encoder(encoder),
        vae=vae or vae_files.read_vae(open_file(_only(path, ("vae",), "flux2"))),
        scheduler=dict(FLUX2_KLEIN_4B.scheduler),
        tokenizer=_find_tokenizer(path),
        is_distilled=None,
    )


def _find_tokenizer(path: Path) -> Path:
    own = path / "tokenizer"
    return own if own.is_dir() else TOKENIZER


def open_vae(path: Path, open_file: Open) -> ComponentFiles:
    """Open the file that KLEIN_VAE names.

    Raises:
        StartupError: it is missing, or holds no VAE of FLUX.2.
    """
    if path.suffix.lower() in PICKLES:
        raise _pickled(path)
    if not path.is_file():
        raise StartupError(
            f"KLEIN_VAE names {path.name}, which is no file there; give a VAE in one safetensors "
            "file."
        )
    return vae_files.read_vae(open_file(path))


def _only(path: Path, folders: tuple[str, ...], word: str) -> Path:
    """Find the one file of a kind: the only one, else the only one with *word* in its name."""
    found = sorted(
        file
        for name in folders
        for pattern in ("*.safetensors", "*.gguf")
        for file in (path / name).glob(pattern)
    )
    others = (file for name in folders for file in sorted((path / name).glob("*")))
    pickled = next((file for file in others if file.suffix.lower() in PICKLES), None)
    if not found and pickled is not None:
        raise _pickled(pickled)
    named = [file for file in found if word in file.name.lower()] if len(found) > 1 else found
    if len(named) == 1:
        return named[0]
    raise StartupError(
        f"ComfyUI's folder {folders[0]} holds {len(named)} files that could be meant"
        f" ({', '.join(file.name for file in named[:3])}); "
        "give the path of the transformer's file, and leave one encoder and one VAE for it."
    )


def _pickled(path: Path) -> StartupError:
    return StartupError(
        f"{path.name} is not read, since its format can run code; give the safetensors file."
    )


def _open_folder(folder: Path, config: Mapping[str, Any], open_file: Open) -> ComponentFiles:
    """Open the safetensors files of *folder*: those its index names, else the only ones there."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = sorted(set(dict(read_config(index)["weight_map"]).values()))
        paths = [folder / Path(name).name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths or not all(each.is_file() for each in paths):
        found = [each.name for each in sorted(folder.glob("*")) if each.suffix.lower() in PICKLES]
        raise StartupError(
            f"{folder} holds no whole set of safetensors files"
            f"{' but ' + found[0] if found else ''}; only safetensors are read, "
            "since other formats can run code."
        )
    tensors = {name: found for each in paths for name, found in open_file(each).tensors.items()}
    return ComponentFiles(folder.name, config, slots_of(tensors), sources=tuple(paths))
