"""`klein lora list|add|remove|check`: the adapters, and files that may become some."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from app.cli.console import CACHE_DIR, MODEL, Options, aligned, progress_bar, tabulate
from app.engine.adapters.directory import (
    FOLDER,
    MAX_NAME,
    SUFFIX,
    Adapter,
    Directory,
    File,
    Listing,
    is_model_name,
    name_of,
    printable,
)
from app.engine.adapters.layout import MAX_BYTES, AdapterRefused, Layout, Shapes, read_layout
from app.engine.adapters.names import targets_of
from app.engine.adapters.shapes import linear_shapes
from app.engine.hub.adapters import download, parse_address
from app.engine.hub.fetch import Hub, hash_file
from app.engine.hub.trust import close_umask, make_folder, whole_file
from app.engine.models.registry import find_model
from app.errors import InvalidRequest, StartupError
from app.model_choice import Choice, choose_model, largest_card, lora_directory
from app.settings import Settings
from app.telemetry.cards import Cards

OPTIONS: Options = {
    "action": {"choices": ("list", "add", "remove", "check"), "help": "what to do"},
    "what": {
        "nargs": "?",
        "help": "add: a file, or owner/repository@commit:path/file.safetensors of the hub; "
        "remove: a name; check: a file",
    },
    "--name": {"help": "add: what requests name it by; the file's name where left out"},
    "--sha256": {"help": "add: what the file must have; needed for a hub id"},
    **MODEL,
    **CACHE_DIR,
}

_COLUMNS: dict[str, Callable[[Adapter], str]] = {
    "name": lambda each: each.name,
    "rank": lambda each: str(each.rank),
    "bytes": lambda each: f"{each.size_bytes:,}",
    "sha256": lambda each: each.sha256,
}
_WRITERS = {
    "diffusion_model.": "ai-toolkit, ComfyUI",
    "model.diffusion_model.": "ComfyUI",
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    cards: Cards | None = None,
    hub: Hub | None = None,
) -> int:
    """Do what is asked; return 0, or 1 where a file that was checked cannot be used."""
    if (arguments.what is None) != (arguments.action == "list"):
        raise InvalidRequest(
            "klein lora list takes nothing more; add and check take a file, remove takes a name."
        )
    close_umask()
    choice = choose_model(settings, largest_card(settings, cards or Cards()))
    shapes = linear_shapes(find_model(choice.key).architecture)
    if arguments.action == "list":
        *_, found = lora_directory(settings, choice, settle_s=0.0).look(shapes)
        folder = settings.lora_dir or settings.cache_dir / FOLDER
        print(_document(folder, found) if arguments.json else _list(folder, found, choice))
        return 0
    if arguments.action == "check":
        return _check(Path(arguments.what), choice, shapes, as_json=arguments.json)
    folder = _own_folder(settings)
    if arguments.action == "remove":
        return _remove(arguments.what, folder, as_json=arguments.json)
    return _add(arguments, folder, shapes, hub or Hub(silence_s=settings.download_silence_s))


def _list(folder: Path, found: Listing, choice: Choice) -> str:
    lines = [f"{folder}: no adapter of {choice.key}"]
    if found.adapters:
        lines = aligned(tabulate(_COLUMNS, found.adapters))
    return "\n".join(
        [*lines, *(f"not listed: {each.file}: {each.reason}" for each in found.refused)]
    )


def _document(folder: Path, found: Listing) -> str:
    names = ("name", "rank", "size_bytes", "sha256")
    return json.dumps(
        {
            "folder": str(folder),
            "data": [{name: getattr(each, name) for name in names} for each in found.adapters],
            "refused": [{"file": each.file, "reason": each.reason} for each in found.refused],
        }
    )


def _check(path: Path, choice: Choice, shapes: Shapes, *, as_json: bool) -> int:
    try:
        layout = read_layout(path, targets_of(shapes), shapes)
    except AdapterRefused as refused:
        reason = printable(str(refused))
        print(json.dumps({"is_usable": False, "reason": reason}) if as_json else reason)
        return 1
    except OSError as error:
        raise InvalidRequest(f"{printable(path)} cannot be read ({error.strerror}).") from None
    found = _describe(path, layout, choice.key, shapes)
    if as_json:
        print(json.dumps({"is_usable": True, **found}))
    else:
        print("\n".join(f"{name:8}{value}" for name, value in found.items()))
    return 0


def _describe(path: Path, layout: Layout, model: str, shapes: Shapes) -> dict[str, str]:
    key = next(key for word, (key, _) in layout.layers[0].tensors.items() if word != "alpha")
    writers = [writer for prefix, writer in _WRITERS.items() if key.startswith(prefix)]
    kinds = {"LoRA" if "down" in layer.tensors else "LoKr" for layer in layout.layers}
    modules = {module for layer in layout.layers for module in layer.target.modules}
    return {
        "file": f"{printable(path.name)}, {path.stat().st_size:,} bytes",
        "sha256": hash_file(path),
        "kind": f"{' and '.join(sorted(kinds))} for {model}",
        "keys": f"of {writers[0] if writers else 'no prefix'}: {printable(key)}",
        "rank": f"{layout.rank}",
        "layers": f"{len(modules)} of {len(shapes)}",
        "name": name_of(path.name),
    }


def _own_folder(settings: Settings) -> Path:
    """Return the folder in the cache; another one is only read."""
    own = settings.cache_dir / FOLDER
    if settings.lora_dir not in (None, own):
        raise StartupError(
            "KLEIN_LORA_DIR names a folder that klein only reads; change what lies in it yourself, "
            "or unset it to use the one in KLEIN_CACHE_DIR."
        )
    return own


def _add(arguments: argparse.Namespace, folder: Path, shapes: Shapes, hub: Hub) -> int:
    source = Path(arguments.what)
    is_local = os.path.lexists(source)
    remote = None if is_local else parse_address(arguments.what, arguments.sha256)
    name = _new_name(arguments.name, source.name if remote is None else remote.path.split("/")[-1])
    target = folder / f"{name}{SUFFIX}"
    make_folder(folder, folder.parent)
    if _is_there(target, name, folder, arguments.sha256):
        _say(name, f"{name} is there already", arguments)
        return 0
    if remote is None:
        _check_file(source, shapes, arguments.sha256)
        with source.open("rb") as file, whole_file(target) as copy:
            shutil.copyfileobj(file, copy)
            os.fchmod(copy.fileno(), 0o644)
    else:
        # Hidden, so that it is listed only once it was checked.
        arrived = folder / f".{remote.sha256[:16]}{SUFFIX}"
        with progress_bar() as show:
            download(
                remote,
                arrived,
                hub,
                MAX_BYTES,
                lambda done, size: show(done / size, f"{done / 1e6:.0f} MB", size),
            )
        try:
            _check_file(arrived, shapes, remote.sha256)
            arrived.replace(target)
        finally:
            arrived.unlink(missing_ok=True)
    _say(name, f"added {name}; a service that runs lists it within a few seconds", arguments)
    return 0


def _say(name: str, words: str, arguments: argparse.Namespace) -> None:
    print(json.dumps({"name": name}) if arguments.json else words)


def _new_name(asked: str | None, file_name: str) -> str:
    name = name_of(file_name) if asked is None else asked
    if name != name_of(name):
        raise InvalidRequest(
            f"--name takes at most {MAX_NAME} ASCII letters, digits, dots, dashes and underscores."
        )
    if is_model_name(name):
        raise InvalidRequest(f"{name} is the name of a model; give another one by --name.")
    return name


def _is_there(target: Path, name: str, folder: Path, sha256: str | None) -> bool:
    """Return whether the very file is there; refuse to replace another one."""
    taken = _find(name, folder)
    if taken is None and not os.path.lexists(target):
        return False
    if sha256 is not None and taken is not None and hash_file(taken.path) == sha256:
        return True
    raise InvalidRequest(
        f"There is an adapter {name}; remove it first, or give another name by --name."
    )


def _check_file(path: Path, shapes: Shapes, sha256: str | None) -> None:
    try:
        read_layout(path, targets_of(shapes), shapes)
        found = hash_file(path) if sha256 is not None else None
    except AdapterRefused as refused:
        raise InvalidRequest(printable(str(refused))) from None
    if found != sha256:
        raise InvalidRequest(f"The file's SHA-256 is {found}, which is not the one given.")


def _remove(name: str, folder: Path, *, as_json: bool) -> int:
    found = _find(name, folder)
    if found is None:
        raise InvalidRequest(
            f"There is no adapter {printable(name)} in the cache; `klein lora list` shows the "
            "names."
        )
    found.path.unlink()
    print(json.dumps({"name": name}) if as_json else f"removed {name}")
    return 0


def _find(name: str, folder: Path) -> File | None:
    return next((file for file in Directory([folder]).walk()[0] if file.name == name), None)
