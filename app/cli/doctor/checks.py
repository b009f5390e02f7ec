"""Turn facts into a report: pure, so that any machine can be checked on any other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace

from app.cli.doctor.facts import CacheFound, CardFound, Facts, HostFound, TorchFound
from app.cli.doctor.files import FilesFound
from app.cli.doctor.plan_preview import PlanPreview, name_kernels
from app.cli.doctor.report import Report, gigabytes
from app.domain import ModelSpec
from app.engine.advice import Card, on_formats, on_kernels, to_run
from app.engine.memory.planner import MemoryPlan, Plan
from app.engine.models.registry import find_model
from app.engine.quantization.formats import FORMATS
from app.engine.roofline import find_gpu, recognise
from app.engine.runtime.toolchain import CompilerFound, install_command
from app.settings import ALL, Settings
from app.telemetry.gpu import GpuFacts, Holder
from app.telemetry.preflight import GpuFault, find_faults, mend_driver, minimum_driver

PINNED_CUDA = "13.0"
"""CUDA version of the pinned torch, which also has a CPU build."""

_OLDEST_CAPABILITY = (7, 5)
_NATIVE_BF16 = (8, 0)
_SEVERAL = 8
_FIRST_LOAD_BYTES = 10_000_000_000


def diagnose(facts: Facts, settings: Settings) -> Report:
    """Report the facts, and each problem with its remedy."""
    found = Report(data=_data(facts))
    _judge_torch(found, facts.cards[0].torch)
    _judge_model(found, facts, settings)
    reports = [_judge_card(facts, card, settings) for card in facts.cards]
    # Of `all` the service leaves out what cannot serve.
    is_spared = settings.device == ALL and any(each.can_serve for each in reports)
    for each in reports:
        found.lines += each.lines
        found.problems += [
            replace(problem, is_fatal=problem.is_fatal and not is_spared)
            for problem in each.problems
        ]
    _judge_processor(found, facts, settings)
    has_gpu = any(isinstance(each.gpu, GpuFacts) for each in facts.cards)
    _judge_kernels(found, facts.compiler, has_gpu=has_gpu)
    if facts.cache is not None:
        _judge_cache(found, facts.cache)
    if facts.stored:
        kinds = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in facts.stored.items())
        found.tell("stored", f"{gigabytes(sum(facts.stored.values()))} in the cache: {kinds}")
    _judge_host(found, facts.host, is_klein=facts.is_klein)
    return found


def _judge_card(facts: Facts, card: CardFound, settings: Settings) -> Report:
    """Report one card, what klein would do on it, and each problem, which names it."""
    found = Report(data={})
    if isinstance(card.gpu, GpuFacts):
        _judge_gpu(found, card, card.gpu)
        _judge_sight(found, card)
    else:
        _judge_absence(found, facts, card, settings)
    if isinstance(card.forecast, str):
        found.complain(
            card.forecast, "Set KLEIN_PRECISION=auto to let the card decide.", is_fatal=True
        )
    if isinstance(card.forecast, PlanPreview) and facts.model is not None:
        tell_forecast(found, card.forecast, facts.model)
        if card.torch.race is None:
            found.tell("race", "not held yet; the first start does, or klein doctor --race now")
        _judge_plan(found, card, card.forecast, facts.model, settings)
        _judge_formats(found, card, card.forecast, facts.model, settings)
    if card.name:
        about = card.name[0].upper() + card.name[1:]
        found.problems = [replace(each, what=f"{about}: {each.what}") for each in found.problems]
    return found


def tell_forecast(
    found: Report, ahead: PlanPreview, model: ModelSpec, *, is_computed: bool = False
) -> None:
    """Report precision, plan, peak and floor; *is_computed* words it as not probed."""
    how = "expected, " if is_computed else ""
    found.tell("precision", f"{ahead.precision}: {how}{ahead.precision_reason}")
    if ahead.attention:
        found.tell("attention", f"{ahead.attention}, by the same times")
    size = f"{model.default_width}x{model.default_height}"
    if ahead.plan is not None:
        found.tell("plan", f"{ahead.plan.name}: {'; '.join(ahead.plan.reasons)}")
        found.tell(
            "peak", f"{gigabytes(ahead.plan.peak_bytes)} expected at {size}, {_sizes(ahead.plan)}"
        )
    if ahead.floor_s is not None:
        found.tell(
            "floor",
            f"{ahead.floor_s:.2f} s for {size} in {model.default_steps} steps, computed from the "
            "datasheet; real cards reach about half of it",
        )


def _faults(card: CardFound) -> Collection[GpuFault]:
    """Return what the start's check would find wrong with the GPU.

    A driver that does not say which CUDA it knows, as the oldest, is judged by its version.
    """
    gpu, cuda = card.gpu, card.torch.cuda
    if not isinstance(gpu, GpuFacts):
        return ()
    found = find_faults(gpu, cuda or PINNED_CUDA)
    is_old = gpu.cuda is None and int(gpu.driver.partition(".")[0]) < minimum_driver(
        cuda or PINNED_CUDA
    )
    return {*found, GpuFault.OLD_DRIVER} if is_old else found


def _sizes(plan: MemoryPlan) -> str:
    alone, *beside = plan.max_pixels
    text = f"largest picture {alone / 1e6:.1f} megapixels"
    if not beside:
        return text
    if beside[0] == 0:
        return f"{text}, no room for a reference image"
    return f"{text}, beside a reference image {beside[0] / 1e6:.1f}"


def _judge_gpu(found: Report, card: CardFound, gpu: GpuFacts) -> None:
    needed = minimum_driver(card.torch.cuda or PINNED_CUDA)
    major, minor = gpu.capability
    name = f"{card.name}, {gpu.name}" if card.name else gpu.name
    found.tell("card", f"{name}, compute capability {major}.{minor}")
    found.tell("driver", f"{gpu.driver}, needed is {needed} or newer")
    holders = (
        f"held by {_names(gpu)}" if gpu.holders else "the driver names nobody who holds the rest"
    )
    found.tell(
        "memory",
        f"{gigabytes(gpu.total_bytes)}, of which {gigabytes(gpu.free_bytes)} are free; {holders}",
    )
    if GpuFault.OLD_DRIVER in _faults(card):
        remedy = mend_driver(card.torch.cuda or PINNED_CUDA, knows=gpu.cuda)
        found.complain(
            f"The driver {gpu.driver} is too old for torch {card.torch.version}, which is built "
            f"for CUDA {card.torch.cuda or PINNED_CUDA}.",
            f"{remedy[0].upper()}{remedy[1:]}; then start the machine again.",
            is_fatal=True,
        )
    if gpu.capability < _OLDEST_CAPABILITY:
        found.complain(
            f"{gpu.name} is older than what CUDA 13 runs on.",
            "Take a card of the RTX series, or set KLEIN_DEVICE=cpu.",
            is_fatal=True,
        )
    elif gpu.capability < _NATIVE_BF16:
        found.complain(
            f"{gpu.name} does not calculate in bf16 itself, so pictures take several times as "
            "long as on newer cards.",
            "Nothing can be set against that; RTX 3000 and newer do.",
            is_fatal=False,
        )


def _judge_absence(found: Report, facts: Facts, card: CardFound, settings: Settings) -> None:
    """Report a missing GPU; the demo runs on the CPU unless KLEIN_DEVICE names a GPU."""
    if card.gpu is None:
        found.tell("card", "none wanted: KLEIN_DEVICE is cpu")
        return
    found.tell("card", f"none: {card.gpu}")
    is_demo = facts.model is not None and not facts.is_klein
    is_fatal = not is_demo or "device" in settings.model_fields_set
    served = "" if is_fatal else " The demo model is served by the processor."
    oldest = minimum_driver(card.torch.cuda or PINNED_CUDA)
    found.complain(
        f"NVML finds no card that can be used: {card.gpu}.{served}",
        f"For klein, install NVIDIA's driver {oldest} or newer; in a "
        "container, start it with the card (docker run --gpus all, or compose.yaml as it stands) "
        "and see that nvidia-smi answers there. Without a card, set KLEIN_DEVICE=cpu.",
        is_fatal=is_fatal,
    )


def _judge_torch(found: Report, torch: TorchFound) -> None:
    built = f"built for CUDA {torch.cuda}" if torch.cuda else "built for processors only"
    found.tell("torch", f"{torch.version}, {built}")


def _judge_sight(found: Report, card: CardFound) -> None:
    """Report a card that NVML sees and torch does not."""
    if card.torch.sees_gpu:
        return
    if card.torch.cuda is None:
        found.complain(
            "torch is built for processors only and cannot use the card.",
            f"Install torch's build for CUDA {PINNED_CUDA}: pip install --force-reinstall "
            "-r requirements.lock without an index of processor wheels.",
            is_fatal=True,
        )
    elif GpuFault.OLD_DRIVER not in _faults(card):
        found.complain(
            "NVML sees the card, but torch does not.",
            "See what CUDA_VISIBLE_DEVICES says, and in a container whether the driver's compute "
            "libraries are passed in (NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
            is_fatal=True,
        )


def _judge_model(found: Report, facts: Facts, settings: Settings) -> None:
    if isinstance(facts.choice, str):
        found.complain(facts.choice, "Set KLEIN_MODEL or --model anew.", is_fatal=True)
        return
    found.tell("model", f"{facts.choice.key}: {facts.choice.reason}")
    if facts.choice.path:
        found.tell("files", facts.choice.path)
    if facts.files is not None:
        _judge_files(found, facts.files)


def _judge_processor(found: Report, facts: Facts, settings: Settings) -> None:
    if settings.is_cpu and facts.is_klein:
        found.complain(
            "klein on a processor takes minutes for a picture.",
            "Take a card, or the demo: KLEIN_MODEL=shapes.",
            is_fatal=False,
        )


def _judge_files(found: Report, files: FilesFound) -> None:
    """Report what lies at the path, component by component, and what prevents its use."""
    if files.layout is not None:
        found.tell("layout", files.layout)
    for name, text in files.parts.items():
        found.tell("part", f"{name}: {text}")
    if files.problem:
        what, _, remedy = files.problem.partition("; ")
        remedy = remedy or "replace the part that is named, or give another path."
        found.complain(f"{what.rstrip('.')}.", f"{remedy[0].upper()}{remedy[1:]}", is_fatal=True)


def _judge_plan(
    found: Report, card: CardFound, ahead: PlanPreview, model: ModelSpec, settings: Settings
) -> None:
    assert isinstance(card.gpu, GpuFacts)
    if ahead.plan is None or GpuFault.LITTLE_MEMORY in _faults(card):
        found.complain(
            f"{gigabytes(card.gpu.free_bytes)} of the card are free, which is too little even "
            "with the text encoder in host memory.",
            f"Close what holds it: {_names(card.gpu)}. If that is klein, it serves already."
            if card.gpu.holders
            else "Close what else uses the card.",
            is_fatal=True,
        )
    elif settings.plan != "auto":
        judge_asked_plan(found, ahead.plan, model)
    elif ahead.plan.name is not Plan.RESIDENT and card.gpu.holders:
        found.complain(
            f"What else is on the card makes the plan {ahead.plan.name} necessary, which is "
            "slower than resident.",
            f"Close what can be spared: {_names(card.gpu)}.",
            is_fatal=False,
        )


def judge_asked_plan(found: Report, plan: MemoryPlan, model: ModelSpec) -> None:
    """Report where the plan of KLEIN_PLAN leaves too little room for the default size."""
    if plan.max_pixels[0] < model.default_width * model.default_height:
        found.complain(
            f"KLEIN_PLAN asks for {plan.name}, which leaves no room for a picture of "
            f"{model.default_width}x{model.default_height}.",
            "Set KLEIN_PLAN=auto to take the fastest plan that fits.",
            is_fatal=plan.max_pixels[0] == 0,
        )


def _judge_formats(
    found: Report, card: CardFound, ahead: PlanPreview, model: ModelSpec, settings: Settings
) -> None:
    """Report each format whose library is missing, with what that costs on this card."""
    assert isinstance(card.gpu, GpuFacts)
    kind = Card(card.gpu.capability, recognise(card.gpu.name, card.gpu.total_bytes))
    taken, entry = FORMATS[ahead.linears], find_model(model.id)
    for each in on_formats(settings.engine_precision, card.torch.lacking, taken, kind, entry):
        found.complain(each.what, each.remedy, is_fatal=False)


def _judge_kernels(found: Report, compiler: CompilerFound, *, has_gpu: bool) -> None:
    """Report whether our kernels can be compiled; it is a problem only with a GPU."""
    missing = ", ".join(compiler.missing)
    found.tell(
        "kernels",
        f"cannot run: {missing} missing" if missing else f"can run: {compiler.c_compiler}, Triton",
    )
    if missing and has_gpu:
        advice = on_kernels(f"{missing} missing", to_run(install_command(compiler.missing)))
        found.complain(advice.what, advice.remedy, is_fatal=False)


def _judge_cache(found: Report, cache: CacheFound) -> None:
    """Report what is downloaded, what is missing, and whether the disk has room for it."""
    found.tell(
        "cache",
        f"{cache.folder}: {gigabytes(cache.total_bytes - cache.missing_bytes)} of "
        f"{gigabytes(cache.total_bytes)} there, {gigabytes(cache.missing_bytes)} missing",
    )
    found.tell("disk", f"{gigabytes(cache.disk_free_bytes)} free")
    if not cache.is_writable:
        found.complain(
            f"{cache.folder} may not be written to by this user.",
            "Make it writable, or set KLEIN_CACHE_DIR to another folder.",
            is_fatal=cache.missing_bytes > 0,
        )
    if cache.open_because:
        found.complain(
            f"The cache's files are hashed at each start and compiled code is not kept there, "
            f"because {cache.open_because}.",
            f"{cache.remedy[0].upper()}{cache.remedy[1:]}",
            is_fatal=False,
        )
    if cache.missing_bytes > cache.disk_free_bytes:
        found.complain(
            f"The disk has {gigabytes(cache.disk_free_bytes)} free, needed are "
            f"{gigabytes(cache.missing_bytes)} for the download.",
            "Make room, or set KLEIN_CACHE_DIR to a folder on another disk.",
            is_fatal=True,
        )
    elif cache.missing_bytes:
        found.complain(
            f"{gigabytes(cache.missing_bytes)} are still to be downloaded.",
            "klein download fetches them ahead of time; else the first start does.",
            is_fatal=False,
        )


def _judge_host(found: Report, host: HostFound, *, is_klein: bool) -> None:
    """Report the host's memory; klein's first load needs the most of it."""
    found.tell(
        "host",
        f"{gigabytes(host.total_bytes)}, of which {gigabytes(host.available_bytes)} available",
    )
    if is_klein and 0 < host.available_bytes < _FIRST_LOAD_BYTES:
        found.complain(
            f"{gigabytes(host.available_bytes)} of host memory are available; the first load takes "
            f"up to {gigabytes(_FIRST_LOAD_BYTES)}.",
            "Close other programs for the first start, or add swap space.",
            is_fatal=False,
        )


def _names(gpu: GpuFacts) -> str:
    names = [_name(holder) for holder in gpu.holders[:_SEVERAL]]
    more = len(gpu.holders) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _name(holder: Holder) -> str:
    """Return program, process id, and bytes where the driver reports them."""
    size = f", {gigabytes(holder.used_bytes)}" if holder.used_bytes else ""
    return f"{holder.name} ({holder.pid}{size})"


def _data(facts: Facts) -> dict[str, object]:
    """Return the facts as plain data for the JSON document, the first card's twice."""
    data = asdict(facts)
    for card, each in zip(facts.cards, data["cards"], strict=True):
        each["card"] = each.pop("gpu")  # the name that scripts know
        each["torch"] = name_kernels(each["torch"], card.torch.runs)
        if isinstance(card.gpu, GpuFacts):
            known = find_gpu(card.gpu.name)
            each["card"]["key"] = known.key if known else None
    first = data["cards"][0]
    return data | {key: first[key] for key in ("card", "torch", "forecast")}
