"""Collect the facts that `klein doctor` reports; `checks` interprets them.

Each source may be missing and says so: torch, a compiler, the cache's folder. `app.telemetry.gpu`
tells of the GPU, `plan_preview` asks the engine's planner. Only `ask_torch` imports torch, since
that takes seconds.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from app.cli.doctor.files import FilesFound, examine_files, examine_vae
from app.cli.doctor.plan_preview import PlanPreview, Target, preview_plan
from app.domain import Device, ModelSpec
from app.engine import roofline
from app.engine.hub import disk, trust
from app.engine.hub.download import choose_file, missing_bytes
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import files_for, find_model
from app.engine.quantization.formats import FORMATS, automatic
from app.engine.race.results import Results
from app.engine.runtime.toolchain import CompilerFound, find_compiler
from app.errors import StartupError
from app.model_choice import Choice, choose_model, largest_card, lora_directory, planned_rank
from app.settings import ALL, CPU, Settings
from app.telemetry.cards import Cards
from app.telemetry.gpu import GpuFacts
from app.worker.placement import see_only


@dataclass(frozen=True, slots=True)
class TorchFound:
    """What torch reports; *runs* names the formats whose kernels passed their probes.

    *lacking* maps the names of probed formats whose library is missing to the reason.
    """

    version: str
    cuda: str | None
    sees_gpu: bool
    runs: tuple[str, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)
    race: Results | None = None
    """The race that a start would go by; None where none was held yet."""


AskTorch = Callable[[Sequence[Device]], Sequence[TorchFound]]
"""Asks torch of each card; where there is none, once for itself."""


@dataclass(frozen=True, slots=True)
class CardFound:
    """One card that KLEIN_DEVICE names, and what klein would do on it.

    *gpu* is None where KLEIN_DEVICE is cpu; a str says why a fact is missing.
    """

    gpu: GpuFacts | str | None
    torch: TorchFound
    forecast: PlanPreview | str | None = None
    name: str = ""
    """Such as `card 1`, where there are several."""


@dataclass(frozen=True, slots=True)
class CacheFound:
    """The cache folder and the disk that holds it."""

    folder: str
    total_bytes: int
    missing_bytes: int
    disk_free_bytes: int
    is_writable: bool
    open_because: str = ""
    """Who else may write there; empty where nobody may."""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HostFound:
    """The host's memory."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything known of the machine; a str says why a fact is missing.

    *model* is None where none could be chosen.
    """

    cards: tuple[CardFound, ...]
    """At least one, which may be missing."""
    compiler: CompilerFound
    host: HostFound
    choice: Choice | str
    model: ModelSpec | None
    cache: CacheFound | None
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each kind of file in the cache folder."""
    files: FilesFound | None = None
    """What lies at the paths of KLEIN_MODEL and KLEIN_VAE, where they are set."""

    @property
    def is_klein(self) -> bool:
        """Whether the model comes from the hub, unlike the demo model."""
        return self.model is not None and self.model.hub_id is not None


def examine(settings: Settings, cards: Cards, ask_torch: AskTorch) -> Facts:
    """Collect all facts; change and download nothing."""
    named = _named(settings, cards)
    seen = [each for each in named.values() if isinstance(each, Device)]
    # Before torch is asked: its CUDA context would count as used memory.
    gpus = {each.uuid: cards.open(each).facts() for each in seen}
    first, *others = ask_torch(seen)
    asked = dict(zip(gpus, (first, *others), strict=False))
    compiler = find_compiler()
    try:
        choice: Choice | str = choose_model(settings, largest_card(settings, cards))
    except StartupError as error:
        choice = error.message
    entry = find_model(choice.key) if isinstance(choice, Choice) else None
    klein = None if entry is None or entry.is_embedded else entry
    rank = 0
    if isinstance(choice, Choice):
        rank = planned_rank(settings, choice, lora_directory(settings, choice))
    found: list[CardFound] = []
    for name, each in named.items():
        gpu: GpuFacts | str | None
        if isinstance(each, Device):
            gpu, torch = gpus[each.uuid], asked[each.uuid]
        else:
            gpu, torch = each, TorchFound(first.version, first.cuda, sees_gpu=False)
        ahead = _look_ahead(settings, klein, gpu, torch, compiler, rank)
        found.append(CardFound(gpu, torch, ahead, name if len(named) > 1 else ""))
    ahead = found[0].forecast
    precision = ahead.precision if isinstance(ahead, PlanPreview) else "bf16"
    is_cached = isinstance(choice, Choice) and not choice.path
    memory = psutil.virtual_memory()
    return Facts(
        cards=tuple(found),
        compiler=compiler,
        host=HostFound(memory.total, memory.available),
        choice=choice,
        model=entry.spec if entry else None,
        cache=_ask_cache(klein, settings, precision) if klein and is_cached else None,
        stored=disk.sums(disk.survey(settings.cache_dir)),
        files=_examine_given(settings, choice, entry),
    )


def _named(settings: Settings, cards: Cards) -> dict[str, Device | str | None]:
    """Return what KLEIN_DEVICE names; a str says why there is no such card."""
    if settings.is_cpu:
        return {CPU: None}
    if settings.device == ALL:
        return {f"card {each.index}": each for each in cards.visible()} or {"": cards.problem}
    found = {name: cards.find(name) for name in settings.device}
    return {
        f"card {each.index if isinstance(each, Device) else name}": each
        for name, each in found.items()
    }


def _examine_given(
    settings: Settings, choice: Choice | str, entry: ModelEntry | None
) -> FilesFound | None:
    """Judge the files that the settings name by path."""
    if isinstance(choice, str) or entry is None:
        return None
    if choice.path:
        return examine_files(Path(choice.path), settings.vae, entry, settings.cache_dir)
    return examine_vae(settings.vae) if settings.vae else None


def ask_torch(devices: Sequence[Device], *, cache: Path, again: bool) -> list[TorchFound]:
    """Import torch, and probe its kernels on each of *devices*; without any ask for its version.

    A race that was kept in *cache* says more than probes; *again* holds it, and keeps the result.
    """
    see_only(devices)
    import torch

    with warnings.catch_warnings():
        # torch warns of too old a driver here; `checks` reports that itself.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        _ask_torch(index, cache=cache, again=again)
        if index < min(count, len(devices))
        else TorchFound(str(torch.__version__), torch.version.cuda, sees_gpu=False)
        for index in range(max(1, len(devices)))
    ]


def _ask_torch(index: int, *, cache: Path, again: bool) -> TorchFound:
    import torch

    from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
    from app.engine.quantization.probe import probe_gpu
    from app.engine.race import measure
    from app.engine.race.encoder import forget
    from app.engine.runtime.kernels_choice import choose_kernels

    device = torch.device("cuda", index)
    has_kernels = choose_kernels(device, cache).is_on
    if again:
        forget(device, cache)
    hold_or_recall = partial(measure.race, again=True) if again else measure.known
    race = hold_or_recall(device, FLUX2_KLEIN_4B, cache, has_kernels=has_kernels)
    facts = probe_gpu(device)
    return TorchFound(
        str(torch.__version__),
        torch.version.cuda,
        sees_gpu=True,
        runs=tuple(facts.runs) if facts else (),
        lacking={each.name: why for each in automatic() if (why := each.missing())},
        race=race,
    )


def _look_ahead(
    settings: Settings,
    entry: ModelEntry | None,
    gpu: GpuFacts | str | None,
    torch: TorchFound,
    compiler: CompilerFound,
    lora_rank: int,
) -> PlanPreview | str | None:
    if entry is None or not isinstance(gpu, GpuFacts):
        return None
    target = Target(
        capability=gpu.capability,
        free_bytes=gpu.free_bytes,
        runs=torch.runs,
        race=torch.race,
        has_kernels=not compiler.missing,
        spec=roofline.recognise(gpu.name, gpu.total_bytes),
        lora_rank=lora_rank,
    )
    try:
        return preview_plan(target, settings, entry.spec)
    except StartupError as error:
        return error.message


def _ask_cache(variant: ModelEntry, settings: Settings, precision: str) -> CacheFound:
    """Count the bytes that *variant* needs at *precision*, and those not downloaded yet."""
    folder, linears = settings.cache_dir, FORMATS[precision]
    wanted = choose_file(variant, folder, linears.file, linears.instead(settings.engine_precision))
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    return CacheFound(
        folder=str(folder),
        total_bytes=sum(file.size_bytes for file in files_for(variant, wanted)),
        missing_bytes=missing_bytes(variant, folder, wanted),
        disk_free_bytes=shutil.disk_usage(above).free,
        is_writable=os.access(above, os.W_OK | os.X_OK),
        open_because=trust.why_open(folder, folder),
        remedy=trust.remedy(folder),
    )
