"""`klein cache list|prune`: what lies in KLEIN_CACHE_DIR, and down to how much it is deleted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from app.cli.console import CACHE_DIR, MODEL, Options, aligned, tabulate
from app.engine.hub import disk
from app.engine.hub.disk import Pruned, Stored
from app.engine.models.entry import RemoteFile
from app.engine.models.registry import MODELS, find_model
from app.errors import InvalidRequest, StartupError
from app.model_choice import DEMO, KLEIN
from app.settings import Settings

OPTIONS: Options = {
    "action": {"choices": ("list", "prune"), "help": "show it, or delete down to a limit"},
    "--to-gb": {"type": float, "help": "prune: GB that may be left (KLEIN_CACHE_MAX_GB)"},
    "--dry-run": {"action": "store_true", "help": "prune: only say what would be deleted"},
    **MODEL,
    **CACHE_DIR,
}

_COLUMNS: dict[str, Callable[[Stored], str]] = {
    "kind": lambda each: each.kind.value,
    "bytes": lambda each: f"{each.size_bytes:,}",
    "last use": lambda each: f"{datetime.fromtimestamp(each.used_at):%Y-%m-%d %H:%M}",
    "name": lambda each: each.name,
}


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """List or prune; return 0, or 1 where more is left than the limit allows."""
    if arguments.action == "list":
        stored = disk.survey(settings.cache_dir)
        print(
            _document(settings.cache_dir, stored)
            if arguments.json
            else _list(settings.cache_dir, stored)
        )
        return 0
    limit_gb = settings.cache_max_gb if arguments.to_gb is None else arguments.to_gb
    if arguments.to_gb is None and limit_gb == 0:
        raise InvalidRequest("Say what may be left: --to-gb 10, or KLEIN_CACHE_MAX_GB=10.")
    if not 0 <= limit_gb < float("inf"):
        raise InvalidRequest("--to-gb takes a number of GB, 0 or more.")
    try:
        pruned = disk.prune(
            settings.cache_dir,
            int(limit_gb * 1e9),
            served=_served(settings.model, settings.variant),
            is_trial=arguments.dry_run,
        )
    except OSError as error:
        raise StartupError(
            f"KLEIN_CACHE_DIR could not be pruned ({error.strerror}: {error.filename})."
        ) from None
    lines = _told(pruned, is_trial=arguments.dry_run)
    print(_pruned(pruned, arguments.dry_run) if arguments.json else "\n".join(lines))
    return 0 if pruned.left_bytes <= limit_gb * 1e9 else 1


def _document(cache_dir: Path, stored: Iterable[Stored]) -> str:
    return json.dumps({"folder": str(cache_dir), "data": [_plain(each) for each in stored]})


def _pruned(pruned: Pruned, is_trial: bool) -> str:
    return json.dumps(
        {
            "dry_run": is_trial,
            "removed": [_plain(each) for each in pruned.removed],
            "kept": [_plain(each) for each in pruned.kept],
            "is_downloading": pruned.is_downloading,
            "left_bytes": pruned.left_bytes,
        }
    )


def _plain(stored: Stored) -> dict[str, object]:
    return {
        "kind": stored.kind.value,
        "name": stored.name,
        "bytes": stored.size_bytes,
        "used_at": int(stored.used_at),
    }


def _list(cache_dir: Path, stored: Sequence[Stored]) -> str:
    if not stored:
        return f"{cache_dir}: nothing"
    totals = ", ".join(f"{kind} {size:,}" for kind, size in disk.sums(stored).items())
    total = sum(each.size_bytes for each in stored)
    return "\n".join(
        [*aligned(tabulate(_COLUMNS, stored)), f"{cache_dir}: {total:,} bytes ({totals})"]
    )


def _served(model: str, variant: str) -> tuple[RemoteFile, ...]:
    """Return the files that a start with these settings may need, whatever card is found."""
    if model == "auto":
        keys: tuple[str, ...] = (KLEIN, DEMO)
    else:
        keys = (model if model in MODELS else variant,)
    return tuple(file for key in keys for file in find_model(key).files)


def _told(pruned: Pruned, *, is_trial: bool) -> list[str]:
    done = "would delete" if is_trial else "deleted"
    lines = [f"{done}: {each.name}, {each.size_bytes:,} bytes" for each in pruned.removed]
    lines += [
        f"kept, in use or where others may write: {each.name}, {each.size_bytes:,} bytes"
        for each in pruned.kept
    ]
    if pruned.is_downloading:
        lines.append("Nothing was deleted, because another process downloads into the cache.")
    left = "would be left" if is_trial else "left"
    return [*lines, f"{left}: {pruned.left_bytes:,} bytes"]
