"""ComfyUI and this service on the same three files and the same card, one after the other.

    python benchmarks/comfyui/compare.py --checkout COMFYUI --models COMFYUI/models

Each makes the same 20 pictures in turn, alone on the card, a new prompt each, one request in
flight, PNG included; in the next round the other begins. `--leave-gib 11.2 7.3` repeats it with a
process that holds the rest of the card. Rows are appended to benchmarks/results.jsonl, a table
comes last; what they mean, and what has to be installed: benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.telemetry.cards import Cards
from benchmarks.comfyui import workflow
from benchmarks.comfyui.ballast import ballast
from benchmarks.comfyui.services import Comfy, Klein, Picture, Service
from benchmarks.rows import Bench

SAME_DB = 100.0
"""Stands for the PSNR of pictures that are equal, of which there is none."""
_WARM = 3
_READ_EVERY_S = 0.01

Make = Callable[[Path], Service]
"""Makes a service that is not started yet, whose files go into the given folder."""


@dataclass
class Used:
    """Bytes in use on the card, by everyone: before a service began, and the most meanwhile."""

    before: int | None
    peak: int | None


@dataclass
class Series:
    """What one service did in one round, or why it did not."""

    service: Service
    pictures: list[Picture] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def compare(
    bench: Bench,
    makers: Sequence[Make],
    rounds: int,
    note: str,
    read_used: Callable[[], int | None],
) -> bool:
    """Measure the services in turn, *rounds* times, and write their rows; whether all could.

    A service that fails leaves no row and says why; the other's stands.
    """
    is_whole = True
    for number in range(rounds):
        turn = makers if number % 2 == 0 else makers[::-1]
        with tempfile.TemporaryDirectory() as folder:
            done = [
                _series(bench, make(Path(folder) / str(place)), number, read_used)
                for place, make in enumerate(turn)
            ]
        differences = _differences(*done)
        for series in done:
            if series.error:
                print(f"{series.service.row}, {note}: {series.error}", file=sys.stderr, flush=True)
                is_whole = False
            else:
                _write(bench, series, f"beside, {note}, round {number}", differences)
    return is_whole


def psnr(one: bytes, other: bytes) -> float:
    """Compare two pictures of one size in any file format: dB over the range of 8 bits."""
    first, second = (
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64)
        for file in (one, other)
    )
    error = float(np.mean((first - second) ** 2))
    return SAME_DB if error == 0 else 10 * math.log10(255**2 / error)


@contextlib.contextmanager
def watch(read_used: Callable[[], int | None]) -> Iterator[Used]:
    """Read what is in use on the card, before and then a hundred times a second."""
    used = Used(first := read_used(), first)
    is_over = threading.Event()

    def read() -> None:
        while used.peak is not None and not is_over.wait(_READ_EVERY_S):
            used.peak = max(used.peak, read_used() or 0)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield used
    finally:
        is_over.set()
        thread.join()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Show the medians of all rounds, one line for each service and amount of memory."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["note"].split(", ")[1], row["name"]), []).append(row)
    print(
        "\n| memory | service | seconds, each round | most in use, GB | PSNR, dB: median, least |"
    )
    print("|" + "---|" * 5)
    for (note, name), group in groups.items():
        seconds = ", ".join(f"{row['seconds_median']:.3f}" for row in group)
        print(f"| {note} | {name} | {seconds} | {_most_used(group)} | {_closeness(group)} |")
    print(flush=True)


def _most_used(rows: Sequence[dict[str, Any]]) -> str:
    found = [
        row["nvml_peak_bytes"] - row["nvml_bytes_before"]
        for row in rows
        if row["nvml_peak_bytes"] is not None
    ]
    return f"{max(found) / 1e9:.2f}" if found else ""


def _closeness(rows: Sequence[dict[str, Any]]) -> str:
    found = [row["psnr_db"] for row in rows if row["psnr_db"]]
    if not found:
        return ""
    median = statistics.median(each["median"] for each in found)
    return f"{median:.1f}, {min(each['least'] for each in found):.1f}"


def _series(
    bench: Bench, service: Service, round_number: int, read_used: Callable[[], int | None]
) -> Series:
    """Start *service*, warm it up, have it make its pictures, and end it."""
    series = Series(service)
    try:
        with watch(read_used) as used, service:
            for number in range(_WARM):
                service.ask(f"warm {number}", bench.side, number)
            first = round_number * bench.repeats
            for number in range(first, first + bench.repeats):
                prompt = f"a lighthouse on a cliff at dusk, number {number}"
                series.pictures.append(service.ask(prompt, bench.side, number))
            series.facts = service.facts()
    except Exception as error:
        series.error = f"{type(error).__name__}: {error}"
    series.facts |= {"nvml_peak_bytes": used.peak, "nvml_bytes_before": used.before}
    return series


def _differences(one: Series, other: Series) -> dict[str, float] | None:
    """Compare the pictures of one prompt and seed; None where one of the two has none."""
    if one.error or other.error:
        return None
    found = [psnr(a.body, b.body) for a, b in zip(one.pictures, other.pictures, strict=True)]
    return {"median": round(statistics.median(found), 2), "least": round(min(found), 2)}


def _write(bench: Bench, series: Series, note: str, differences: dict[str, float] | None) -> None:
    stages = {
        stage: round(statistics.median(each.stages[stage] for each in series.pictures), 5)
        for stage in series.pictures[0].stages
    }
    bench.write(
        series.service.row,
        [picture.seconds for picture in series.pictures],
        width=bench.side,
        height=bench.side,
        note=note,
        stages=stages,
        psnr_db=differences,
        **series.facts,
    )


def main() -> int:
    """Compare on the whole card and with what each `--leave-gib` leaves; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="the folder of main.py")
    parser.add_argument("--models", type=Path, required=True, help="ComfyUI's models folder")
    parser.add_argument("--python", default=sys.executable, help="ComfyUI's; this one's if absent")
    parser.add_argument("--comfyui-args", default="", metavar="WORDS", help="such as '--fast'")
    parser.add_argument("--leave-gib", type=float, nargs="*", default=[], metavar="GIB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/klein-cache"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="three small pictures: a rehearsal")
    asked = parser.parse_args()
    bench = Bench(asked.models.absolute(), asked.cache.absolute(), asked.out, asked.tiny)
    _check(parser, asked, bench)
    words = [*shlex.split(asked.comfyui_args), *(["--cpu"] if bench.device is None else [])]
    python = str(Path(shutil.which(asked.python) or asked.python).absolute())
    settings = {
        "model": bench.folder / "diffusion_models" / workflow.TRANSFORMER,
        "cache_dir": bench.cache,
        "device": "cpu" if bench.device is None else bench.device,
    }
    makers: tuple[Make, Make] = (
        lambda folder: Klein(folder, settings),
        lambda folder: Comfy(folder, asked.checkout.absolute(), bench.folder, python, words),
    )
    cards = Cards(cache_s=0.0)
    gpu = next(map(cards.open, cards.visible()), None)

    def read_used() -> int | None:
        now = None if gpu is None else gpu.read()
        return None if now is None else now.used_bytes

    begun = bench.count()
    is_whole = compare(bench, makers, asked.rounds, "whole card", read_used)
    for gib in asked.leave_gib:
        with ballast(gib) as left:
            print(f"{left / (1 << 30):.2f} GiB are left", flush=True)
            is_whole &= compare(bench, makers, asked.rounds, f"{gib:g} GiB left", read_used)
    print_table(bench.rows()[begun:])
    return 0 if is_whole else 1


def _check(parser: argparse.ArgumentParser, asked: argparse.Namespace, bench: Bench) -> None:
    """End with a sentence where something is missing, before anything is started."""
    files = [bench.folder / folder / name for folder, name in workflow.FILES.items()]
    for path in (asked.checkout / "main.py", *files):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    if asked.leave_gib and bench.device is None:
        parser.error("--leave-gib needs a card")


if __name__ == "__main__":
    sys.exit(main())
