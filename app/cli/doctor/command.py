"""`klein doctor`: what this machine is, what the service will do on it, errors and warnings.

`facts` asks the machine and the engine's planner, `files` reads the headers of what KLEIN_MODEL or
`--model` leads to, and `checks` turns the answers into a report. The exit code is 0 where the
service can serve what its settings name, else 1. `--card rtx-3060` answers for a GPU that is not
installed. `--race` holds the race of the first start, and keeps its result.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

from app.cli.console import LOADING, Options
from app.cli.doctor import facts
from app.cli.doctor.absent_gpu import answer_for_absent_gpu
from app.cli.doctor.checks import diagnose
from app.cli.doctor.facts import AskTorch
from app.cli.old_cache import find_old_cache
from app.settings import Settings
from app.telemetry.cards import Cards

OPTIONS: Options = {
    "--race": {"action": "store_true", "help": "time the formats and kernels on the card again"},
    "--card": {"help": "answer for a card that is not there, such as rtx-3060"},
    **LOADING,
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    cards: Cards | None = None,
    ask_torch: AskTorch | None = None,
) -> int:
    """Print the report; return 0 where the service can serve, else 1."""
    if arguments.card:
        found = answer_for_absent_gpu(arguments.card, settings)
    else:
        asking = partial(facts.ask_torch, cache=settings.cache_dir, again=arguments.race)
        examined = facts.examine(settings, cards or Cards(), ask_torch or asking)
        found = diagnose(examined, settings)
        if arguments.race and all(each.torch.race is None for each in examined.cards):
            found.complain(
                "There is no card here on which the race could be held.",
                "Ask where torch sees the card, with KLEIN_DEVICE naming it.",
                is_fatal=False,
            )
        if (old := find_old_cache(settings)) is not None:
            found.complain(old.what, old.command, is_fatal=False)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found.render())
    return 0 if found.can_serve else 1
