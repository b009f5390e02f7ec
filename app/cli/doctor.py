"""`klein doctor`: what this machine is, what the service will do on it, and what must be mended.

Facts come from `app.cli.checkup`, choices from the engine by way of `app.cli.forecast`, the verdict
from `app.cli.judgement`. The exit code is 0 where the service can serve what it is set to, 1 where
something must be mended first. `--card rtx-3060` answers for a card that is not there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from app.cli import checkup
from app.cli.checkup import CacheFound, CardFound, CompilerFound, TorchFound
from app.cli.computed import answer_for_absent_card
from app.cli.forecast import Forecast, Target, forecast
from app.cli.judgement import Facts, diagnose
from app.cli.old_cache import find_old_cache
from app.domain import GpuSnapshot
from app.engine import catalog, floors
from app.errors import StartupError
from app.runtime import Choice, choose_model
from app.settings import Settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's own options."""
    parser = commands.add_parser("doctor", help="say what will be served here, and what is amiss")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of words")
    parser.add_argument("--card", help="answer for a card that is not there, such as rtx-3060")
    parser.add_argument("--model", help="catalogue key, local folder, or auto (KLEIN_MODEL)")
    parser.set_defaults(run=run, settings=lambda given: {"model": given.model})


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    load_nvml: Callable[[], Any] = checkup.load_nvml,
    ask_torch: Callable[[int | None], TorchFound] = checkup.ask_torch,
) -> int:
    """Examine and tell; return 0 where it can serve, else 1."""
    if arguments.card:
        found = answer_for_absent_card(arguments.card, settings)
    else:
        found = diagnose(examine(settings, load_nvml, ask_torch), settings)
        if (old := find_old_cache(settings)) is not None:
            found.complain(old.what, old.command, is_fatal=False)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found.render())
    return 0 if found.can_serve else 1


def examine(
    settings: Settings,
    load_nvml: Callable[[], Any],
    ask_torch: Callable[[int | None], TorchFound],
) -> Facts:
    """Ask every source; nothing is changed and nothing is downloaded."""
    index = settings.device if isinstance(settings.device, int) else None
    # Asked before torch, whose own context would be counted among what is in use.
    card = checkup.ask_card(index, load_nvml) if index is not None else None
    torch = ask_torch(index)
    compiler = checkup.ask_compiler()
    choice = _choose(settings, card)
    entry = catalog.entry(choice.key) if isinstance(choice, Choice) else None
    ahead = _look_ahead(settings, entry, card, torch, compiler)
    return Facts(
        card=card,
        torch=torch,
        compiler=compiler,
        host=checkup.ask_host(),
        choice=choice,
        model=entry.card if entry else None,
        forecast=ahead,
        cache=_ask_cache(settings, choice, entry, ahead),
    )


def _choose(settings: Settings, card: CardFound | str | None) -> Choice | str:
    snapshot = None
    if isinstance(card, CardFound):
        used = card.total_bytes - card.free_bytes
        snapshot = GpuSnapshot(card.name, "", used, card.total_bytes, None, None, None)
    try:
        return choose_model(settings, snapshot)
    except StartupError as error:
        return error.message


def _look_ahead(
    settings: Settings,
    entry: catalog.Entry | None,
    card: CardFound | str | None,
    torch: TorchFound,
    compiler: CompilerFound,
) -> Forecast | str | None:
    if entry is None or entry.is_embedded or not isinstance(card, CardFound):
        return None
    target = Target(
        capability=card.capability,
        free_bytes=card.free_bytes,
        has_fp8=torch.has_fp8,
        has_int8=torch.has_int8,
        can_compile=not compiler.missing,
        spec=floors.recognise(card.name, card.total_bytes),
    )
    try:
        return forecast(target, settings, entry.card)
    except StartupError as error:
        return error.message


def _ask_cache(
    settings: Settings,
    choice: Choice | str,
    entry: catalog.Entry | None,
    ahead: Forecast | str | None,
) -> CacheFound | None:
    if entry is None or entry.is_embedded or not isinstance(choice, Choice) or choice.path:
        return None
    precision = ahead.precision if isinstance(ahead, Forecast) else "bf16"
    return checkup.ask_cache(entry, settings.cache_dir, precision)
