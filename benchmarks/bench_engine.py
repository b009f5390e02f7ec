"""The engine called directly, without a queue, a pipe or HTTP."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from safetensors import safe_open
from safetensors.torch import save_file

from app.domain import Generated, ImageSpec, Mask, ModelInfo, Progress, RawImage
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from benchmarks.rows import Bench, sha256, used_bytes
from tools.random_weights import FULL, TINY

_ROOT = Path(__file__).resolve().parent.parent
BARS = {
    "resident": 8_900_000_000,
    "resident tiled": 7_900_000_000,
    "streamed": 6_000_000_000,
    "streamed tiled": 5_000_000_000,
}
"""Peak reserved of each plan at 1024x1024."""


def make_checkpoint(bench: Bench) -> None:
    """Write the random checkpoint, unless it is there."""
    if (bench.folder / "model_index.json").is_file():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [sys.executable, str(_ROOT / "tools" / "make_checkpoint.py"), str(bench.folder)]
    command += ["--fp8", "--device", device, *(["--tiny"] if bench.is_tiny else [])]
    subprocess.run(command, check=True)


def load(bench: Bench, **changes: Any) -> tuple[KleinEngine, ModelInfo]:
    """Load an engine and say what came of it."""
    config = EngineConfig(
        model="flux.2-klein-4b",
        cache_dir=str(bench.cache),
        device=bench.device,
        **(
            {
                "path": str(bench.folder),
                "precision": bench.precision,
                "attention": bench.attention,
            }
            | changes
        ),
    )
    engine = KleinEngine(config)
    seen: set[str] = set()

    def on_progress(progress: Any) -> None:
        word = f"{progress.stage} {progress.detail}"
        if word not in seen:
            seen.add(word)
            print(f"  {time.perf_counter() - begun:6.1f} s {word}", flush=True)

    begun = time.perf_counter()
    info = engine.load(on_progress)
    print(f"  loaded in {info.load_s:.1f} s, warm-up {info.warm_up_s:.3f} s", flush=True)
    print(f"  {info.precision}: {info.precision_reason}; {info.plan}: {info.plan_reasons}")
    print(f"  {info.features} {info.max_pixels}", flush=True)
    return engine, info


def make(
    engine: KleinEngine,
    side: int,
    prompt: str,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **changes: Any,
) -> Generated:
    """Make one picture."""
    values = {"width": side, "height": side, "num_inference_steps": 4, "guidance_scale": 1.0}
    spec = ImageSpec(prompt=prompt, **(values | {"seed": 1} | changes))
    return engine.generate(spec, on_progress, lambda: False)


def measure(bench: Bench) -> None:
    """Sizes, stages, cache hits, references, and the first picture of a new size."""
    before = used_bytes()
    engine, info = load(bench)
    side = bench.side
    try:
        series(bench, engine, info, side, "klein.engine", note="a new prompt each", before=before)
        series(bench, engine, info, side, "klein.engine", prompt="the same", note="cache hit")
        _guarded(lambda: series(bench, engine, info, side // 2, "klein.engine", note="half"))
        _guarded(lambda: _first_of_sizes(bench, engine))
        large = partial(series, bench, engine, info, side * 2, "klein.engine")
        _guarded(lambda: large(note="double", repeats=5))
        _more_than_plain(bench, engine, info)
    finally:
        engine.close()


def measure_edits(bench: Bench) -> None:
    """A plain picture, and beside it what costs more: edits and streaming."""
    before = used_bytes()
    engine, info = load(bench)
    try:
        note = "a new prompt each"
        series(bench, engine, info, bench.side, "klein.engine", note=note, before=before)
        _more_than_plain(bench, engine, info)
    finally:
        engine.close()


def _more_than_plain(bench: Bench, engine: KleinEngine, info: ModelInfo) -> None:
    side = bench.side
    reference = RawImage(side, side, bytes(range(256)) * (side * side * 3 // 256))
    # The left half is kept, the right one painted.
    mask = Mask(side, side, (bytes(side // 2) + b"\xff" * (side // 2)) * side)
    for changes in (
        {"note": "one reference", "new": reference},
        {"note": "one reference, kept", "references": (reference,)},
        {"note": "a masked edit", "new": reference, "mask": mask},
        {"note": "three previews", "previews": 3},
    ):
        run = partial(series, bench, engine, info, side, "klein.engine", repeats=5, **changes)
        _guarded(run)


def series(
    bench: Bench,
    engine: KleinEngine,
    info: ModelInfo,
    side: int,
    name: str,
    *,
    note: str,
    prompt: str | None = None,
    repeats: int | None = None,
    before: int | None = None,
    new: RawImage | None = None,
    **changes: Any,
) -> None:
    """Make pictures one after the other and write a row; each with a reference like *new*."""
    for number in range(3):
        make(engine, side, prompt or f"warm {number} {note}", **(_like(new, number) | changes))
    seconds, made = [], []
    for number in range(repeats or bench.repeats):
        given = _like(new, 3 + number) | changes
        begun = time.perf_counter()
        made.append(make(engine, side, prompt or f"picture {number} {note}", **given))
        seconds.append(time.perf_counter() - begun)
    stages = {
        stage: round(statistics.median(getattr(each.timings, stage) for each in made), 5)
        for stage in ("text", "reference", "denoise", "decode")
    }
    outside = statistics.median(
        total - each.timings.total for total, each in zip(seconds, made, strict=True)
    )
    peak = made[-1].peak
    bench.write(
        name,
        seconds,
        width=side,
        height=side,
        precision=info.precision,
        attention=info.attention,
        plan=info.plan,
        note=note,
        stages=stages,
        outside_stages=round(outside, 5),
        peak_allocated_bytes=peak.allocated if peak else None,
        peak_reserved_bytes=peak.reserved if peak else None,
        nvml_bytes=used_bytes(),
        nvml_bytes_before=before,
        seed=1,
        sha256=sha256(made[-1].image.pixels),
        distinct_bytes=len(set(made[-1].image.pixels)),
    )


def _like(image: RawImage | None, number: int) -> dict[str, Any]:
    """Return the references of a picture: *image* with another first pixel, which no cache has."""
    if image is None:
        return {}
    return {"references": (replace(image, pixels=bytes([number] * 3) + image.pixels[3:]),)}


def _first_of_sizes(bench: Bench, engine: KleinEngine) -> None:
    """The first picture of sizes never seen, against the same size warm."""
    unit = bench.side // 16
    for wide, high in ((12, 12), (20, 12), (9, 16), (5, 7), (24, 12), (15, 15)):
        width, height = wide * unit, high * unit
        seconds = []
        for number in range(4):
            begun = time.perf_counter()
            make(engine, bench.side, f"size {number}", width=width, height=height)
            seconds.append(time.perf_counter() - begun)
        bench.write(
            "klein.first_size",
            seconds[:1],
            width=width,
            height=height,
            note="the first of a size",
            warm_s=round(statistics.median(seconds[2:]), 5),
        )


def profile(bench: Bench) -> None:
    """Show where one picture's time goes on the card."""
    engine, _ = load(bench)
    try:
        for number in range(2):
            make(engine, bench.side, f"warm {number}")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as found:
            make(engine, bench.side, "the profiled one")
        for event in sorted(
            found.key_averages(), key=lambda each: -getattr(each, f"self_{_way()}_time_total")
        )[:40]:
            total = getattr(event, f"self_{_way()}_time_total") / 1000
            print(f"  {total:9.3f} ms {event.count:6d} x {event.key[:110]}", flush=True)
        _guarded(lambda: _peaks(bench, engine))
        _guarded(lambda: _host_calls(bench, engine))
    finally:
        engine.close()


def _peaks(bench: Bench, engine: KleinEngine) -> None:
    """The most that torch held between one report of progress and the next."""
    if bench.device is None:
        return
    torch.cuda.synchronize()
    print(f"  at rest {torch.cuda.memory_allocated() / 1e9:.3f} GB allocated", flush=True)

    def show(until: str) -> None:
        torch.cuda.synchronize()
        now, peak = torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9
        reserved = torch.cuda.memory_reserved() / 1e9
        print(f"  until {until}: {peak:.3f} GB, now {now:.3f}, reserved {reserved:.3f}", flush=True)
        torch.cuda.reset_peak_memory_stats()

    make(engine, bench.side, "what it holds", lambda at: show(f"{at.stage} {at.step}"))
    show("the end")


def _host_calls(bench: Bench, engine: KleinEngine) -> None:
    """Where the host's time goes in five pictures of one prompt."""
    for _ in range(2):
        made = make(engine, bench.side, "the same")
    print(f"  cache hit: {made.timings}", flush=True)
    with cProfile.Profile() as profiler:
        for _ in range(5):
            make(engine, bench.side, "the same")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def _way() -> str:
    return "device" if torch.cuda.is_available() else "cpu"


def measure_plans(bench: Bench) -> None:
    """Each plan in a process of its own, capped a little above its bar."""
    if len(bench.plans) == 1:
        _measure_plan(bench, bench.plans[0])
        return
    for plan in bench.plans or BARS:
        script = str(_ROOT / "benchmarks" / "bench_gpu.py")
        options = ["--folder", str(bench.folder), "--cache", str(bench.cache)]
        options += ["--out", str(bench.out), "--plan", plan, "--here"]
        options += ["--precision", bench.precision, "--attention", bench.attention]
        tiny = ["--tiny"] if bench.is_tiny else []
        command = [sys.executable, "-u", script, "plans", *options, *tiny]
        subprocess.run(command, check=False)


def _measure_plan(bench: Bench, plan: str) -> None:
    print(f"--- {plan}", flush=True)
    cap = int(BARS[plan] * 1.02)
    before = used_bytes()
    engine, info = load(bench, plan=plan, memory_bytes=None if bench.is_tiny else cap)
    try:
        note = f"capped at {cap / 1e9:.2f} GB"
        series(bench, engine, info, bench.side, "klein.engine", note=note, repeats=8, before=before)
    finally:
        engine.close()


def measure_variants(bench: Bench) -> None:
    """The model's other files: a small decoder, and fp8 weights without input scales."""
    for note, changes in (
        ("the small decoder", {"vae": str(_small_decoder(bench))}),
        ("no input scales", {"path": str(_without_input_scales(bench))}),
    ):
        engine, info = load(bench, **changes)
        try:
            series(bench, engine, info, bench.side, "klein.engine", note=note)
        finally:
            engine.close()


def _small_decoder(bench: Bench) -> Path:
    """Write a random VAE with the decoder's widths of FLUX.2-small-decoder."""
    made = bench.folder.with_name(f"{bench.folder.name}-small-decoder.safetensors")
    shape = TINY if bench.is_tiny else FULL
    widths = (8, 8, 8, 8) if bench.is_tiny else (96, 192, 384, 384)
    vae = AutoencoderKLFlux2(**shape.vae, decoder_block_out_channels=widths).bfloat16()
    save_file(vae.state_dict(), made)
    return made


def _without_input_scales(bench: Bench) -> Path:
    """Write the model again, its fp8 file without input scales; its other files are linked."""
    made = bench.folder.with_name(f"{bench.folder.name}-unscaled")
    made.mkdir(exist_ok=True)
    for each in bench.folder.iterdir():
        if each.suffix == ".safetensors":
            with safe_open(each, framework="pt") as given:
                kept = {
                    name: given.get_tensor(name)
                    for name in given.keys()  # noqa: SIM118 - no mapping
                    if not name.endswith(".input_scale")
                }
                save_file(kept, made / each.name, metadata=given.metadata())
        elif not (made / each.name).exists():
            (made / each.name).symlink_to(each)
    return made


def _guarded(run: Any) -> None:
    try:
        run()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
