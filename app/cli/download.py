"""`klein download`: download a model into the cache ahead of time, or verify the cache."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.cli.console import CACHE_DIR, STAGES, Options, Progress, progress_bar
from app.domain import LoadProgress
from app.engine.hub.download import choose_file, ensure, missing_bytes, verify
from app.engine.hub.fetch import Hub
from app.engine.hub.trust import close_umask
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import MODELS, files_for, find_model
from app.engine.quantization.formats import AUTO, FORMATS, choices
from app.model_choice import named_cards
from app.settings import Settings, complete_path
from app.telemetry.cards import Cards
from app.worker.placement import see_only

OPTIONS: Options = {
    "--model": {"help": "catalogue key (KLEIN_MODEL)"},
    "--precision": {"choices": choices(), "help": "decides which transformer"},
    "--verify": {"action": "store_true", "help": "only hash again what lies there"},
    **CACHE_DIR,
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    find: Callable[[str], ModelEntry] = find_model,
    hub: Hub | None = None,
) -> int:
    """Download or verify; return 0, or 1 where a file is wrong or missing."""
    if settings.model not in MODELS and _is_there(settings.model):
        return _nothing("KLEIN_MODEL is a local folder or file", as_json=arguments.json)
    variant = find(next(iter(MODELS)) if settings.model == "auto" else settings.model)
    if variant.is_embedded:
        why = f"{variant.spec.title}: it comes with the package"
        return _nothing(why, as_json=arguments.json)
    asked = settings.engine_precision
    close_umask()
    precision = asked if asked != AUTO else _precision_of_this_machine(variant, settings)
    linears = FORMATS[precision]
    instead = linears.instead(asked)
    wanted = choose_file(variant, settings.cache_dir, linears.file, instead)
    hub = hub or Hub(silence_s=settings.download_silence_s)
    if arguments.verify:
        return _verify(variant, settings.cache_dir, wanted, as_json=arguments.json)
    return _download(variant, settings.cache_dir, precision, wanted, hub, as_json=arguments.json)


def _nothing(why: str, *, as_json: bool) -> int:
    print(
        json.dumps({"files": [], "note": why})
        if as_json
        else f"{why}, there is nothing to download."
    )
    return 0


def _is_there(name: str) -> bool:
    with suppress(ValueError):
        return os.access(complete_path(Path(name)), os.F_OK)
    return False


def _download(
    variant: ModelEntry, cache_dir: Path, precision: str, wanted: str, hub: Hub, *, as_json: bool
) -> int:
    files = files_for(variant, wanted)
    total = sum(file.size_bytes for file in files)
    missing = missing_bytes(variant, cache_dir, wanted)
    if not as_json:
        print(
            f"{variant.spec.title} at {precision}: {len(files)} files, {total / 1e9:.2f} GB, of "
            f"which {missing / 1e9:.2f} GB are to be downloaded\n"
            f"  licence  {variant.spec.licence}\n"
            f"  from     {', '.join(dict.fromkeys(file.repository for file in files))}\n"
            f"  to       {cache_dir}",
            flush=True,
        )
    with progress_bar() as show:
        folder = ensure(variant, cache_dir, wanted, _told_by(show, total), hub=hub)
    document = {
        "model": variant.spec.id,
        "precision": precision,
        "folder": str(folder),
        "files": [file.path for file in files],
        "bytes": total,
        "downloaded_bytes": missing,
    }
    print(json.dumps(document) if as_json else f"ready in {folder}")
    return 0


def _verify(variant: ModelEntry, cache_dir: Path, wanted: str, *, as_json: bool) -> int:
    total = sum(file.size_bytes for file in files_for(variant, wanted))
    with progress_bar() as show:
        found = verify(variant, cache_dir, wanted, _told_by(show, total))
    right = sum(state is True for state in found.values())
    if as_json:
        states = {True: "right", False: "damaged", None: "missing"}
        files = [{"path": file.path, "state": states[state]} for file, state in found.items()]
        print(json.dumps({"model": variant.spec.id, "files": files}))
    else:
        words = {True: "right", False: "DAMAGED, deleted", None: "missing"}
        for file, state in found.items():
            print(f"{words[state]:17} {file.path}")
        print(f"{right} of {len(found)} files are right.")
    return 0 if right == len(found) else 1


def _precision_of_this_machine(variant: ModelEntry, settings: Settings) -> str:
    """Return the precision that the service would choose here, by the race that it holds."""
    named = named_cards(settings, Cards())[:1]
    see_only(named)
    import torch

    from app.engine.quantization.select import choose_precision
    from app.engine.race.measure import capabilities, race
    from app.engine.race.results import choose
    from app.engine.runtime.kernels_choice import choose_kernels

    facts = None
    if named and torch.cuda.is_available():
        device = torch.device("cuda", 0)
        results = race(
            device,
            variant.architecture,
            settings.cache_dir,
            has_kernels=choose_kernels(device, settings.cache_dir).is_on,
        )
        facts = capabilities(results, choose(results, attention=settings.attention))
    return choose_precision(AUTO, facts, is_small=False).name


def _told_by(show: Progress, total_bytes: int) -> Callable[[LoadProgress], None]:
    return lambda progress: show(
        progress.fraction, f"{STAGES[progress.stage]}, {progress.detail}", total_bytes
    )
