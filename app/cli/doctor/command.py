"""`klein doctor`: what this machine is, what the service will do on it, errors and warnings.

`facts` asks the machine, `plan_preview` the engine's planner, and `checks` turns both into a
report. The exit code is 0 where the service can serve what its settings name, else 1.
`--card rtx-3060` answers for a GPU that is not installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from app.cli.doctor import facts
from app.cli.doctor.absent_gpu import answer_for_absent_gpu
from app.cli.doctor.checks import Facts, diagnose
from app.cli.doctor.facts import CacheFound, CompilerFound, GpuFacts, TorchFound
from app.cli.doctor.plan_preview import PlanPreview, Target, preview_plan
from app.cli.old_cache import find_old_cache
from app.domain import GpuSnapshot
from app.engine import roofline
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import find_model
from app.errors import StartupError
from app.model_choice import Choice, choose_model
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
    load_nvml: Callable[[], Any] = facts.load_nvml,
    ask_torch: Callable[[int | None], TorchFound] = facts.ask_torch,
) -> int:
    """Print the report; return 0 where the service can serve, else 1."""
    if arguments.card:
        found = answer_for_absent_gpu(arguments.card, settings)
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
    """Collect all facts; change and download nothing."""
    index = settings.device if isinstance(settings.device, int) else None
    # Before torch is asked: its CUDA context would count as used memory.
    gpu = facts.ask_gpu(index, load_nvml) if index is not None else None
    torch = ask_torch(index)
    compiler = facts.ask_compiler()
    choice = _choose(settings, gpu)
    entry = find_model(choice.key) if isinstance(choice, Choice) else None
    ahead = _look_ahead(settings, entry, gpu, torch, compiler)
    return Facts(
        gpu=gpu,
        torch=torch,
        compiler=compiler,
        host=facts.ask_host(),
        choice=choice,
        model=entry.spec if entry else None,
        forecast=ahead,
        cache=_ask_cache(settings, choice, entry, ahead),
    )


def _choose(settings: Settings, gpu: GpuFacts | str | None) -> Choice | str:
    snapshot = None
    if isinstance(gpu, GpuFacts):
        used = gpu.total_bytes - gpu.free_bytes
        snapshot = GpuSnapshot(gpu.name, "", used, gpu.total_bytes, None, None, None)
    try:
        return choose_model(settings, snapshot)
    except StartupError as error:
        return error.message


def _look_ahead(
    settings: Settings,
    entry: ModelEntry | None,
    gpu: GpuFacts | str | None,
    torch: TorchFound,
    compiler: CompilerFound,
) -> PlanPreview | str | None:
    if entry is None or entry.is_embedded or not isinstance(gpu, GpuFacts):
        return None
    target = Target(
        capability=gpu.capability,
        free_bytes=gpu.free_bytes,
        runs=torch.runs,
        can_compile=not compiler.missing,
        spec=roofline.recognise(gpu.name, gpu.total_bytes),
    )
    try:
        return preview_plan(target, settings, entry.spec)
    except StartupError as error:
        return error.message


def _ask_cache(
    settings: Settings,
    choice: Choice | str,
    entry: ModelEntry | None,
    ahead: PlanPreview | str | None,
) -> CacheFound | None:
    if entry is None or entry.is_embedded or not isinstance(choice, Choice) or choice.path:
        return None
    precision = ahead.precision if isinstance(ahead, PlanPreview) else "bf16"
    return facts.ask_cache(entry, settings.cache_dir, precision)
