"""Collect the facts that `klein doctor` reports; `checks` interprets them.

Each source may be missing and says so: torch, a compiler, the cache's folder. `app.telemetry.gpu`
tells of the GPU, `plan_preview` asks the engine's planner. Only `ask_torch` imports torch, since
that takes seconds.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from app.cli.doctor.files import FilesFound, examine_files, examine_vae
from app.cli.doctor.plan_preview import PlanPreview, Target, preview_plan
from app.domain import ModelSpec
from app.engine import roofline
from app.engine.hub import disk, trust
from app.engine.hub.download import choose_file, missing_bytes
from app.engine.models.entry import ModelEntry
from app.engine.models.registry import files_for, find_model
from app.engine.quantization.formats import FORMATS, automatic
from app.engine.race.results import Results
from app.engine.runtime.toolchain import CompilerFound, find_compiler
from app.errors import StartupError
from app.model_choice import Choice, choose_model, lora_directory, planned_rank
from app.settings import Settings
from app.telemetry.gpu import Gpu, GpuFacts, show_only


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

    *gpu* is None where KLEIN_DEVICE is cpu, *model* where none could be chosen.
    """

    gpu: GpuFacts | str | None
    torch: TorchFound
    compiler: CompilerFound
    host: HostFound
    choice: Choice | str
    model: ModelSpec | None
    forecast: PlanPreview | str | None
    cache: CacheFound | None
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each kind of file in the cache folder."""
    files: FilesFound | None = None
    """What lies at the paths of KLEIN_MODEL and KLEIN_VAE, where they are set."""

    @property
    def is_klein(self) -> bool:
        """Whether the model comes from the hub, unlike the demo model."""
        return self.model is not None and self.model.hub_id is not None


def examine(
    settings: Settings, gpu: Gpu | None, ask_torch: Callable[[str | None], TorchFound]
) -> Facts:
    """Collect all facts; change and download nothing."""
    # Before torch is asked: its CUDA context would count as used memory.
    gpu = None if settings.is_cpu else (gpu or Gpu()).of(settings.gpu)
    gpu_facts = gpu.facts() if gpu else None
    snapshot = gpu.read() if gpu else None
    torch = ask_torch(None if gpu is None else snapshot.uuid if snapshot else "")
    compiler = find_compiler()
    try:
        now = snapshot if isinstance(gpu_facts, GpuFacts) else None
        choice: Choice | str = choose_model(settings, now)
    except StartupError as error:
        choice = error.message
    entry = find_model(choice.key) if isinstance(choice, Choice) else None
    klein = None if entry is None or entry.is_embedded else entry
    rank = 0
    if isinstance(choice, Choice):
        rank = planned_rank(settings, choice, lora_directory(settings, choice))
    ahead = _look_ahead(settings, klein, gpu_facts, torch, compiler, rank)
    precision = ahead.precision if isinstance(ahead, PlanPreview) else "bf16"
    is_cached = isinstance(choice, Choice) and not choice.path
    memory = psutil.virtual_memory()
    return Facts(
        gpu=gpu_facts,
        torch=torch,
        compiler=compiler,
        host=HostFound(memory.total, memory.available),
        choice=choice,
        model=entry.spec if entry else None,
        forecast=ahead,
        cache=_ask_cache(klein, settings, precision) if klein and is_cached else None,
        stored=disk.sums(disk.survey(settings.cache_dir)),
        files=_examine_given(settings, choice, entry),
    )


def _examine_given(
    settings: Settings, choice: Choice | str, entry: ModelEntry | None
) -> FilesFound | None:
    """Judge the files that the settings name by path."""
    if isinstance(choice, str) or entry is None:
        return None
    if choice.path:
        return examine_files(Path(choice.path), settings.vae, entry, settings.cache_dir)
    return examine_vae(settings.vae) if settings.vae else None


def ask_torch(uuid: str | None, *, cache: Path, again: bool) -> TorchFound:
    """Import torch, and probe its kernels on the GPU of this *uuid* unless that is None.

    A race that was kept in *cache* says more than probes; *again* holds it, and keeps the result.
    """
    if uuid:
        show_only(uuid)
    import torch

    with warnings.catch_warnings():
        # torch warns of too old a driver here; `checks` reports that itself.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if uuid is None or not count:
        return TorchFound(str(torch.__version__), torch.version.cuda, sees_gpu=False)
    from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
    from app.engine.quantization.probe import probe_gpu
    from app.engine.race import measure
    from app.engine.runtime.kernels_choice import choose_kernels

    device = torch.device("cuda", 0)
    has_kernels = choose_kernels(device, cache).is_on
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
