"""Measure the service on a card: `make bench-gpu`, or python benchmarks/bench_gpu.py [phase ...].

Every phase runs in a process of its own, so that none finds the card as another left it, and a
phase that fails does not end the others. Rows are appended to benchmarks/results.jsonl (or --out),
one JSON object each; a table for people comes last. What the rows mean: benchmarks/RESULTS.md.

Phases, in the order in which they run without a choice:

    make        the full-size random checkpoint, fp8 with input scales
    kernels     attention, products and decoders by themselves: where the time could go
    engine      our engine called directly: stages, sizes, cache hits, references
    edits       a plain picture, an edit, a masked edit and one with previews
    profile     the kernels of one picture
    http        the service as a subprocess, one client, one request in flight
    starts      the service started, three times where the cache is empty
    workers     pictures on one card, on two and on as many as there are; one worker killed
    ray         replicas under Ray Serve, one and as many as there are cards, beside the pool
    sleep       the worker asleep and awake again, in turn (--cycles, 30)
    lora        pictures with adapters beside pictures without, switches, loads from disk
    plans       every memory plan with the process capped just above its bar
    variants    the engine with a small decoder, and with fp8 weights without input scales
    diffusers   the pipeline of diffusers with the same architecture, on the card and offloaded
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    bench_engine,
    bench_http,
    bench_kernels,
    bench_lora,
    bench_pipeline,
    bench_ray,
    bench_sleep,
    bench_workers,
)
from benchmarks.rows import Bench, print_table

PHASES: dict[str, Callable[[Bench], None]] = {
    "make": bench_engine.make_checkpoint,
    "kernels": bench_kernels.measure,
    "engine": bench_engine.measure,
    "edits": bench_engine.measure_edits,
    "profile": bench_engine.profile,
    "http": bench_http.measure,
    "starts": bench_http.measure_starts,
    "workers": bench_workers.measure,
    "ray": bench_ray.measure,
    "sleep": bench_sleep.measure,
    "lora": bench_lora.measure,
    "plans": bench_engine.measure_plans,
    "variants": bench_engine.measure_variants,
    "diffusers": bench_pipeline.measure,
}


# Edits are a part of the phase before it; several workers want several cards, and Ray itself too.
_USUAL = [name for name in PHASES if name not in ("edits", "workers", "ray")]


def main() -> int:
    """Run the phases asked for; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="*", choices=[*PHASES, []], help="all without any")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/klein-random"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/klein-cache"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--plan", action="append", help="only this plan, in phase plans")
    parser.add_argument("--precision", default="fp8", help="as KLEIN_PRECISION")
    parser.add_argument("--attention", default="auto", help="as KLEIN_ATTENTION")
    parser.add_argument("--cycles", type=int, default=30, help="of sleep and wake, in phase sleep")
    parser.add_argument("--here", action="store_true", help="in this process, without a new one")
    asked = parser.parse_args()
    bench = Bench(
        asked.folder,
        asked.cache,
        asked.out,
        asked.tiny,
        tuple(asked.plan or ()),
        asked.precision,
        asked.attention,
        asked.cycles,
    )
    if asked.here:
        for name in asked.phases:
            PHASES[name](bench)
        return 0
    begun = bench.count()
    failed = [name for name in asked.phases or _USUAL if not _run(name)]
    print_table(bench.rows()[begun:])
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _run(phase: str) -> bool:
    """Run *phase* in a new process with the same options."""
    print(f"=== {phase}", flush=True)
    begun = time.perf_counter()
    options = [word for word in sys.argv[1:] if word not in PHASES]
    command = [sys.executable, "-u", __file__, phase, *options, "--here"]
    code = subprocess.run(command, check=False).returncode
    print(f"=== {phase}: exit {code} after {time.perf_counter() - begun:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
