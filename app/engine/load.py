"""From a config to a loaded model: find the files, choose precision and plan, build components."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from app.domain import LoadProgress, ModelInfo, ModelSpec, WorkerStage
from app.engine import advice, roofline, torch_private
from app.engine.adapters.fuse import fuse
from app.engine.checkpoint.compatibility import check_compatibility
from app.engine.checkpoint.detect import open_checkpoint
from app.engine.config import EngineConfig
from app.engine.hub import disk
from app.engine.memory.budget import choose_plan
from app.engine.memory.planner import MemoryPlan
from app.engine.models.entry import EMBEDDED_REVISION, Architecture
from app.engine.models.registry import find_model
from app.engine.modules.attention import (
    AUTO,
    KERNELS,
    AttentionKernel,
    check_attention,
    choice_of,
    choose_attention,
)
from app.engine.pipeline.build import BuildOptions, OnProgress, build
from app.engine.pipeline.components import PipelineComponents
from app.engine.quantization.formats import FORMATS
from app.engine.quantization.probe import probe_gpu
from app.engine.quantization.select import (
    GpuCapabilities,
    Precision,
    choose_precision,
    vae_dtype,
)
from app.engine.race.measure import capabilities, race
from app.engine.race.results import Results, choose
from app.engine.runtime.kernels_choice import EXACT, KernelsChoice, choose_kernels
from app.errors import FilesFault, StartupError

_log = logging.getLogger(__name__)

_FETCHED = LoadProgress(WorkerStage.LOADING)
"""Ends a download: what follows has another time limit."""
_FROM_FP8 = "; made from an fp8 file, whose error adds to its own: about 2.9 % together"
_FUSABLE = "bf16"
"""The transformer's file to whose weights adapters are added."""
_STACK_BYTES = 512
_STACK_LIMIT = 0
"""CU_LIMIT_STACK_SIZE in the CUDA driver API."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for its first image."""

    components: PipelineComponents
    revision: str
    precision: Precision
    plan: MemoryPlan
    features: tuple[str, ...]
    kernels: KernelsChoice
    attention: AttentionKernel | None
    """None where the libraries' own modules run."""
    race: Results | None
    advice: tuple[str, ...] = ()
    """What is missing besides what our kernels need."""

    def info(self, config: EngineConfig, warm_up_s: float, load_s: float) -> ModelInfo:
        """Describe what was loaded and how."""
        is_gpu = self.components.device.type == "cuda"
        return ModelInfo(
            model=config.model,
            revision=self.revision,
            device=torch.cuda.get_device_name(self.components.device) if is_gpu else "cpu",
            precision=self.precision.name,
            precision_reason=self.precision.reason,
            plan=self.plan.name.value,
            plan_reasons=self.plan.reasons,
            max_pixels=self.plan.max_pixels,
            # A plain string: the version object would import torch in the process that reads it.
            torch=str(torch.__version__),
            cuda=torch.version.cuda if is_gpu else None,
            features=(self.kernels.summary, *self.features),
            weights_bytes=self.components.weights_bytes,
            warm_up_s=warm_up_s,
            load_s=load_s,
            advice=(*_kernels_advice(self.kernels), *self.advice),
            attention=self.attention.name if self.attention else "",
            attention_choice=choice_of(self.attention) if self.attention else "",
            linear_shapes=self.components.adapters.shapes,
            race=self.race.milliseconds if self.race else {},
        )


def load(config: EngineConfig, model: ModelSpec, on_progress: OnProgress) -> LoadedModel:
    """Load the model, up to but without the warm-up image.

    Raises:
        StartupError: files, components or GPU cannot be used; one sentence says which and what
            to do.
    """
    device = find_device(config)
    _limit_memory(config, device)
    architecture = find_model(config.model).architecture
    is_small = _is_small(config)
    # Before the race, which runs kernels.
    kernels = choose_kernels(device, Path(config.cache_dir), is_exact=_asks_exact(config))
    facts, kernel, results = _judge(
        config, device, architecture, is_small=is_small, has_kernels=kernels.is_on
    )
    precision = choose_precision(config.precision, facts, is_small=is_small)
    with _files_at_fault():
        path, revision = _find(config, precision, on_progress)
    is_exact = precision.linears.is_exact
    with ExitStack() as stack:
        with _files_at_fault():
            checkpoint = open_checkpoint(
                path,
                elsewhere=lambda: stack.enter_context(_downloaded(config, on_progress)),
                vae=None if config.vae is None else Path(config.vae),
                is_mapped=config.offload == "disk" and is_exact,
            )
            stack.enter_context(checkpoint.files)
            for part in (checkpoint.transformer, checkpoint.encoder, checkpoint.vae):
                for source in part.sources:
                    disk.hold_published(source, Path(config.cache_dir))
            if config.lora_fuse:
                checkpoint.transformer = fuse(checkpoint.transformer, config.lora_fuse)
            check_compatibility(checkpoint, architecture, is_ours=config.path is None)
        if precision.linears.also_from and checkpoint.transformer.quantized:
            precision = replace(precision, reason=precision.reason + _FROM_FP8)
        if checkpoint.is_distilled not in (None, model.is_distilled):
            _log.warning(
                "The folder says is_distilled=%s, but it is served as %s, which says otherwise.",
                checkpoint.is_distilled,
                model.id,
            )
        kernels = EXACT if is_exact else kernels
        plan = choose_plan(
            config,
            model,
            architecture,
            checkpoint,
            device,
            precision,
            has_kernels=kernels.is_on,
        )
        components = build(
            checkpoint,
            BuildOptions(
                architecture=architecture,
                device=device,
                dtype=precision.dtype,
                vae_dtype=vae_dtype(precision, device),
                linears=precision.linears,
                encoder_linears=precision.encoder_linears,
                attention=kernel.call,
                kernels=kernels,
                plan=plan.name,
                is_pinned=config.offload != "disk",
                prompt_cache=config.prompt_cache,
                reference_cache=config.reference_cache,
                quantized_cache=Path(config.cache_dir),
                max_sequence_length=model.max_sequence_length,
                is_distilled=model.is_distilled,
            ),
            on_progress,
        )
    return LoadedModel(
        components=components,
        revision=revision,
        precision=precision,
        plan=plan,
        features=(
            *(("CUDA graphs",) if kernels.has_graphs else ()),
            *((f"attention by {kernel.name}",) if not is_exact else ()),
            *((f"prompt cache of {config.prompt_cache}",) if config.prompt_cache else ()),
            *((f"reference cache of {config.reference_cache}",) if config.reference_cache else ()),
            *((f"VAE {checkpoint.vae.label}",) if config.vae else ()),
            *(f"fused {lora.name}:{lora.scale:g}" for lora in config.lora_fuse),
            checkpoint.layout,
        ),
        kernels=kernels,
        attention=None if is_exact else kernel,
        race=results,
        advice=() if facts is None or is_small else _format_advice(config, precision, facts),
    )


@contextmanager
def _files_at_fault() -> Iterator[None]:
    """Have errors of what is done with the model's files say so.

    Raises:
        FilesFault: a `StartupError` or an `OSError` came up; it says the same.
    """
    try:
        yield
    except StartupError as error:
        raise FilesFault(error.message) from error
    except OSError as error:
        raise FilesFault(
            f"{error.filename} cannot be read ({error.strerror}); put the model's files back, or "
            "correct the path."
        ) from error


def _judge(
    config: EngineConfig,
    device: torch.device,
    architecture: Architecture,
    *,
    is_small: bool,
    has_kernels: bool,
) -> tuple[GpuCapabilities | None, AttentionKernel, Results | None]:
    """Return what the GPU can, its attention kernel, and the race that both come from, if any."""
    check_attention(config.attention)
    if device.type == "cpu" or is_small or _asks_exact(config):
        kernel = choose_attention(device, architecture, config.attention)
        return probe_gpu(device, architecture), kernel, None
    results = race(device, architecture, Path(config.cache_dir), has_kernels=has_kernels)
    winner = choose(results, config.precision, config.attention)
    raced = KERNELS.get(winner.attention) if config.attention == AUTO else None
    # A kept race imported nothing: the kernel's library is loaded here, or has gone since.
    if raced is None or raced.fault(device):
        raced = choose_attention(device, architecture, config.attention)
    return capabilities(results, winner), raced, results


def _asks_exact(config: EngineConfig) -> bool:
    """Return whether the operator names a precision that runs the libraries' own modules."""
    asked = FORMATS.get(config.precision)
    return asked is not None and asked.is_exact


def _kernels_advice(kernels: KernelsChoice) -> Iterator[str]:
    """Say what is missing where our kernels do not run."""
    if kernels.remedy:
        yield str(advice.on_kernels(kernels.reason, advice.to_run(kernels.remedy)))


def _format_advice(
    config: EngineConfig, precision: Precision, facts: GpuCapabilities
) -> tuple[str, ...]:
    """Say what it costs that a format's library is missing which was probed or asked for."""
    total = torch.cuda.get_device_properties(config.device).total_memory
    card = advice.Card(
        facts.capability, roofline.recognise(torch.cuda.get_device_name(config.device), total)
    )
    names = (*facts.faults, precision.linears.name)
    lacking = {name: why for name in names if (why := FORMATS[name].missing())}
    entry = find_model(config.model)
    found = advice.on_formats(config.precision, lacking, precision.linears, card, entry)
    return tuple(map(str, found))


def _find(config: EngineConfig, precision: Precision, on_progress: OnProgress) -> tuple[Path, str]:
    """Return the folder or file of the model and its revision, after a download where needed."""
    if config.path is not None:
        return Path(config.path), "local"
    entry = find_model(config.model)
    if entry.folder is not None:
        if not (entry.folder / "model_index.json").is_file():
            raise StartupError(
                f"The demo model {entry.spec.id} is missing from this installation; install the "
                "package again."
            )
        return entry.folder, EMBEDDED_REVISION
    # Imports the network's libraries.
    from app.engine.hub import download, fetch

    linears, cache = precision.linears, Path(config.cache_dir)
    wanted = download.choose_file(entry, cache, linears.file, linears.instead(config.precision))
    if config.lora_fuse and wanted != _FUSABLE:
        is_there = not download.missing_bytes(entry, cache, wanted)
        if is_there and download.missing_bytes(entry, cache, _FUSABLE):
            raise StartupError(
                f"KLEIN_LORA_FUSE adds to weights in {_FUSABLE}, and only the {wanted} file is "
                f"here; get the other with klein download --precision {_FUSABLE}, or use "
                "KLEIN_LORAS, which leaves the weights as they are."
            )
        wanted = _FUSABLE
    path = download.ensure(
        entry,
        cache,
        wanted,
        on_progress,
        hub=fetch.Hub(silence_s=config.download_silence_s),
    )
    on_progress(_FETCHED)
    return path, entry.revision


def find_device(config: EngineConfig) -> torch.device:
    """Return the device, or raise an error that says why there is none."""
    if config.device is None:
        if config.place is not None and config.place.threads:
            torch.set_num_threads(config.place.threads)
        return torch.device("cpu")
    try:
        # Not is_available: a worker's torch asks NVML, which knows cards that CUDA cannot use.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        _log.info("CUDA does not start: %s", error)
        raise StartupError(
            "No CUDA card can be used; check the driver with nvidia-smi, or set KLEIN_DEVICE=cpu."
        ) from None
    if config.device >= torch.cuda.device_count():
        raise StartupError(
            f"There is no card {config.device}; this machine has {torch.cuda.device_count()}, "
            "counted from 0. Set KLEIN_DEVICE to one of them."
        )
    torch.cuda.set_device(config.device)
    if config.place is not None:
        # A forked process has counted the cores before it was confined to those near its card.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.device("cuda", config.device)


def _is_small(config: EngineConfig) -> bool:
    """Return whether the weights are of test or demo size."""
    entry = find_model(config.model)
    if config.path is None:
        return entry.is_embedded
    path = Path(config.path)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return (
        sum(file.stat().st_size for file in files if file.is_file())
        < entry.architecture.small_bytes
    )


@contextmanager
def _downloaded(config: EngineConfig, on_progress: OnProgress) -> Iterator[Path | None]:
    """Yield a folder of the parts that a transformer alone lacks, at their pinned revision.

    Only what the catalogue's entry of this model names is in it.
    """
    if config.path is None or not (entry := find_model(config.model)).files:
        yield None
        return
    from app.engine.hub.download import lay_out_shared

    # A folder of its own: only these files are read, and nobody can add to them.
    with TemporaryDirectory(prefix="klein-parts-") as name:
        is_whole = lay_out_shared(entry, Path(config.cache_dir), Path(name), on_progress)
        if is_whole:
            on_progress(_FETCHED)
        yield Path(name) if is_whole else None


def _limit_memory(config: EngineConfig, device: torch.device) -> None:
    """Limit PyTorch's memory to this process's share: a wrong plan fails here, not elsewhere."""
    if device.type == "cpu":
        return
    _shrink_stacks(device)
    # Segments of all sizes share memory, which an image of another size would else fragment.
    torch_private.set_allocator("expandable_segments:True")
    if config.memory_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_bytes / total), device)


def _shrink_stacks(device: torch.device) -> None:
    """Halve the stack memory that CUDA reserves for all threads that can be resident on the GPU.

    This saves 138 MB on an H200. The driver enlarges the stacks for a kernel that needs more.
    """
    # The limit is the context's, which torch makes at the first call that needs one.
    torch.cuda.synchronize(device)
    try:
        code = ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(
            _STACK_LIMIT, ctypes.c_size_t(_STACK_BYTES)
        )
    except OSError as error:
        _log.debug("The driver's library was not found: %s.", error)
        return
    if code != 0:
        _log.debug("The driver keeps its stacks as they are, error %s.", code)
