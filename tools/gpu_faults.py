"""Break a real card in four ways, and say how long until the next picture.

    python tools/gpu_faults.py [--model FOLDER | --size full] [--cache FOLDER] [--watchdog 10]

Out of memory under a cap, a real device-side assert, `kill -9` of the worker and SIGSTOP, each with
another picture waiting behind it, which must be made. The model is random weights in klein's full
size (16 GB on disk, written once to FOLDER) unless --size says tiny; what breaks the card stands in
tests/support/broken_gpu.py. Prints a table for people and one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.server import Server

NEXT_LIMIT_S = 600.0


def wait_until(is_true: Callable[[], bool], *, limit_s: float = 60.0) -> None:
    """Ask again and again until it is true."""
    until = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > until:
            raise SystemExit("it did not happen in time")
        time.sleep(0.02)


class Trial:
    """One service, and what was seen of it."""

    def __init__(self, server: Server, report: Path, picture: dict[str, Any], steps: int) -> None:
        self.server = server
        self.report = report
        self.picture = picture
        self.steps = steps
        self.rows: list[dict[str, Any]] = []

    def ask(self, prompt: str, **more: Any) -> tuple[int, str]:
        """The status of one picture, and the error's code."""
        status, _, body = self.server.post("/generate", {**self.picture, "prompt": prompt, **more})
        return status, "" if status == 200 else str(json.loads(body)["error"]["code"])

    def break_by(self, name: str, strike: Callable[[], None] | None) -> None:
        """Ask for a picture that fails (or strike while it is made) and for one behind it."""
        pid = self.server.worker_pid()
        with ThreadPoolExecutor(2) as pool:
            more = {} if strike is None else {"num_inference_steps": self.steps}
            broken = pool.submit(self.ask, name, **more)
            wait_until(lambda: self.server.metric("klein_requests_running") >= 1)
            behind = pool.submit(self.ask, "the next picture")
            if strike is not None:
                wait_until(lambda: self.server.metric("klein_queue_size") >= 1)
                strike()
            self._note(name, pid, broken, behind)

    def _note(
        self,
        name: str,
        pid: int,
        broken: Future[tuple[int, str]],
        behind: Future[tuple[int, str]],
    ) -> None:
        status, code = broken.result(NEXT_LIMIT_S)
        failed_at = time.monotonic()
        next_status, _ = behind.result(NEXT_LIMIT_S)
        self.rows.append(
            {
                "fault": name,
                "answer": f"{status} {code}",
                "next": next_status,
                "next_after_s": round(time.monotonic() - failed_at, 2),
                "worker_replaced": self.server.worker_pid() != pid,
            }
        )

    def signal_worker(self, number: signal.Signals) -> Callable[[], None]:
        """What sends *number* to the worker."""
        return lambda: os.kill(self.server.worker_pid(), number)

    def drift(self) -> float:
        """How far from before torch's memory was after the picture that found no room."""
        lines = [json.loads(line) for line in self.report.read_text().splitlines()]
        (found,) = [line for line in lines if line["prompt"] == "oom"]
        return float(abs(found["after"] - found["before"]) / max(1, found["before"]))


def checks(trial: Trial, drift: float) -> dict[str, bool]:
    """Every promise, and whether it held."""
    by_name = {row["fault"]: row for row in trial.rows}
    restarts = {
        reason: trial.server.metric("klein_worker_restarts_total", reason=reason)
        for reason in ("fatal_cuda", "killed", "hang")
    }
    return {
        "the picture that found no room is answered so": by_name["oom"]["answer"]
        == "500 out_of_memory",
        "out of memory keeps the worker": not by_name["oom"]["worker_replaced"],
        "its memory is back within 1 %": drift <= 0.01,
        "every other fault fails one picture": all(
            by_name[name]["answer"] == "500 generation_failed"
            for name in ("assert", "kill", "stop")
        ),
        "and replaces the worker": all(
            by_name[name]["worker_replaced"] for name in ("assert", "kill", "stop")
        ),
        "whoever waited got a picture": all(row["next"] == 200 for row in trial.rows),
        "each is counted under its reason": set(restarts.values()) == {1.0},
    }


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the service and break it four times."""
    report = folder / "report.jsonl"
    small = given.size == "tiny"
    settings: dict[str, object] = {
        "model": given.model or write_model(folder / "model", given.size, given.device),
        "device": given.device,
        "watchdog_s": given.watchdog,
        "deadline_s": 900,
        "cache_dir": given.cache or folder / "cache",
    }
    picture = {"width": 64, "height": 64, "num_inference_steps": 2} if small else {}
    with Server(f"report={report}", module="tests.support.broken_gpu", **settings) as server:
        trial = Trial(server, report, picture, steps=50)
        begun = time.monotonic()
        first, _ = trial.ask("the first picture")
        picture_s = time.monotonic() - begun
        load_s = server.metric("klein_model_load_duration_seconds")
        trial.break_by("oom", None)
        trial.break_by("assert", None)
        trial.break_by("kill", trial.signal_worker(signal.SIGKILL))
        trial.break_by("stop", trial.signal_worker(signal.SIGSTOP))
        drift = trial.drift()
        held = checks(trial, drift)
        found = {
            "first": first,
            "picture_s": round(picture_s, 2),
            "load_s": round(load_s, 2),
            "watchdog_s": given.watchdog,
            "faults": trial.rows,
            "memory_drift": round(drift, 5),
            "held": held,
            "health": json.loads(server.get("/health")[2]).get("worker", {}).get("device"),
        }
        code = server.stop()
    return found | {"exit_code": code}


def write_model(folder: Path, size: str, device: str) -> Path:
    """Write random weights of klein's shape."""
    import torch

    from tools.random_weights import FULL, TINY, write_random

    where = "cpu" if device == "cpu" else f"cuda:{device}"
    if size == "tiny":
        return write_random(folder, TINY)
    return write_random(folder, FULL, dtype=torch.bfloat16, device=where)


def main() -> int:
    """Run, print, and say with the exit code whether every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with a model, instead of writing one")
    parser.add_argument("--cache", type=Path, help="a cache that is warm, instead of a new one")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="0", help="index of the card, or cpu to rehearse")
    parser.add_argument("--watchdog", type=float, default=20.0, help="KLEIN_WATCHDOG_S")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-faults-") as folder:
        found = run(given, Path(folder))
    print(f"{'fault':10} {'answered':24} {'next':6} {'after':>8}  worker")
    for row in found["faults"]:
        worker = "replaced" if row["worker_replaced"] else "kept"
        print(
            f"{row['fault']:10} {row['answer']:24} {row['next']:<6} "
            f"{row['next_after_s']:>6.2f} s  {worker}"
        )
    for text, is_held in found["held"].items():
        print(f"{'holds ' if is_held else 'BROKEN'}  {text}")
    print(json.dumps(found))
    return 0 if all(found["held"].values()) and found["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
