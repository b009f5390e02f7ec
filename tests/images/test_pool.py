"""Pictures are decoded in processes that may die of them, and nobody else notices."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from app.errors import InvalidRequest, Kind, Unavailable
from app.images.decoder import Limits
from app.images.pool import DecoderPool
from app.images.preparing import AUTO, Upload, prepare
from app.images.uploads import to_pillow
from tests.api.pictures import black_and_white_mask, mask, photo
from tests.api.sockets import until
from tests.data.hostile import (
    PICTURES,
    hidden_scans,
    jpeg_of_scans,
    mutated,
    png_bomb,
    slow_jpeg,
)
from tests.images import noise, saved
from tests.support.long_form import one_of
from tests.support.timing import TIMED

pytestmark = pytest.mark.asyncio(loop_scope="module")


def slow() -> list[bytes]:
    """What takes seconds to decode."""
    return [slow_jpeg()] * 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _started():
    os.environ["KLEIN_API_KEYS"] = "a-key-of-the-service"
    pool = DecoderPool(limits=Limits(cpu_s=1))
    pool.start()
    del os.environ["KLEIN_API_KEYS"]
    yield pool
    pool.kill()


@pytest.fixture
def pool(_started: DecoderPool) -> Iterator[DecoderPool]:
    """Two decoders for the whole module; each test leaves two behind."""
    yield _started
    assert busy_pids(_started) == []


def nearest(width: int, height: int) -> tuple[int, int]:
    """Take every size."""
    return width, height


async def decode(
    pool: DecoderPool, *files: bytes, masked: bytes | None = None, size=None, client="a"
):
    """Prepare files as a route would."""
    uploads = [Upload(data, f"images[{index}]") for index, data in enumerate(files)]
    over = masked and Upload(masked, "mask")
    return await pool.prepare(uploads, over, size, nearest, client=client)


async def test_no_turn_of_the_event_loop_copies_a_large_file(pool, monkeypatch) -> None:
    """Neither in nor out: of 5 MB in one turn nobody else would be answered meanwhile."""
    turns: Counter[int] = Counter()
    turn = 0

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def write(number: int, data, at: int, *, plain=os.pwrite) -> int:
        turns[turn] += (written := plain(number, data, at))
        return written

    def read(number: int, buffers, at: int, *, plain=os.preadv) -> int:
        turns[turn] += (count := plain(number, buffers, at))
        return count

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "preadv", read)
    decoder = await pool._take()
    picture = saved(to_pillow(noise(1280, 1280)), "PNG")
    counting = asyncio.create_task(count())
    try:
        await decoder.prepare([Upload(picture, "image")], None, None, nearest)
    finally:
        counting.cancel()
        pool._end(decoder)

    assert sum(turns.values()) > 5_000_000
    assert max(turns.values()) <= 64 * 1024


def server_pid(pool: DecoderPool) -> int | None:
    """The process that its decoders are forked from."""
    return pool._server and pool._server.pid


def busy_pids(pool: DecoderPool) -> list[int]:
    """Its decoders that are at work."""
    return [decoder.pid for decoder in pool._busy]


def children(pool: DecoderPool) -> list[psutil.Process]:
    """The decoders of *pool*."""
    return psutil.Process(server_pid(pool)).children()


async def test_what_comes_back_is_what_this_process_would_have_made(pool):
    """References, mask and size to the byte, from files and from base64."""
    text = base64.b64encode(photo(128, 64, "JPEG"))
    files = [Upload(photo(300, 200), "a"), Upload(text, "b", is_base64=True)]
    over = Upload(mask(300, 200), "mask")

    expected = prepare(files, over, None, nearest)

    assert expected == await pool.prepare(files, over, None, nearest, client="a")
    assert expected.mask is not None
    assert isinstance(expected.mask.weights, bytes)


async def test_that_a_mask_was_black_and_white_comes_back(pool):
    """The answer warns of it."""
    mask = Upload(black_and_white_mask(64, 64), "mask", repaints=AUTO)
    edit = await pool.prepare([Upload(photo(64, 64), "a")], mask, None, nearest, client="a")

    assert edit.is_black_and_white
    assert edit.mask.weights[:64] == bytes([255] * 32 + [0] * 32)


async def test_a_refusal_crosses_with_its_place_and_code(pool):
    """Message, param and code are those of the decoder."""
    with pytest.raises(InvalidRequest, match="image at index 1 is animated") as first:
        await decode(pool, photo(), PICTURES["apng"]())
    with pytest.raises(InvalidRequest, match="no alpha channel") as second:
        await decode(pool, photo(), masked=photo())

    assert (first.value.param, first.value.code) == ("images[1]", "invalid_image")
    assert (second.value.param, second.value.code) == ("mask", "invalid_mask")


@TIMED
async def test_a_picture_may_take_so_much_processor_time_and_no_more(pool, is_timed: bool):
    """The decoder is ended by the kernel, the caller is told by the place of the picture, and the
    next one is served.
    """
    files = slow()
    before = time.process_time()
    with pytest.raises(InvalidRequest, match="1 s of processor time") as caught:
        await decode(pool, *files)

    assert caught.value.code == "invalid_image"
    assert caught.value.message.startswith(f"{caught.value.param} cannot be decoded")
    assert caught.value.param in {f"images[{index}]" for index in range(4)}
    assert not is_timed or time.process_time() - before < 0.5  # of this process
    assert (await decode(pool, photo())).size == (128, 128)


@pytest.mark.parametrize("scans", [100, 101])
async def test_a_jpeg_has_at_most_a_hundred_scans(pool, scans):
    """Counted before anything is decoded; a real one has about ten."""
    data = jpeg_of_scans(scans)
    if scans == 100:
        assert (await decode(pool, data)).size == (64, 64)
    else:
        with pytest.raises(InvalidRequest, match="more than 100 scans"):
            await decode(pool, data)


@pytest.mark.parametrize("code", [0x01, 0xD8])
async def test_no_marker_hides_a_scan(pool, code):
    """Nothing is passed over for the length of a marker that has none."""
    with pytest.raises(InvalidRequest, match="more than 100 scans"):
        await decode(pool, hidden_scans(64, 64, 40, code))


@TIMED
async def test_who_leaves_takes_his_decoder_along(pool, is_timed: bool):
    """With both at work for callers that leave, the next is served at once, by new ones."""
    leaving = [asyncio.create_task(decode(pool, *slow())) for _ in range(2)]
    await until(lambda: len(busy_pids(pool)) == 2)
    busy = set(busy_pids(pool))
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)

    async with asyncio.timeout(1 if is_timed else 30):
        await decode(pool, photo())

    assert all(task.cancelled() for task in leaving)
    await until(lambda: not busy & {child.pid for child in children(pool)})


async def test_two_are_decoded_at_a_time(pool):
    """A third waits for a place; there are never more processes than places."""
    working = [asyncio.create_task(decode(pool, *slow())) for _ in range(2)]
    await until(lambda: len(busy_pids(pool)) == 2)
    third = asyncio.create_task(decode(pool, photo()))
    await asyncio.sleep(0)

    assert len(busy_pids(pool)) == 2
    assert len(children(pool)) == 2
    assert not third.done()

    working[0].cancel()
    assert (await third).size == (128, 128)
    working[1].cancel()
    await asyncio.wait(working)


async def test_the_pictures_of_one_client_keep_no_other_waiting(pool):
    """Two of one client's requests are decoded and six wait: who comes then is next."""
    working = [asyncio.create_task(decode(pool, *slow())) for _ in range(2)]
    await until(lambda: len(busy_pids(pool)) == 2)
    waiting = [asyncio.create_task(decode(pool, photo())) for _ in range(6)]
    await asyncio.sleep(0)
    other = asyncio.create_task(decode(pool, photo(), client="b"))
    await asyncio.sleep(0)

    working[0].cancel()
    await other
    assert not any(task.done() for task in waiting)

    working[1].cancel()
    await asyncio.wait([*working, *waiting])


async def test_a_decoder_serves_one_request(pool):
    """What a picture may have done to its process, nobody after it meets."""
    await decode(pool, photo())
    seen = {child.pid for child in children(pool)}
    for _ in range(3):
        await decode(pool, photo())

    assert not seen & {child.pid for child in children(pool)}


@TIMED
async def test_idle_decoders_that_were_killed_are_replaced(pool, is_timed: bool):
    """Whoever killed them."""
    for child in children(pool):
        child.kill()

    async with asyncio.timeout(2 if is_timed else 30):
        assert (await decode(pool, photo())).size == (128, 128)


async def test_a_fork_server_that_was_killed_is_replaced(pool, caplog):
    """With a line in the log, and without a request that fails."""
    pid = server_pid(pool)
    os.kill(pid, signal.SIGKILL)

    await until(lambda: server_pid(pool) not in {pid, None})
    async with asyncio.timeout(5):
        assert (await decode(pool, photo())).size == (128, 128)

    assert "fork server has ended" in caplog.text


async def test_no_picture_is_blamed_for_the_end_of_the_fork_server(pool):
    """It takes its decoders along when it fails: whoever waited for one is told to try again."""
    working = asyncio.create_task(decode(pool, *slow()))
    await until(lambda: any(decoder.began for decoder in pool._busy))
    pool._server._control.send(b"nonsense")

    with pytest.raises(Unavailable):
        await working
    async with asyncio.timeout(5):
        await until(lambda: "2 idle" in repr(pool), limit_s=5)


async def test_a_fork_server_that_stands_still_is_replaced(caplog):
    """Whoever waits for its decoders is told to try again, the next is served, and neither it nor
    the decoders that it had are left behind; the event loop waits for none of that."""
    pool = DecoderPool(limits=Limits(start_s=0.3))
    pool.start()
    await until(lambda: "2 idle" in repr(pool))
    working = asyncio.create_task(decode(pool, *slow()))
    await until(lambda: any(decoder.began for decoder in pool._busy))
    old = psutil.Process(server_pid(pool))
    processes = [old, *old.children()]
    old.suspend()
    try:
        await decode(pool, photo(), client="b")
        with pytest.raises(Unavailable):
            await decode(pool, photo(), client="b")
        with pytest.raises(Unavailable):
            await working
        await until(lambda: "2 idle" in repr(pool))
        assert (await decode(pool, photo())).size == (128, 128)
        await until(lambda: all(is_gone(process) for process in processes))
        await until(lambda: not old.is_running())
    finally:
        pool.kill()

    assert "No decoder comes from their fork server" in caplog.text


async def test_the_loop_never_waits_for_a_fork_server_to_end(pool):
    """One that has closed its end and stands still is killed; another is there at once."""
    await until(lambda: "2 idle" in repr(pool))
    old = psutil.Process(server_pid(pool))
    old.suspend()
    await until(lambda: old.status() == psutil.STATUS_STOPPED)
    pool._server._control.shutdown(socket.SHUT_RDWR)

    await until(lambda: server_pid(pool) != old.pid)
    await until(lambda: "2 idle" in repr(pool))
    await until(lambda: not old.is_running())


SHORT = """
import os, socket, sys, time
sys.path[:] = sys.argv[4:]
import app.images.fork_server as f
plain, calls = socket.send_fds, []
def send_fds(*arguments):
    calls.append(time.monotonic())
    if 2 < len(calls) < 6:
        raise OSError(105, "No buffer space available")
    if len(calls) == 6:
        print(*calls[2:], file=open(os.environ["PYTHON_CALLS"], "w"), flush=True)
    return plain(*arguments)
socket.send_fds = send_fds
f._RETRY_S = 0.2
f.main(*sys.argv[1:4])
"""


async def test_a_decoder_that_cannot_be_handed_over_is_made_anew(monkeypatch, tmp_path):
    """Without a process left behind, and not as fast as the processor can."""
    monkeypatch.setattr("app.images.processes._PROGRAM", SHORT)
    monkeypatch.setenv("PYTHON_CALLS", str(calls := tmp_path / "calls"))
    pool = DecoderPool()
    pool.start()
    try:
        await until(lambda: "2 idle" in repr(pool))
        pid = server_pid(pool)
        await decode(pool, photo())
        await until(lambda: "2 idle" in repr(pool))
        assert server_pid(pool) == pid
        await until(lambda: len(children(pool)) == 2)
    finally:
        pool.kill()

    times = [float(each) for each in calls.read_text().split()]
    assert all(second - first >= 0.2 for first, second in pairwise(times))


@pytest.mark.parametrize("descriptors", one_of(5, 6, 7, 8))
async def test_without_descriptors_a_fork_server_waits_for_some(pool, descriptors):
    """It has five; whichever it has none for, it goes on with the decoder of somebody else."""
    await until(lambda: "2 idle" in repr(pool))
    server = psutil.Process(server_pid(pool))
    other = await pool._take()
    before = server.rlimit(psutil.RLIMIT_NOFILE)
    server.rlimit(psutil.RLIMIT_NOFILE, (descriptors, before[1]))
    try:
        await decode(pool, photo())
        await asyncio.sleep(0.1)
        assert other.is_alive()
    finally:
        server.rlimit(psutil.RLIMIT_NOFILE, before)
        pool._end(other)

    await until(lambda: "2 idle" in repr(pool))
    assert server_pid(pool) == server.pid


async def test_without_descriptors_the_service_keeps_its_fork_server(pool, monkeypatch):
    """A decoder that comes without its ends, which cannot be opened, is replaced a moment later."""
    monkeypatch.setattr("app.images.processes._REPLACE_S", 0.1)
    await until(lambda: "2 idle" in repr(pool))
    pid, seen = server_pid(pool), {child.pid for child in children(pool)}
    lost: list[bytes] = []

    def without_ends(*arguments, plain=socket.recv_fds):
        message, descriptors, *rest = plain(*arguments)
        if descriptors and len(lost) < 2:
            lost.append(message)
            os.close(descriptors.pop())
        return message, descriptors, *rest

    monkeypatch.setattr(socket, "recv_fds", without_ends)
    await decode(pool, photo())
    await until(lambda: len(lost) == 2 and "2 idle" in repr(pool))

    assert server_pid(pool) == pid
    assert not {int(each) for each in lost} & {child.pid for child in children(pool)} - seen


SLEEPS = """
import sys, time
sys.path[:] = sys.argv[4:]
import app.images.fork_server as f
f.serve = lambda *_: time.sleep(600)
f.main(*sys.argv[1:4])
"""


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_who_loses_the_fork_server_loses_its_decoders(monkeypatch, is_noticed):
    """One that sleeps, and so meets no limit, outlives neither its server nor the service, though
    that ends before it has noticed; and its id is not sent to another server."""
    monkeypatch.setattr("app.images.processes._PROGRAM", SLEEPS)
    pool = DecoderPool()
    pool.start()
    await until(lambda: "2 idle" in repr(pool))
    decoder = await pool._take()
    process = psutil.Process(decoder.pid)
    killed: list[int] = []
    try:
        os.kill(pid := server_pid(pool), signal.SIGKILL)
        if is_noticed:
            await until(lambda: server_pid(pool) not in {pid, None})
            monkeypatch.setattr(pool._server, "kill_decoder", killed.append)
            pool._end(decoder)
            await until(lambda: is_gone(process))
    finally:
        pool.kill()
    await until(lambda: is_gone(process))

    decoder.close()
    assert killed == []


async def test_a_decoder_is_killed_though_its_server_reads_late(pool):
    """With no room in the control socket the kill is kept until there is some."""
    await until(lambda: "2 idle" in repr(pool))
    decoder = await pool._take()
    process = psutil.Process(decoder.pid)
    process.suspend()
    server = psutil.Process(server_pid(pool))
    server.suspend()
    await until(lambda: server.status() == psutil.STATUS_STOPPED)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                pool._server._control.send(b"0")
        pool._end(decoder)
        await asyncio.sleep(0.1)
        assert not is_gone(process)
    finally:
        server.resume()

    await until(lambda: is_gone(process))
    assert server_pid(pool) == server.pid


REQUEST: ContextVar[str] = ContextVar("request")


class Noting(DecoderPool):
    """Notes of which request's context each of its callbacks has."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.of: dict[str, str | None] = {}

    def _add(self, decoder) -> None:
        self.of["add"] = REQUEST.get(None)
        super()._add(decoder)

    def _on_server_lost(self) -> None:
        self.of["lost"] = REQUEST.get(None)
        super()._on_server_lost()

    def _replace_server(self) -> None:
        self.of["replace"] = REQUEST.get(None)
        super()._replace_server()

    def _retry(self) -> None:
        self.of["retry"] = REQUEST.get(None)
        super()._retry()


async def test_no_callback_keeps_the_context_of_a_request(monkeypatch):
    """Which may have started the fork server, or found that it has ended or hangs."""
    monkeypatch.setattr("app.images.pool._SERVER_START_S", 0.1)
    monkeypatch.setattr("app.images.processes._PROGRAM", "import time; time.sleep(60)")
    pool = Noting(limits=Limits(start_s=30))

    async def request() -> None:
        REQUEST.set("a")
        await decode(pool, photo())

    working = asyncio.create_task(request())
    try:
        await until(lambda: {"replace", "retry"} <= set(pool.of))
        monkeypatch.undo()
        await working
        os.kill(server_pid(pool), signal.SIGKILL)
        await until(lambda: "lost" in pool.of)
        assert pool.of == dict.fromkeys(("replace", "retry", "add", "lost"))
    finally:
        working.cancel()
        pool.kill()


async def test_decoders_start_whatever_number_their_socket_has():
    """With more than 1,024 descriptors open, in the service and so in what it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    files = []
    pool = DecoderPool(limits=Limits(start_s=3))
    try:
        files = [os.dup(0) for _ in range(1100)]
        assert (await decode(pool, photo())).size == (128, 128)
    finally:
        for number in files:
            os.close(number)
        pool.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_signals_to_the_group_do_not_reach_them(pool):
    """Ctrl-C and a service manager speak to every process; the service alone decides."""
    for process in (psutil.Process(server_pid(pool)), *children(pool)):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)

    pid = server_pid(pool)
    assert (await decode(pool, photo())).size == (128, 128)
    assert pid == server_pid(pool)


async def test_a_decoders_process_has_nothing_worth_taking(pool):
    """No key in its environment, neither torch nor numpy in its memory, no files of ours open."""
    await decode(pool, photo())
    await until(lambda: "2 idle" in repr(pool))
    for pid in (server_pid(pool), *(child.pid for child in children(pool))):
        process = Path(f"/proc/{pid}")

        assert b"a-key-of-the-service" not in (process / "environ").read_bytes()
        assert not {"torch", "numpy"} & set(
            (process / "maps").read_text().replace("/", " ").split()
        )
        assert len(list((process / "fd").iterdir())) < 12


async def test_memory_is_limited():
    """A picture that needs more than the decoder may have is refused as such."""
    small = DecoderPool(limits=Limits(memory_bytes=120_000_000))
    try:
        with pytest.raises(InvalidRequest, match="memory") as caught:
            await decode(small, png_bomb(4000, 4000))
        assert caught.value.code == "invalid_image"
        assert (await decode(small, photo())).size == (128, 128)
    finally:
        small.kill()


async def test_a_decoder_shares_no_more_memory_than_it_may_have():
    """One that a picture has taken over writes as much as its address space to what it shares."""
    program = (
        "import os; from app.images.decoder import Limits, restrict\n"
        "shared = os.memfd_create('image'); restrict(Limits(memory_bytes=2**30))\n"
        "os.ftruncate(shared, 2**30); print('as much', flush=True)\n"
        "try: os.ftruncate(shared, 2**30 + 1)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()

    assert said.decode().splitlines() == ["as much", "File too large"]


async def test_a_decoder_that_cuts_shared_memory_off_has_ended_early(pool):
    """The service reads what is not there any more, and neither crashes nor waits."""
    decoder = await pool._take()
    try:
        os.ftruncate(decoder.shared.fileno(), 100)
        with pytest.raises(EOFError):
            await decoder._receive_edit(
                {"references": [[64, 64]], "mask": None}, 1, has_mask=False, result=(64, 64)
            )
    finally:
        pool._end(decoder)


async def test_a_decoder_that_stands_still_is_given_up():
    """One that takes no processor time is ended by the clock, and its place is free again."""
    pool = DecoderPool(limits=Limits(wall_s=2))
    try:
        working = asyncio.create_task(decode(pool, *slow()))
        await until(lambda: busy_pids(pool))
        os.kill(busy_pids(pool)[0], signal.SIGSTOP)
        with pytest.raises(InvalidRequest):
            await working
        assert busy_pids(pool) == []
        assert (await decode(pool, photo())).size == (128, 128)
    finally:
        pool.kill()


@TIMED
async def test_without_room_for_a_process_the_answer_is_503(monkeypatch, caplog, is_timed: bool):
    """Soon, and with the hint to try again; the service goes on trying."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = DecoderPool(limits=Limits(start_s=0.05))
    started = time.perf_counter()
    for error in await asyncio.gather(
        *(decode(pool, photo()) for _ in range(40)), return_exceptions=True
    ):
        assert isinstance(error, Unavailable)
        assert error.kind is Kind.WORKER_DOWN
    assert not is_timed or time.perf_counter() - started < 0.5  # not one after another
    assert "could not be started" in caplog.text

    monkeypatch.undo()
    await until(lambda: "2 idle" in repr(pool))
    assert (await decode(pool, photo())).size == (128, 128)
    pool.kill()


@TIMED
async def test_killed_it_ends_at_once_whoever_works(is_timed: bool):
    """A second SIGTERM waits for no picture, nor does who waits for a decoder."""
    pool = DecoderPool()
    working = [asyncio.create_task(decode(pool, *slow())) for _ in range(4)]
    await until(lambda: len(busy_pids(pool)) == 2)
    processes = [psutil.Process(server_pid(pool)), *children(pool)]

    pool.kill()

    await until(
        lambda: all(is_gone(process) for process in processes), limit_s=2 if is_timed else 30
    )
    async with asyncio.timeout(1 if is_timed else 30):
        for done in await asyncio.gather(*working, return_exceptions=True):
            assert isinstance(done, Unavailable)


@TIMED
async def test_killed_it_keeps_nobody_waiting_for_a_decoder(monkeypatch, is_timed: bool):
    """Of which none has come yet."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = DecoderPool()
    waiting = [asyncio.create_task(decode(pool, photo())) for _ in range(3)]
    await asyncio.sleep(0)
    pool.kill()

    async with asyncio.timeout(1 if is_timed else 30):
        for done in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(done, Unavailable)


PROGRAM = """
import asyncio
from app.images.pool import DecoderPool
from app.images.preparing import Upload

async def main():
    pool = DecoderPool()
    pool.start()
    await pool._take()
    print(pool._server.pid, *(decoder.pid for decoder in pool._busy), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_they_end_with_the_service():
    """Also when it is killed."""
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
    )
    processes = [psutil.Process(int(pid)) for pid in (await service.stdout.readline()).split()]
    service.kill()
    await service.wait()

    assert len(processes) == 2
    await until(lambda: all(is_gone(process) for process in processes))


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, be it that nobody has taken notice yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def outcome(pool: DecoderPool, *files: bytes, masked: bytes | None = None) -> str:
    """Decode; give the code of the refusal, or nothing where there is a picture to use."""
    try:
        edit = await decode(pool, *files, masked=masked)
    except InvalidRequest as error:
        return str(error.code)
    for image in edit.references:
        assert 3 * image.width * image.height == len(image.pixels)
    return ""


@pytest.mark.parametrize("name", PICTURES)
async def test_a_hostile_picture_is_used_or_refused(pool, name):
    """In words of our own, and the next honest one is served."""
    assert await outcome(pool, PICTURES[name]()) in {"", "invalid_image"}


@pytest.mark.parametrize("name", ["png, palette with transparency", "webp, lossless", "zeros"])
async def test_a_hostile_mask_is_used_or_refused(pool, name):
    """With the code of masks."""
    assert await outcome(pool, photo(64, 64), masked=PICTURES[name]()) in {"", "invalid_mask"}


@pytest.mark.full
async def test_damaged_files_are_used_or_refused(pool):
    """A thousand of them, masks too."""
    for seed in range(1000):
        data = mutated(seed)
        code = await outcome(pool, data, masked=data if seed % 3 == 0 else None)
        assert code in {"", "invalid_image", "invalid_mask"}


@pytest.mark.system
async def test_a_process_costs_a_large_picture_ten_milliseconds():
    """A PNG of 1024x1024 takes at most that much longer than in a thread of the service, in the
    best of three rounds; others may use the machine."""
    pool = DecoderPool()
    uploads = [Upload(saved(to_pillow(noise(1024, 1024)), "PNG"), "image")]
    more: list[float] = []
    try:
        while len(more) < 3 and min(more, default=1.0) >= 0.010:
            more.append(await median_of_more(pool, uploads))
    finally:
        pool.kill()

    assert min(more) < 0.010


async def median_of_more(pool: DecoderPool, uploads: list[Upload]) -> float:
    """Seconds that a decoder takes more than a thread, by the medians of twenty each."""
    in_thread: list[float] = []
    in_process: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        await asyncio.to_thread(prepare, uploads, None, None, nearest)
        between = time.perf_counter()
        await pool.prepare(uploads, None, None, nearest, client="a")
        in_thread.append(between - started)
        in_process.append(time.perf_counter() - between)
        await asyncio.sleep(0.05)  # a decoder is made anew meanwhile
    return sorted(in_process)[10] - sorted(in_thread)[10]
