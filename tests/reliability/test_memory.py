"""What a request held is free when it is over, whichever way it ended: nothing waits for the
garbage collector, which may not look for hours, and the system gets its pages back."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
import itertools
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from app.api.app import create_app
from app.cli.system_limits import bound_heap
from app.domain import Generated, ImageSpec, RawImage
from app.errors import DeadlineExceeded, InvalidRequest, OutOfMemory
from app.images.preparing import Upload
from app.jobs.job import Job
from app.request_context import RequestContext
from app.service.results import Picture
from app.service.ticket import Ticket
from app.settings import Settings
from tests.api.pictures import photo
from tests.api.sockets import listening, until
from tests.e2e.test_service import wait_until
from tests.reliability.test_overload import picture_form
from tests.support.chaos import GONE, ask, port_of, request_bytes
from tests.support.in_process import InProcess

HEAVY = (Generated, ImageSpec, Job, Picture, RawImage, RequestContext, Ticket)
IMAGE = {"prompt": "x", "size": "1024x1024"}
INDEXED = {"stream": True, "indexed": True, "n": 3}


@pytest.fixture
def garbage() -> Iterator[None]:
    """Keep what only the collector could free, from here on."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


async def cycles(port: int, heavy: tuple[type, ...] = HEAVY) -> Counter[str]:
    """Count what has any weight in it, by name, once another request has been answered."""
    await ask(port, request_bytes("/health/live", b"", "GET"))
    gc.collect()
    found = Counter(type(one).__name__ for one in gc.garbage if isinstance(one, heavy))
    gc.garbage.clear()
    return found


ERRORS = (OutOfMemory, DeadlineExceeded, RuntimeError)


REQUESTS = {
    "a picture": request_bytes("/generate", {"prompt": "x"}),
    "ten pictures": request_bytes("/v1/images/generations", IMAGE | {"n": 10}),
    "a stream": request_bytes("/v1/images/generations", IMAGE | {"stream": True}),
    "a stream of three": request_bytes("/v1/images/generations", IMAGE | INDEXED),
    "an edit": picture_form().replace(b"\r\n", b"\r\nConnection: close\r\n", 1),
}


@pytest.mark.usefixtures("garbage")
async def test_a_caller_who_leaves_leaves_nothing_behind() -> None:
    """Before the first picture, or with one that is being encoded."""
    runtime, left = InProcess(capacity=16), {}
    async with listening(create_app(Settings.read({}), lambda _: runtime)) as port:
        for made, (name, data) in itertools.product((0, 1), REQUESTS.items()):
            runtime.worker.release.clear()
            before = runtime.worker.made
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            await until(lambda: runtime.queue.running)
            if made:
                runtime.worker.release.set()
                await until(lambda before=before: runtime.worker.made > before)
            writer.transport.abort()
            await until(lambda: runtime.queue.size + runtime.queue.running == 0)
            runtime.worker.release.set()
            del writer
            left[name, made] = await cycles(port)

    assert {name: found for name, found in left.items() if found} == {}


@pytest.mark.usefixtures("garbage")
async def test_an_error_leaves_nothing_behind() -> None:
    """Neither of the picture that failed nor of those that were made before it."""
    runtime, left = InProcess(capacity=16), {}
    async with listening(create_app(Settings.read({}), lambda _: runtime)) as port:
        for error, (name, data) in itertools.product(ERRORS, REQUESTS.items()):
            nth = 3 if name == "ten pictures" else 1
            runtime.worker.errors = {runtime.worker.made + nth: error("scripted")}
            answer = await ask(port, data)
            assert answer.status in ({200} if "stream" in name else {500, 504})
            left[name, error] = await cycles(port)

    assert {name: found for name, found in left.items() if found} == {}


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("is_late", [True, False], ids=["late", "taken back"])
async def test_several_pictures_that_end_at_once_leave_nothing_behind(is_late: bool) -> None:
    """All of a request's miss their deadline, or its client takes them back from elsewhere."""
    runtime, left = InProcess(capacity=16), {}
    async with listening(create_app(Settings.read({}), lambda _: runtime)) as port:
        for name in ("ten pictures", "a stream of three"):
            runtime.worker.release.clear()
            asking = asyncio.create_task(ask(port, REQUESTS[name]))
            await until(lambda: runtime.queue.running)
            (ticket,) = runtime.service.own_tickets("address:127.0.0.1")
            for job in ticket.jobs:
                (runtime.queue._expire if is_late else runtime.queue.cancel)(job)
            del ticket, job
            runtime.worker.release.set()
            await asking
            left[name] = await cycles(port)

    assert {name: found for name, found in left.items() if found} == {}


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("fault", ["a damaged picture", "a size that does not fit", "a mask"])
async def test_a_refused_edit_leaves_nothing_behind(fault: str) -> None:
    """What was uploaded goes with the refusal, by whomever it is refused."""
    runtime = InProcess(capacity=16)
    image = {"image_url": "data:image/png;base64," + base64.b64encode(photo(64, 64)).decode()}
    bad = {"image_url": "data:image/png;base64," + base64.b64encode(b"x" * 10_000).decode()}
    fields = {
        "a damaged picture": {"images": [bad]},
        "a size that does not fit": {"images": [image], "size": "2048x2032", "n": 2},
        "a mask": {"images": [image], "mask": {"image_url": image["image_url"]}},
    }[fault]
    runtime.service.limits = replace(runtime.service.limits, max_pixels=2_000_000)
    async with listening(create_app(Settings.read({}), lambda _: runtime)) as port:
        answer = await ask(port, request_bytes("/v1/images/edits", {"prompt": "x"} | fields))
        assert answer.status == 400
        left = await cycles(port, (*HEAVY, Upload, InvalidRequest))

    assert left == {}


@pytest.mark.usefixtures("garbage")
async def test_an_answer_leaves_nothing_behind() -> None:
    """Once it is sent."""
    runtime, left = InProcess(capacity=16), {}
    async with listening(create_app(Settings.read({}), lambda _: runtime)) as port:
        for name, data in REQUESTS.items():
            answer = await ask(port, data)
            assert answer.status == 200
            left[name] = await cycles(port)

    assert {name: found for name, found in left.items() if found} == {}


@pytest.mark.full
def test_forty_rounds_of_callers_who_leave_leave_no_memory_behind(scripted) -> None:
    """Each round three callers ask for ten pictures of four megapixels and hang up while some are
    made: after forty the service's process holds at no time
    between them 200 MB more than before."""
    server = scripted("slow=0.04", model="flux.2-klein-4b", queue_images=32)
    server.wait_until_ready()
    process = psutil.Process(server.process.pid)
    data = request_bytes("/v1/images/generations", {"prompt": "x", "n": 10, "size": "2048x2048"})

    async def leave(after_s: float) -> None:
        port = port_of(server)
        answers = await asyncio.gather(*(ask(port, data, leave_after_s=after_s) for _ in range(3)))
        assert {answer.status for answer in answers} == {GONE}

    before = process.memory_info().rss
    held = []
    for turn in range(40):
        asyncio.run(leave(0.15 + 0.1 * (turn % 3)))
        wait_until(lambda: server.metric("klein_requests_running") == 0)
        held.append(process.memory_info().rss)

    assert max(held) - before < 200e6, [round(size / 1e6) for size in held]


def test_the_heap_is_bounded_where_the_c_library_can_do_it() -> None:
    """With glibc; any other is left alone. In a process of its own, which it changes for good."""
    code = "from app.cli.system_limits import bound_heap; print(bound_heap())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


@pytest.mark.parametrize("missing", ["mallopt", "gnu_get_libc_version"])
def test_another_c_library_is_left_alone(monkeypatch, missing) -> None:
    """One without these functions, and one that cannot be opened."""
    known = {"mallopt": lambda *arguments: 1, "gnu_get_libc_version": lambda: b""}
    del known[missing]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**known))
    assert not bound_heap()


def test_a_c_library_that_cannot_be_opened_is_left_alone(monkeypatch) -> None:
    """As on systems where there is no handle for the process itself."""

    def refuse(name: object) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not bound_heap()
