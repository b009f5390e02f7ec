"""Ten minutes at twice the capacity, with everything that can go wrong: `make soak MINUTES=10`.

Why it matters: a service that people forget in a rack must not lose an answer, leak, or stop
answering its probes, however it is treated. A scripted engine stands in for the card (no weights,
no GPU), everything else is the real service in a process of its own.

Four parts, each with its promise:

1. MINUTES of open-loop traffic at twice what the engine can make: pictures, pairs, clients that
   hang up, requests that are wrong, pictures that run out of memory or fail, and `kill -9` of the
   worker half a second after a finished picture. Nothing is lost, every 5xx is explained, memory
   and descriptors do not grow. `/health/live` is asked every 50 ms meanwhile.
2. A pause, then the gauges: nothing waits, nothing runs, and the counters' sum is what was sent.
3. Two thousand connections for each minute, from a fuzzer of the byte stream: the event loop is
   never late by 100 ms, memory is bounded, every descriptor comes back, the next picture is made.
4. Ten drains for each minute: SIGTERM at a random moment, every accepted picture delivered.

Prints a table for people and one JSON document as the last line; exits with 1 if a promise broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.byte_streams import Found, fuzz
from tests.support.chaos import (
    GONE,
    LOST,
    Answer,
    Drained,
    ask,
    drain_often,
    port_of,
    request_bytes,
)
from tests.support.server import Server

PICTURE_S = 0.08
QUEUE = 12
KILL_EVERY_S = 10.0
PROBE_EVERY_S = 0.05
SAMPLE_EVERY_S = 2.0
SIZE = {"width": 128, "height": 128}
FUZZED_PER_MINUTE = 2000
FUZZ_GROWTH_BYTES = 100e6
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
WRONG = (
    (request_bytes("/generate", b"{"), 400),
    (request_bytes("/generate", {"prompt": ""}), 400),
    (request_bytes("/generate", {"prompt": "x", "width": 100}), 400),
    (request_bytes("/v1/images/generations", {"prompt": "x", "size": "9x9"}), 400),
    (
        request_bytes("/v1/images/edits", {"prompt": "x", "images": [{"image_url": "file:///"}]}),
        400,
    ),
    (request_bytes("/nowhere", {}), 404),
    (request_bytes("/generate", {}, "DELETE"), 405),
)


@dataclass(slots=True)
class Sample:
    """The service's own process at one moment."""

    requests: int
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(slots=True)
class Soak:
    """What was done to one service, and what it answered."""

    server: Server
    trace: Path
    chance: random.Random
    sent: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    probes_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    kills: int = 0

    async def run(self, seconds: float) -> None:
        """Let it rain for *seconds*, then wait for the last answers."""
        until = time.monotonic() + seconds
        beside = [
            asyncio.create_task(part(until)) for part in (self._probe, self._kill, self._sample)
        ]
        asking: set[asyncio.Task[None]] = set()
        started = time.monotonic()
        while (now := time.monotonic()) < until:
            due = int((now - started) * 2 / PICTURE_S)
            for _ in range(max(0, min(due - self.sent, 50))):
                self.sent += 1
                task = asyncio.create_task(self._one())
                asking.add(task)
                task.add_done_callback(asking.discard)
            await asyncio.sleep(0.02)
        await asyncio.gather(*beside)
        while asking:
            await asyncio.wait(asking)

    def _one(self) -> Coroutine[Any, Any, None]:
        kind = self.chance.random()
        port = port_of(self.server)
        if kind < 0.08:
            data, wanted = self.chance.choice(WRONG)
            return self._wrong(port, data, wanted)
        seed = self.chance.randrange(2**32)
        if kind < 0.18:
            data = request_bytes("/generate", {"prompt": "leaving", "seed": seed, **SIZE})
            return self._leaving(port, data, self.chance.uniform(0.0, 1.0))
        if kind < 0.23:
            body = {"prompt": "a pair", "n": 2, "seed": seed, "size": "128x128"}
            return self._picture(port, request_bytes("/v1/images/generations", body))
        return self._picture(
            port, request_bytes("/generate", {"prompt": "x", "seed": seed, **SIZE})
        )

    async def _picture(self, port: int, data: bytes) -> None:
        self._count(await ask(port, data))

    async def _leaving(self, port: int, data: bytes, after_s: float) -> None:
        self._count(await ask(port, data, leave_after_s=after_s))

    async def _wrong(self, port: int, data: bytes, wanted: int) -> None:
        answer = await ask(port, data)
        self._count(answer)
        # What cannot be taken now is refused before it is read.
        if answer.status not in {wanted, 503, LOST}:
            self.unexplained.append(f"{answer.status} for what deserves {wanted}")

    def _count(self, answer: Answer) -> None:
        self.counted[f"{answer.status} {answer.code}".strip()] += 1
        if answer.status == 503 and not 1 <= int(answer.headers.get("retry-after", 0)) <= 60:
            self.unexplained.append("503 without a Retry-After")
        if answer.status in {500, 504} and answer.headers.get("x-should-retry") != "false":
            self.unexplained.append(f"{answer.status} that asks to be repeated")
        if isinstance(answer.status, int) and answer.status >= 500:
            known = {"server_is_overloaded", "model_loading", "out_of_memory", "generation_failed"}
            if answer.code not in known:
                self.unexplained.append(f"{answer.status} {answer.code}")

    async def _probe(self, until: float) -> None:
        """Ask whether it lives, on one connection, every 50 ms."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(self.server))
        while time.monotonic() < until:
            started = time.monotonic()
            writer.write(LIVE)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            await reader.readexactly(length)
            self.probes_s.append(time.monotonic() - started)
            await asyncio.sleep(max(0.0, PROBE_EVERY_S - self.probes_s[-1]))
        writer.close()

    async def _kill(self, until: float) -> None:
        """End the worker half a second after a finished picture, again and again."""
        while time.monotonic() + KILL_EVERY_S < until:
            await asyncio.sleep(KILL_EVERY_S - 0.5)
            await self._wait_for_a_picture(until)
            await asyncio.sleep(0.5)
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(self.server.worker_pid(), signal.SIGKILL)
                self.kills += 1

    async def _wait_for_a_picture(self, until: float) -> None:
        seen = self._finished()
        # The trace is another process's file: there is no event to wait for.
        while self._finished() == seen and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def _sample(self, until: float) -> None:
        process = psutil.Process(self.server.process.pid)
        while time.monotonic() < until:
            with process.oneshot():
                self.samples.append(
                    Sample(
                        self.sent,
                        process.memory_info().rss,
                        process.num_fds(),
                        process.num_threads(),
                    )
                )
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _finished(self) -> int:
        return self._traced("finished")

    def _traced(self, word: str) -> int:
        return self.trace.read_text().count(word) if self.trace.exists() else 0

    def result(self) -> dict[str, Any]:
        """Everything that was found, as plain values."""
        later = self.samples[len(self.samples) // 5 :]
        probes = sorted(self.probes_s)
        struck = {fault: self._traced(f"struck {fault}") for fault in ("oom", "fail")}
        self._explain(struck)
        return {
            "sent": self.sent,
            "outcomes": dict(sorted(self.counted.items())),
            "lost": self.counted[LOST],
            "unexplained": self.unexplained[:20],
            "worker_kills": self.kills,
            "faults_struck": struck,
            "pictures_finished": self._finished(),
            "rss_mb_per_1000_requests": round(
                slope([s.requests for s in later], [s.rss_bytes for s in later]) * 1000 / 1e6, 3
            ),
            "rss_mb": [round(later[0].rss_bytes / 1e6, 1), round(later[-1].rss_bytes / 1e6, 1)],
            "descriptors_per_1000_requests": round(
                slope([s.requests for s in later], [s.descriptors for s in later]) * 1000, 3
            ),
            "threads": [min(s.threads for s in later), max(s.threads for s in later)],
            "live_probes": len(probes),
            "live_p50_ms": round(statistics.median(probes) * 1000, 1),
            "live_p99_ms": round(probes[int(0.99 * (len(probes) - 1))] * 1000, 1),
            "live_max_ms": round(probes[-1] * 1000, 1),
        }

    def _explain(self, struck: dict[str, int]) -> None:
        """Every failed picture must go back to a scripted fault or to a kill."""
        oom = self.counted["500 out_of_memory"]
        failed = self.counted["500 generation_failed"]
        # A killed worker takes the picture that it makes and the one that is on its way out.
        may_fail = struck["fail"] + 2 * self.kills
        if oom > struck["oom"]:
            self.unexplained.append(f"{oom} x out_of_memory, {struck['oom']} scripted")
        if failed > may_fail:
            self.unexplained.append(f"{failed} x generation_failed, at most {may_fail} scripted")


def slope(xs: list[int], ys: list[int]) -> float:
    """Least squares: how much y grows with each x."""
    if len(set(xs)) < 2:
        return 0.0
    return float(statistics.linear_regression(xs, ys).slope)


async def read_gauges(soak: Soak) -> dict[str, float]:
    """Wait until nothing runs, and read what the metrics say then."""
    server = soak.server
    for _ in range(100):
        if await asyncio.to_thread(server.metric, "klein_requests_running") == 0:
            break
        await asyncio.sleep(0.1)
    scrape = (await asyncio.to_thread(server.get, "/metrics"))[2].decode()
    outcomes = sum(
        float(line.rsplit(" ", 1)[1])
        for line in scrape.splitlines()
        if line.startswith("klein_requests_total{")
        and not any(path in line for path in ("/health", "/metrics"))
    )
    return {
        "klein_queue_size": server.metric("klein_queue_size"),
        "klein_requests_running": server.metric("klein_requests_running"),
        "klein_event_loop_lag_seconds": server.metric("klein_event_loop_lag_seconds"),
        "sum_of_outcomes": outcomes,
    }


def broken_promises(found: dict[str, Any]) -> list[str]:
    """Which of the promises did not hold."""
    gauges, unanswered = found["gauges"], found["outcomes"].get(GONE, 0)
    checks = {
        "nothing is lost": found["lost"] == 0,
        "every 5xx is explained": not found["unexplained"],
        "memory grows by less than 1 MB in 1,000 requests": found["rss_mb_per_1000_requests"] < 1,
        "descriptors do not grow": abs(found["descriptors_per_1000_requests"]) < 1,
        "nothing waits or runs in the end": gauges["klein_queue_size"] == 0
        and gauges["klein_requests_running"] == 0,
        "every request was counted once": 0
        <= found["sent"] - gauges["sum_of_outcomes"]
        <= unanswered,
        **fuzz_promises(found["fuzz"]),
        "no drain lost anything": found["drains_lost"] == 0,
        "every drain ended with 0": found["drains_failed"] == 0,
    }
    return [text for text, holds in checks.items() if not holds]


async def fuzzed(connections: int, seed: int) -> dict[str, Any]:
    """Let the fuzzer loose on a service of its own; what was found, as plain values."""
    with Server(module="tests.support.scripted_engine", model="shapes", device="cpu") as server:
        found: Found = await fuzz(server, seed=seed, count=connections, port=port_of(server))
    return {
        "connections": found.connections,
        "seconds": round(found.seconds, 1),
        "lag_max_ms": round(found.lag_s * 1000, 1),
        "rss_growth_mb": round(found.rss_growth_bytes / 1e6, 1),
        "peak_growth_mb": round(found.peak_growth_bytes / 1e6, 1),
        "descriptors": list(found.descriptors),
        "is_served_after": found.is_served,
    }


def fuzz_promises(found: dict[str, Any]) -> dict[str, bool]:
    """What everybody else may expect of a service that is fuzzed."""
    before, after = found["descriptors"]
    return {
        "no byte stream makes the event loop late by 100 ms": found["lag_max_ms"] < 100,
        "byte streams cost less than 100 MB": found["peak_growth_mb"] < FUZZ_GROWTH_BYTES / 1e6,
        "byte streams leave no descriptor open": after <= before,
        "after the byte streams a picture is made": found["is_served_after"],
    }


def table(found: dict[str, Any]) -> str:
    """Write it for people, as Markdown."""
    rows = [("requests sent", f"{found['sent']:,}")]
    rows += [(f"answered {name}", f"{count:,}") for name, count in found["outcomes"].items()]
    rows += [
        ("lost", str(found["lost"])),
        ("5xx without an explanation", str(len(found["unexplained"]))),
        ("workers killed with SIGKILL", str(found["worker_kills"])),
        ("scripted faults", ", ".join(f"{n} {k}" for k, n in found["faults_struck"].items())),
        ("memory, MB for 1,000 requests", f"{found['rss_mb_per_1000_requests']:+.3f}"),
        ("memory, MB", " to ".join(map(str, found["rss_mb"]))),
        ("descriptors for 1,000 requests", f"{found['descriptors_per_1000_requests']:+.3f}"),
        ("threads", " to ".join(map(str, found["threads"]))),
        (
            "`/health/live`, p50 / p99 / most, ms",
            f"{found['live_p50_ms']} / {found['live_p99_ms']} / {found['live_max_ms']}",
        ),
        ("probes", f"{found['live_probes']:,}"),
        *((f"`{name}` in the end", f"{value:g}") for name, value in found["gauges"].items()),
        ("fuzzed connections", f"{found['fuzz']['connections']:,}"),
        ("event loop late by at most, fuzzed, ms", str(found["fuzz"]["lag_max_ms"])),
        (
            "memory, fuzzed, MB more after / at most",
            f"{found['fuzz']['rss_growth_mb']:+} / {found['fuzz']['peak_growth_mb']:+}",
        ),
        ("descriptors, fuzzed", " to ".join(map(str, found["fuzz"]["descriptors"]))),
        ("a picture after it", "made" if found["fuzz"]["is_served_after"] else "not made"),
        ("drains at random moments", str(found["drains"])),
        ("lost by drains", str(found["drains_lost"])),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["| | |", "|---|---|", *(f"| {n:{width}} | {v} |" for n, v in rows)])


async def soak(minutes: float, drains: int, seed: int) -> dict[str, Any]:
    """Do all four parts."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        script = (f"slow={PICTURE_S}", "oom%50", "fail%70", f"trace={trace}")
        with Server(
            *script,
            module="tests.support.scripted_engine",
            model="shapes",
            device="cpu",
            queue_images=QUEUE,
        ) as server:
            running = Soak(server, trace, random.Random(seed))
            await running.run(minutes * 60)
            gauges = await read_gauges(running)
            found = running.result() | {"gauges": gauges}
    found["fuzz"] = await fuzzed(round(FUZZED_PER_MINUTE * minutes), seed)
    drained: list[Drained] = await drain_often(drains, seed=seed)
    return found | {
        "minutes": minutes,
        "drains": len(drained),
        "drains_lost": sum(drain.lost for drain in drained),
        "drains_failed": sum(drain.exit_code != 0 for drain in drained),
    }


def main() -> int:
    """Run, print, and say with the exit code whether every promise held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--drains", type=int, help="default: ten for each minute")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    drains = round(10 * given.minutes) if given.drains is None else given.drains
    found = asyncio.run(soak(given.minutes, drains, given.seed))
    broken = broken_promises(found)
    print(table(found))
    print()
    for text in broken:
        print(f"BROKEN: {text}")
    print(json.dumps(found | {"broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
