"""Adapters: what a picture with them costs beside one without, at the same time on one card.

Random adapters of every linear layer. The choices take turns, round by round, so that the card's
temperature and clocks are the same for all.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from app.domain import Generated, Lora, ModelInfo
from app.engine.adapters.layout import Shapes
from app.engine.adapters.names import count_blocks
from app.engine.checkpoint.bfl import rules
from app.engine.engine import KleinEngine
from benchmarks.bench_engine import load, make
from benchmarks.rows import Bench

_ROUNDS = 3
_STRENGTH = 0.02
"""Of an adapter's change, as a share of a weight matrix with entries of variance 1 / inputs."""
_SWAPS = 10


def measure(bench: Bench) -> None:
    """No adapter, one and four, a switch between two, one from disk, and each bucket's first."""
    for precision in ("fp8", "int8"):
        engine, info = load(bench, precision=precision, lora_rank=256)
        try:
            _measure(bench, engine, info)
        finally:
            engine.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(bench: Bench, engine: KleinEngine, info: ModelInfo) -> None:
    folder = bench.cache / "loras"
    folder.mkdir(parents=True, exist_ok=True)

    def adapter(rank: int, seed: int) -> Lora:
        return write(folder / f"rank-{rank}-{seed}.safetensors", info.linear_shapes, rank, seed)

    without = make(engine, bench.side, "before any adapter")
    one, *others = (adapter(32, seed) for seed in range(4))
    choices = {
        "no adapter": (),
        "one of rank 32": (one,),
        "four of rank 32": (one, *others),
        "one of rank 128": (adapter(128, 9),),
    }
    for note, loras in choices.items():
        made = make(engine, bench.side, f"peak with {note}", loras=loras)
        if loras:
            _write_memory(bench, info, note, without, made)
    for side in (bench.side, bench.side // 2):
        _by_turns(bench, engine, info, side, choices)
    _switches(bench, engine, info, (one, others[0]))
    _from_disk(bench, engine, info, one, [adapter(32, 20 + number) for number in range(6)])


def _write_memory(
    bench: Bench, info: ModelInfo, note: str, without: Generated, made: Generated
) -> None:
    """Write what a picture with adapters takes beside the slots."""
    before, after = (each.peak.reserved if each.peak else 0 for each in (without, made))
    bench.write(
        "klein.lora.memory",
        [made.timings.total],
        precision=info.precision,
        slots_bytes=made.lora_bytes,
        peak_reserved_bytes=after or None,
        peak_without_bytes=before or None,
        beside_slots_bytes=after - before - made.lora_bytes,
        note=note,
    )


def write(path: Path, shapes: Shapes, rank: int, seed: int, strength: float = _STRENGTH) -> Lora:
    """Write a random adapter of every linear layer under Black Forest Labs' names, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    ours = [rule for rule in rules(*count_blocks(shapes)) if rule.ours in shapes]
    for name, parts in groupby(ours, key=lambda rule: rule.theirs):
        sizes = [shapes[rule.ours] for rule in parts]
        columns = sizes[0][1]
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(sum(rows for rows, _ in sizes), rank, generator=generator)
        up *= strength / rank**0.5
        tensors[f"diffusion_model.{name}.lora_A.weight"] = down.bfloat16()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return Lora(path.stem, 1.0, hashlib.sha256(path.read_bytes()).hexdigest(), str(path), rank)


def _by_turns(
    bench: Bench,
    engine: KleinEngine,
    info: ModelInfo,
    side: int,
    choices: Mapping[str, Sequence[Lora]],
) -> None:
    """Make pictures with each of *choices* in turn; the first picture of a turn is a switch."""
    seconds: dict[str, list[float]] = defaultdict(list)
    firsts: dict[str, float] = {}
    for number in range(_ROUNDS):
        for note, loras in choices.items():
            for count in range(max(2, bench.repeats // _ROUNDS + 2)):
                took = _timed(engine, side, f"{note} {number} {count}", loras)
                firsts.setdefault(note, took)
                # A graph is captured at the second picture.
                if count > 1 or (bench.is_tiny and count):
                    seconds[note].append(took)
    without = statistics.median(seconds["no adapter"])
    for note, found in seconds.items():
        bench.write(
            "klein.lora",
            found,
            width=side,
            height=side,
            precision=info.precision,
            plan=info.plan,
            note=note,
            over_none=round(statistics.median(found) / without - 1, 4),
            first_picture_s=round(firsts[note], 4),
        )


def _switches(bench: Bench, engine: KleinEngine, info: ModelInfo, pair: tuple[Lora, Lora]) -> None:
    """Another adapter than the last job's, in host memory, against the same again."""
    same, other = [], []
    for number in range(_SWAPS):
        lora = pair[number % 2]
        made: list[Generated] = []
        other.append(_timed(engine, bench.side, f"other {number}", (lora,), made.append))
        same.append(_timed(engine, bench.side, f"same {number}", (lora,)))
    _write_more(bench, info, other, same, made[-1], "another adapter, in host memory")


def _from_disk(
    bench: Bench, engine: KleinEngine, info: ModelInfo, warm: Lora, cold: Sequence[Lora]
) -> None:
    """An adapter that was never used, from the page cache, against the one before again."""
    other, same, made = [], [], list[Generated]()
    for number, lora in enumerate(cold):
        other.append(_timed(engine, bench.side, f"disk {number}", (lora,), made.append))
        same.append(_timed(engine, bench.side, f"disk {number} again", (lora,)))
    _timed(engine, bench.side, "back", (warm,))
    _write_more(bench, info, other, same, made[-1], "an adapter from disk")


def _write_more(
    bench: Bench,
    info: ModelInfo,
    other: list[float],
    same: list[float],
    made: Generated,
    note: str,
) -> None:
    bench.write(
        "klein.lora.switch",
        other,
        width=bench.side,
        height=bench.side,
        precision=info.precision,
        note=note,
        more_than_same_s=round(statistics.median(other) - statistics.median(same), 4),
        loads=[[each.name, each.source, round(each.seconds, 4)] for each in made.lora_loads],
    )


def _timed(
    engine: KleinEngine,
    side: int,
    prompt: str,
    loras: Sequence[Lora],
    take: Callable[[Any], object] = lambda _: None,
) -> float:
    begun = time.perf_counter()
    made = make(engine, side, prompt, loras=tuple(loras))
    took = time.perf_counter() - begun
    take(made)
    return took
