"""A card is left to programs that need it, and taken back when it is free; by readings alone."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from app.domain import GpuSnapshot
from app.telemetry.gpu import Gpu, Holder
from app.worker.card_claim import CardClaim
from app.worker.idle import IdleSleep
from app.worker.rest import Cause, Rest, RestState
from app.worker.warm_record import WarmRecord
from app.worker.yielding import CardWatch, Reading, Yielding, describe
from tests.e2e.test_service import wait_until
from tests.support.fake_nvml import FakeNvml

GB, MIB = 10**9, 2**20
TOTAL = 12 * GB


class Watched:
    """A card with 1 GB of a desktop and 9 GB of the worker, and its clock."""

    def __init__(self) -> None:
        self.watch = CardWatch(Reading(GB, TOTAL))
        self.now = 0.0

    def awake(self, others: int, *, is_idle: bool = True, reserved: int = 8 * GB) -> Cause | None:
        """A second later, with so much more than the desktop's."""
        self.now += 1
        used = min(TOTAL, GB + reserved + GB + others)
        return self.watch.awake(Reading(used, TOTAL, reserved), self.now, is_idle=is_idle)

    def asleep(self, others: int) -> Cause | None:
        """The same without the worker."""
        self.now += 1
        return self.watch.asleep(Reading(GB + others, TOTAL), self.now)


@pytest.fixture
def card() -> Watched:
    """One whose worker has been ready for a while."""
    watched = Watched()
    assert [watched.awake(0) for _ in range(3)] == [None] * 3
    return watched


def test_a_game_that_fills_the_card_gets_it(card: Watched) -> None:
    """At the second reading that finds it so, within two seconds."""
    assert [card.awake(2 * GB), card.awake(2 * GB)] == [None, Cause.YIELD]


@pytest.mark.parametrize(
    ("others", "reserved"),
    [(900 * MIB, 8 * GB), (0, 10 * GB), (GB + 500 * MIB, 7 * GB)],
    ids=["little growth", "our own growth", "room is left"],
)
def test_it_is_kept_where_nobody_needs_it(card: Watched, others: int, reserved: int) -> None:
    """Growth of others and a lack of room have to come together."""
    assert [card.awake(others, reserved=reserved) for _ in range(5)] == [None] * 5


def test_a_picture_is_finished_first(card: Watched) -> None:
    """And the two readings are of an idle worker."""
    assert [card.awake(2 * GB, is_idle=False) for _ in range(5)] == [None] * 5
    assert [card.awake(2 * GB), card.awake(2 * GB)] == [None, Cause.YIELD]


def test_a_moment_is_no_need(card: Watched) -> None:
    """One reading alone decides nothing."""
    assert [card.awake(each) for each in (2 * GB, 0, 2 * GB, 0)] == [None] * 4


def test_it_comes_back_when_there_is_room_for_a_minute(card: Watched) -> None:
    """For all that the worker was seen to take, and half a GiB."""
    card.awake(2 * GB)
    card.awake(2 * GB)
    assert {card.asleep(9 * GB) for _ in range(100)} == {None}
    assert {card.asleep(0) for _ in range(30)} == {None}
    assert card.asleep(2 * GB) is None, "2 GB are too much: the worker takes 9 of 12"
    assert {card.asleep(0) for _ in range(60)} == {None}
    assert card.asleep(0) is Cause.CARD_FREE


def test_it_is_left_at_most_once_in_five_minutes(card: Watched) -> None:
    """A program that comes and goes does not have the model loaded all the time."""
    card.awake(2 * GB)
    assert card.awake(2 * GB) is Cause.YIELD
    card.now += 100
    card.awake(0)
    assert {card.awake(2 * GB) for _ in range(150)} == {None}
    card.now += 100
    assert Cause.YIELD in {card.awake(2 * GB) for _ in range(3)}


def test_what_others_had_before_is_not_growth(card: Watched) -> None:
    """A service that starts beside a game stays as long as that does not grow."""
    watched = Watched()
    assert {watched.awake(GB + 900 * MIB) for _ in range(10)} == {None}


def test_a_card_without_room_for_a_worker_that_is_known_is_taken() -> None:
    """Half a GiB more than it needs has to be free."""
    watch = CardWatch(Reading(3 * GB, TOTAL))
    assert watch.is_taken(9 * GB)
    assert not watch.is_taken(8 * GB)


class FakePool:
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def sleep(self, cause: Cause, worker: object) -> None:
        self.asked.append(cause)

    def wake(self, cause: Cause, worker: object) -> None:
        self.asked.append(cause)

    def hold(self, worker: object) -> None:
        self.asked.append("hold")


def snapshot(used: int) -> GpuSnapshot:
    """A reading of NVML's."""
    return GpuSnapshot("RTX", "GPU-a", used, TOTAL, None, None, None)


def yielding(
    tmp_path: Path, first: GpuSnapshot | None, *, is_alone: bool = True, read=None, holders=tuple
):
    """A watcher of a worker that is ready, its pool and its worker."""
    pool = FakePool()
    worker = SimpleNamespace(
        rest=Rest(),
        supervisor=SimpleNamespace(is_ready=True),
        device=SimpleNamespace(name="RTX", uuid="GPU-a"),
    )
    watcher = Yielding(
        pool,
        worker,
        read or (lambda: first),
        holders=holders,
        reserved=lambda: 8 * GB,
        is_busy=lambda: False,
        record=WarmRecord(tmp_path, ("klein", "GPU-a")),
        claim=SimpleNamespace(is_alone=lambda: is_alone, close=lambda: None),
        clock=iter(range(10_000)).__next__,
    )
    watcher.begin()
    return watcher, pool, worker


def test_it_is_applied_to_the_worker(tmp_path: Path) -> None:
    """Left, and taken back."""
    watcher, pool, worker = yielding(tmp_path, snapshot(GB))
    for used in (10 * GB, 10 * GB, TOTAL, TOTAL):
        watcher.look(snapshot(used))
    assert pool.asked == [Cause.YIELD]
    worker.rest = Rest(RestState.ASLEEP, is_held=True)
    for _ in range(70):
        watcher.look(snapshot(GB))
    assert pool.asked == [Cause.YIELD, Cause.CARD_FREE]


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of a process that is not this one's, whose name would clear a terminal."""
    rename = r"open('/proc/self/comm', 'wb').write(b'\x1b[2J\nga\xffme'); print(os.getpid())"
    code = f"import os, sys\nif os.fork() == 0:\n {rename}; sys.stdout.flush(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as between:
        pid = int(between.stdout.readline())
        wait_until(lambda: psutil.Process(pid).ppid() != between.pid)
        yield pid


@pytest.fixture
def own() -> Iterator[int]:
    """The id of a process that this one has started."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


async def test_the_log_names_who_has_the_card(
    tmp_path: Path, stranger: int, own: int, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    """As far as NVML tells: never the service's own processes, nor what a terminal would obey."""
    monkeypatch.setattr("app.telemetry.gpu._FIRST_NAMESPACE", namespace())
    monkeypatch.setattr("app.worker.yielding._LOOK_S", 0.001)
    processes = {os.getpid(): 8 * GB, own: GB, stranger: 3 * GB}
    used = iter((GB, 10 * GB, 10 * GB, TOTAL, TOTAL))
    gpu = Gpu(0, load_nvml=lambda: FakeNvml(processes=processes))
    watcher, pool, _ = yielding(
        tmp_path,
        None,
        read=lambda: snapshot(next(used, TOTAL)),
        holders=gpu.named_holders,
    )
    task = asyncio.create_task(watcher.run())
    try:
        await asyncio.to_thread(wait_until, lambda: caplog.records)
    finally:
        task.cancel()
    assert pool.asked == [Cause.YIELD]
    (record,) = caplog.records
    name = f"?[2J?ga\N{REPLACEMENT CHARACTER}me (process {stranger}, 3.0 GB)"
    assert record.getMessage().endswith(f"which needs its memory; it is used by {name}.")


def test_nobody_is_named_where_nvml_does_not_tell(stranger: int, monkeypatch) -> None:
    """It may fail, name nobody, or tell the numbers of processes outside of this container."""

    def fail() -> None:
        raise OSError("libnvidia-ml.so.1")

    elsewhere = FakeNvml(processes={stranger: GB})
    monkeypatch.setattr("app.telemetry.gpu._FIRST_NAMESPACE", namespace())
    assert [each.pid for each in Gpu(0, load_nvml=lambda: elsewhere).named_holders()] == [stranger]
    monkeypatch.setattr("app.telemetry.gpu._FIRST_NAMESPACE", namespace() + 1)
    for load in (fail, FakeNvml, lambda: FakeNvml(processes={}), lambda: elsewhere):
        assert Gpu(0, load_nvml=load).named_holders() == ()
    assert describe(()) == ""


def test_a_line_names_the_largest() -> None:
    """Three of them; bytes only where the driver tells them."""
    holders = [Holder(pid, f"p{pid}", None if pid == 1 else GB) for pid in range(1, 6)]
    assert describe(holders) == (
        "; it is used by p1 (process 1), p2 (process 2, 1.0 GB), p3 (process 3, 1.0 GB) and 2 more"
    )


def namespace() -> int:
    """That of this process's ids."""
    return Path("/proc/self/ns/pid").stat().st_ino


def test_another_service_of_this_kind_gets_nothing(tmp_path: Path) -> None:
    """Two would take the card from each other for ever."""
    watcher, pool, _ = yielding(tmp_path, snapshot(GB), is_alone=False)
    for used in (10 * GB, TOTAL, TOTAL, TOTAL):
        watcher.look(snapshot(used))
    assert pool.asked == []


def test_without_a_reading_nothing_is_done(tmp_path: Path) -> None:
    """NVML may be missing, or fail at any time: never sleep by mistake."""
    watcher, pool, _ = yielding(tmp_path, None)
    watcher.look(snapshot(TOTAL))
    watcher, pool, _ = yielding(tmp_path, snapshot(GB))
    for used in (10 * GB, TOTAL):
        watcher.look(snapshot(used))
    watcher.look(None)
    assert pool.asked == []


def test_a_service_begins_asleep_where_the_card_is_taken(tmp_path: Path) -> None:
    """If it is known to have been ready there once; else it starts, and says what is missing."""
    _, pool, _ = yielding(tmp_path, snapshot(TOTAL))
    assert pool.asked == []
    watcher, _, _ = yielding(tmp_path, snapshot(GB))
    watcher.look(snapshot(10 * GB))
    _, pool, _ = yielding(tmp_path, snapshot(4 * GB))
    assert pool.asked == ["hold"]
    _, pool, _ = yielding(tmp_path, snapshot(GB))
    assert pool.asked == []


def test_a_record_is_of_one_model_card_and_version(tmp_path: Path) -> None:
    """And grows; one that others may have written, or that is damaged, is none."""
    WarmRecord(tmp_path, ("a", "1")).keep(5)
    WarmRecord(tmp_path, ("a", "1")).keep(3)
    assert WarmRecord(tmp_path, ("a", "1")).needed_bytes == 5
    assert WarmRecord(tmp_path, ("a", "2")).needed_bytes == 0
    (kept,) = (tmp_path / "warm").iterdir()
    for text in (b"", b"[]", b'{"needed_bytes": "x"}'):
        kept.write_bytes(text)
        assert WarmRecord(tmp_path, ("a", "1")).needed_bytes == 0
    kept.write_text('{"needed_bytes": 5}')
    kept.chmod(0o666)
    assert WarmRecord(tmp_path, ("a", "1")).needed_bytes == 0


def hold(folder: Path, ends: object, tells: object) -> None:
    """Claim the card in another process until told to end."""
    claim = CardClaim("GPU-a", folder)
    tells.send("claimed")
    ends.recv()
    claim.close()


def test_a_claim_is_seen_by_other_services(tmp_path: Path) -> None:
    """Until they end, however they do; another card's is none of it."""
    folder = tmp_path / "claims"
    claim, other = CardClaim("GPU-a", folder), CardClaim("GPU-b", folder)
    assert claim.is_alone()
    assert other.is_alone()
    context = multiprocessing.get_context("fork")
    ends, told = context.Pipe()
    said, tells = context.Pipe()
    process = context.Process(target=hold, args=(folder, told, tells))
    process.start()
    said.recv()
    assert not claim.is_alone()
    assert other.is_alone()
    process.kill()
    process.join()
    assert claim.is_alone()
    ends.close()
    claim.close()


def test_a_folder_of_another_users_claims_nothing(tmp_path: Path) -> None:
    """It could be a link to anywhere."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert CardClaim("GPU-a", tmp_path / "link").is_alone()
    assert not list((tmp_path / "real").iterdir())


def test_idleness_is_counted_from_the_last_need() -> None:
    """Whatever runs, waits or loads is a need; what has slept once is told once a period."""
    now, needed, asked = [0.0], [True], []
    idle = IdleSleep(300, lambda: needed[0], asked.append, clock=lambda: now[0])
    for seconds, is_needed in ((400, True), (699, False), (700, False), (701, False), (999, True)):
        now[0], needed[0] = seconds, is_needed
        idle.look()
    assert asked == [Cause.IDLE]
