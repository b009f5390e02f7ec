"""`klein doctor`: what this machine is, what the service will do on it, errors and warnings.

`facts` asks the machine, `plan_preview` the engine's planner, and `checks` turns both into a
report. The exit code is 0 where the service can serve what its settings name, else 1.
`--card rtx-3060` answers for a GPU that is not installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import psutil

from app.cli.doctor import facts
from app.cli.doctor.absent_gpu import answer_for_absent_gpu
from app.cli.doctor.checks import Facts, diagnose
from app.cli.doctor.facts import CacheFound, CompilerFound, HostFound, TorchFound
from app.cli.doctor.plan_preview import PlanPreview, Target, preview_plan
from app.cli.old_cache import find_old_cache
from app.engine import roofline
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import find_model
from app.errors import StartupError
from app.model_choice import Choice, choose_model
from app.settings import Settings
from app.telemetry.gpu import Gpu, GpuFacts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--json", action="store_true", help="one JSON document instead of words")
    parser.add_argument("--card", help="answer for a card that is not there, such as rtx-3060")
    parser.add_argument("--model", help="catalogue key, local folder, or auto (KLEIN_MODEL)")


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    gpu: Gpu | None = None,
    ask_torch: Callable[[int | None], TorchFound] = facts.ask_torch,
) -> int:
    """Print the report; return 0 where the service can serve, else 1."""
    if arguments.card:
        found = answer_for_absent_gpu(arguments.card, settings)
    else:
        found = diagnose(examine(settings, gpu, ask_torch), settings)
        if (old := find_old_cache(settings)) is not None:
            found.complain(old.what, old.command, is_fatal=False)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found.render())
    return 0 if found.can_serve else 1


def examine(
    settings: Settings, gpu: Gpu | None, ask_torch: Callable[[int | None], TorchFound]
) -> Facts:
    """Collect all facts; change and download nothing."""
    index = settings.device if isinstance(settings.device, int) else None
    # Before torch is asked: its CUDA context would count as used memory.
    gpu = None if index is None else gpu or Gpu(index)
    gpu_facts = gpu.facts() if gpu else None
    torch = ask_torch(index)
    compiler = facts.ask_compiler()
    try:
        now = gpu.read() if gpu and isinstance(gpu_facts, GpuFacts) else None
        choice: Choice | str = choose_model(settings, now)
    except StartupError as error:
        choice = error.message
    entry = find_model(choice.key) if isinstance(choice, Choice) else None
    ahead = _look_ahead(settings, entry, gpu_facts, torch, compiler)
    memory = psutil.virtual_memory()
    return Facts(
        gpu=gpu_facts,
        torch=torch,
        compiler=compiler,
        host=HostFound(memory.total, memory.available),
        choice=choice,
        model=entry.spec if entry else None,
        forecast=ahead,
        cache=_ask_cache(settings, choice, entry, ahead),
    )


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
