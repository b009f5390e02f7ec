"""`Idempotency-Key`: a stream that outlives its socket, for a while and within limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import httpx
import pytest
from starlette.requests import Request

from app.api.app import create_app
from app.api.openai.kept_streams import MAX_BYTES, MAX_READERS, MAX_STREAMS, KeptStreams
from app.api.openai.stream_key import StreamKey
from app.domain import ImageSpec, Progress, Stage
from app.errors import InvalidRequest, Unavailable
from app.request_context import RequestContext, current_request
from app.settings import Settings
from tests.api.conftest import client_of, error_of
from tests.api.pictures import photo
from tests.api.sockets import until
from tests.support.in_process import InProcess

ROUTE = "/v1/images/generations"
EDITS = "/v1/images/edits"
KEYS = ("first-key-1234", "second-key-5678")
BODY = {"prompt": "a", "stream": True, "size": "64x64", "seed": 7}
SPEC = ImageSpec("a", 64, 64, 4, 1.0, 7)


class Reader:
    """A request whose answer is read as it comes, and whose client may go at any time."""

    def __init__(self, app, headers, path, **body) -> None:
        self.status, self.text = 0, ""
        self._is_gone = asyncio.Event()
        self._sent = [{"type": "http.request", "body": json.dumps(BODY | body).encode()}]
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000),
            "headers": [
                (b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json"),
                *((name.encode(), value.encode()) for name, value in headers),
            ],
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._sent:
            return self._sent.pop()
        await self._is_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"").decode()

    async def leave(self) -> None:
        """Close the connection."""
        self._is_gone.set()
        await self.task

    async def end(self) -> str:
        """Read to the end."""
        async with asyncio.timeout(5):
            await self.task
        return self.text


class Service:
    """The real service on a worker that waits, and what asks it."""

    def __init__(self, stack: AsyncExitStack, runtime: InProcess) -> None:
        self.runtime = runtime
        self.worker = runtime.worker
        self.worker.release.clear()
        self._stack = stack

    async def start(self, *, kept_s: float = 60.0, keys: tuple[str, ...] = ()) -> Service:
        """Start the app."""
        settings = Settings.read({}, api_keys=keys)
        self.app = create_app(settings, lambda _: self.runtime, kept_s=kept_s)
        self.client = await self._stack.enter_async_context(client_of(self.app))
        return self

    def read(
        self, key: str | None = "k", *, owner: str | None = None, path: str = ROUTE, **body
    ) -> Reader:
        """Ask for a stream."""
        headers = [] if key is None else [("idempotency-key", key)]
        headers += [] if owner is None else [("api-key", owner)]
        return Reader(self.app, headers, path, **body)

    async def ask(self, key: str = "k", **body) -> httpx.Response:
        """Ask, and wait for all of the answer."""
        headers = {"idempotency-key": key, "content-type": "application/json"}
        return await self.client.post(ROUTE, content=json.dumps(BODY | body), headers=headers)


@pytest.fixture
async def at() -> AsyncIterator[Service]:
    """A service that is not started yet."""
    async with AsyncExitStack() as stack:
        yield Service(stack, InProcess())


async def test_a_reader_that_comes_back_reads_all_of_it(at):
    """The job goes on meanwhile; events begin at the first, go on live, and have no ids."""
    await at.start()

    async def run(job_id, spec, on_progress):
        on_progress(Progress(Stage.DENOISE, 1, 4))
        return await type(at.worker).run(at.worker, job_id, spec, on_progress)

    at.worker.run = run
    first = at.read()
    await until(lambda: "denoise 1/4" in first.text)
    await first.leave()
    again = at.read()
    await until(lambda: "denoise 1/4" in again.text)
    assert "completed" not in again.text
    at.worker.release.set()
    text = await again.end()

    assert (again.status, at.worker.made) == (200, 1)
    assert text.startswith(first.text)
    assert text.startswith(": queued 0\n\n: denoise 1/4\n\n")
    assert text.count("event: image_generation.completed\n") == 1
    assert "id:" not in text
    assert (await at.ask()).text == text


async def test_all_images_of_a_stream_are_kept(at):
    """One key, one job: who comes back in the middle reads all from the start, and none is made
    again.
    """
    await at.start()
    at.worker.release.set()
    run, gate = at.worker.run, asyncio.Event()

    async def wait_for_the_second(job_id, spec, on_progress):
        if spec.seed == 8:
            await gate.wait()
        return await run(job_id, spec, on_progress)

    at.worker.run = wait_for_the_second
    several = {"n": 3, "indexed": True}
    first = at.read(**several)
    await until(lambda: first.text.count("event: image_generation.completed") == 1)
    await first.leave()
    again = at.read(**several)
    await until(lambda: "completed" in again.text)
    (job,) = (await at.client.get("/v1/jobs")).json()["data"]
    gate.set()
    text = await again.end()

    assert (job["images"], job["images_done"]) == (3, 1)
    assert text.startswith(first.text)
    assert [f'"image_index": {index},' in text for index in range(4)] == [True, True, True, False]
    assert text.count("event: image_generation.completed\n") == 3
    assert (await at.ask(**several)).text == text
    assert at.worker.made == 3


async def test_one_cancellation_takes_back_all_images_of_a_stream(at):
    """Those that wait too; the stream ends with one error."""
    await at.start()
    reader = at.read(n=3, indexed=True)
    await at.worker.started.wait()
    (job,) = (await at.client.get("/v1/jobs")).json()["data"]
    await at.client.delete(f"/v1/jobs/{job['id']}")
    text = await reader.end()

    assert text.count("client_closed_request") == 1
    assert (at.runtime.queue.running, at.runtime.queue.size, at.worker.made) == (0, 0, 0)


async def test_more_images_than_can_ever_be_kept_are_the_callers_mistake(at):
    """Who asks for fewer, or without the key, gets them."""
    await at.start()
    at.worker.release.set()
    large = {"n": 8, "indexed": True, "size": "2048x2048"}
    error = error_of(await at.ask(**large))

    assert (error["type"], error["param"]) == ("invalid_request_error", "n")
    assert "at most 3 at a time" in str(error["message"])
    assert at.runtime.queue.size == 0


async def test_without_the_header_a_reader_takes_its_job_along(at):
    """As ever."""
    await at.start()
    reader = at.read(None)
    await at.worker.started.wait()
    await reader.leave()
    await until(lambda: not at.runtime.queue.running)

    assert at.worker.made == 0


async def test_a_job_that_nobody_comes_back_for_is_cancelled(at):
    """After its time; then the key is free."""
    await at.start(kept_s=0.05)
    reader = at.read()
    await at.worker.started.wait()
    await reader.leave()
    assert at.runtime.queue.running == 1
    await until(lambda: not at.runtime.queue.running)
    at.worker.release.set()

    assert "completed" in (await at.ask(prompt="another")).text
    assert at.worker.made == 1


async def test_while_it_is_read_its_time_does_not_run(at):
    """Only without a reader does it."""
    await at.start(kept_s=0.05)
    first, second = at.read(), at.read()
    await until(lambda: first.text and second.text)
    await first.leave()
    await asyncio.sleep(0.08)
    at.worker.release.set()

    assert "completed" in await second.end()


async def test_what_has_ended_can_be_read_for_a_while(at):
    """Then it is forgotten, and the same key makes a picture anew."""
    await at.start(kept_s=0.1)
    at.worker.release.set()
    text = (await at.ask()).text

    assert (await at.ask()).text == text
    assert at.worker.made == 1
    await asyncio.sleep(0.15)
    assert "completed" in (await at.ask()).text
    assert at.worker.made == 2


async def test_a_job_without_a_socket_counts_as_its_clients(at):
    """In the queue, and among its jobs."""
    await at.start()
    readers = [at.read(f"k{index}") for index in range(3)]
    await until(lambda: at.runtime.queue.size == 2)
    for reader in readers:
        await reader.leave()

    assert (at.runtime.queue.running, at.runtime.queue.size) == (1, 2)
    assert len((await at.client.get("/v1/jobs")).json()["data"]) == 3


async def test_a_cancelled_job_ends_its_stream(at):
    """With the error that says so, for whoever reads it; it counts no more."""
    await at.start()
    first = at.read()
    await at.worker.started.wait()
    (job,) = (await at.client.get("/v1/jobs")).json()["data"]
    await at.client.delete(f"/v1/jobs/{job['id']}")

    assert "client_closed_request" in await first.end()
    assert "client_closed_request" in (await at.ask()).text
    assert not at.runtime.queue.running


async def test_the_same_key_with_another_body_is_refused(at):
    """While it runs and afterwards; also without `stream`."""
    await at.start()
    reader = at.read()
    await at.worker.started.wait()
    for body in ({"seed": 8}, {"stream": False}):
        response = await at.ask(**body)
        error = error_of(response)

        assert response.status_code == 400
        assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    at.worker.release.set()
    await reader.end()

    assert (await at.ask(seed=8)).status_code == 400
    assert at.worker.made == 1


async def test_each_client_has_keys_of_its_own(at):
    """What another one keeps under the same key is neither read nor told of."""
    await at.start(keys=KEYS)
    at.worker.release.set()
    texts = [await at.read(owner=key, prompt=key).end() for key in KEYS]

    assert at.worker.made == 2
    assert all("completed" in text for text in texts)


@pytest.mark.parametrize("key", ["", "a b", "ä", "a,b", "k" * 129, 'k"'])
async def test_a_malformed_key_is_refused(at, key):
    """With what is allowed."""
    await at.start()
    response = await at.client.post(
        ROUTE, json=BODY, headers=[(b"idempotency-key", key.encode("latin-1"))]
    )
    error = error_of(response)

    assert response.status_code == 400
    assert error["param"] == "Idempotency-Key"
    assert "1 to 128" in str(error["message"])
    assert not at.runtime.queue.running


async def test_two_keys_are_none(at):
    """One of them would be ignored."""
    await at.start()
    headers = [(b"idempotency-key", b"a"), (b"idempotency-key", b"b")]

    assert (await at.client.post(ROUTE, json=BODY, headers=headers)).status_code == 400


async def test_a_plain_answer_is_no_stream(at):
    """The header changes nothing there."""
    await at.start()
    at.worker.release.set()
    responses = [await at.ask("a b", stream=False) for _ in range(2)]

    assert [each.status_code for each in responses] == [200, 200]
    assert at.worker.made == 2


async def test_both_spellings_of_the_route_are_one(at):
    """And an edit with the same body would be another request."""
    await at.start()
    at.worker.release.set()
    await at.ask()
    short = await at.read(path="/v1/images").end()
    edit = await at.read(path=EDITS).end()

    assert "completed" in short
    assert "idempotency_key_reused" in edit
    assert at.worker.made == 1


async def test_a_form_is_the_same_whatever_its_boundary(at):
    """Browsers draw one for each request; pictures are compared too."""
    await at.start()
    at.worker.release.set()

    async def edit(picture: bytes):
        files = [("image", picture), *((name, (None, str(v).lower())) for name, v in BODY.items())]
        return await at.client.post(EDITS, files=files, headers={"idempotency-key": "k"})

    first, again = await edit(photo(128, 64)), await edit(photo(128, 64))
    other = await edit(photo(64, 128))

    assert first.request.headers["content-type"] != again.request.headers["content-type"]
    assert "image_edit.completed" in first.text
    assert first.text == again.text
    assert error_of(other)["code"] == "idempotency_key_reused"


async def test_a_second_request_at_the_same_time_joins_the_first(at):
    """Though neither was there when the other came."""
    await at.start()
    first, second = at.read(), at.read()
    await until(lambda: first.text and second.text)
    at.worker.release.set()

    assert await first.end() == await second.end()
    assert at.worker.made == 1


async def test_a_full_queue_keeps_nobody_from_what_is_his(at):
    """Nor does the end of the service."""
    await at.start()
    first = at.read()
    await at.worker.started.wait()
    await first.leave()
    waiting = [at.read(None) for _ in range(8)]
    await until(lambda: at.runtime.queue.size == 8)
    full, again = await at.ask("another"), at.read()
    at.runtime.service.drain()
    leaving, last = await at.ask("another"), at.read()
    await until(lambda: again.text and last.text)
    for reader in waiting:
        await reader.leave()
    at.worker.release.set()

    assert (full.status_code, leaving.status_code) == (503, 503)
    assert "completed" in await again.end()
    assert "completed" in await last.end()


async def test_kept_jobs_are_finished_before_the_service_ends(at):
    """As all that was accepted; nobody has to listen."""
    await at.start()
    reader = at.read()
    await at.worker.started.wait()
    await reader.leave()
    at.runtime.service.drain()
    empty = asyncio.create_task(at.runtime.queue.wait_until_empty())
    await asyncio.sleep(0)
    assert not empty.done()
    at.worker.release.set()
    async with asyncio.timeout(5):
        await empty

    assert at.worker.made == 1


async def test_a_kept_job_does_not_outlive_the_service(caplog):
    """One that still runs is cancelled, and its recording awaited; nothing is logged."""
    runtime = InProcess()
    async with AsyncExitStack() as stack:
        at = await Service(stack, runtime).start()
        reader = at.read()
        await at.worker.started.wait()
        await reader.leave()

    assert not runtime.queue.running
    assert not [each for each in asyncio.all_tasks() if each.get_name().startswith("stream ")]
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


async def test_a_client_keeps_four(at):
    """The fifth is refused until one of them has been read to its end."""
    await at.start()
    readers = [at.read(f"k{index}") for index in range(MAX_STREAMS)]
    await until(lambda: all(each.text for each in readers))
    await readers[0].leave()
    response = await at.ask("k4")

    assert response.status_code == 503
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert "Idempotency-Key" in str(error_of(response)["message"])
    assert at.runtime.queue.size == MAX_STREAMS - 1
    at.worker.release.set()
    for reader in readers[1:]:
        await reader.end()
    assert "completed" in (await at.ask("k4")).text
    assert "completed" in (await at.ask("k0")).text
    assert at.worker.made == MAX_STREAMS + 1


async def test_one_stream_has_a_few_readers(at):
    """One more is refused, until one has left."""
    await at.start()
    readers = [at.read() for _ in range(MAX_READERS)]
    await until(lambda: all(each.text for each in readers))
    response = await at.ask()
    await readers[0].leave()
    last = at.read()
    at.worker.release.set()

    assert response.status_code == 503
    assert "completed" in await last.end()


async def test_the_log_line_is_that_of_who_has_read_it(at, caplog):
    """With its times, once, and with its error; who has left was cancelled."""
    caplog.set_level("INFO", logger="app.api.access")
    await at.start()
    first = at.read()
    await at.worker.started.wait()
    await first.leave()
    at.worker.release.set()
    await at.ask()
    await at.ask()
    lines = [each for each in caplog.records if hasattr(each, "outcome")]

    assert [each.outcome for each in lines] == ["cancelled", "ok", "ok"]
    assert [getattr(each, "images", 0) for each in lines] == [0, 1, 0]


@pytest.mark.parametrize("size", [1, 7, 50, 100_000])
async def test_the_digest_knows_no_pieces(size):
    """However the body is cut; a text like a boundary in it counts."""
    digests = set()
    for boundary in (b"--aXb", b"--cYd", b"x"):
        body = (b"1--2--a--b" + boundary) * 30 + b"--"
        digests.add(await _digest(body, boundary, size))
    other = await _digest(b"1--2--a--c" + body[10:], b"x", size)

    assert digests == {await _digest(body, b"x", 13)}
    assert other not in digests


async def test_a_body_of_boundaries_is_refused():
    """Each would cost a call."""
    with pytest.raises(InvalidRequest):
        await _digest(b"x" * 2000, b"x", 2000)


async def _digest(body: bytes, boundary: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]

    async def receive():
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    kind = b"multipart/form-data; boundary=" + boundary
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}
    request = Request(scope, receive)
    key = StreamKey(request, about="x")
    return await key.digest(key.watch(request))


@dataclass
class Job:
    """A ticket whose stream has these events; without any, it lasts until it is cancelled."""

    events: tuple[bytes, ...] = ()
    id: str = "job"
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        """End it."""
        self.over.set()

    async def stream(self):
        """Yield the events."""
        for event in self.events:
            yield event
        if not self.events:
            await self.over.wait()


class TestRoom:
    """The bytes of all events together, without a service."""

    async def test_it_is_taken_for_the_largest_files(self):
        """Three bytes for each pixel; previews are small, unless they are scaled."""
        kept = KeptStreams()
        texts = kept.make_room("a", SPEC) - 3 * 64 * 64
        large = replace(SPEC, width=2048, height=1024, previews=3)
        scaled = replace(SPEC, previews=2, scaled_to=(1024, 1024))

        assert kept.make_room("a", large) == texts + 3 * (2048 * 1024 + 3 * 256 * 256)
        assert kept.make_room("a", scaled) == texts + 3 * 3 * 1024 * 1024
        assert kept.make_room("a", replace(SPEC, width=4096, height=4096)) < MAX_BYTES
        assert kept.make_room("a", SPEC, SPEC) == 2 * kept.make_room("a", SPEC)

    async def test_there_is_an_end_of_it(self):
        """Of all clients; what has ended takes what it has, and makes way once it was read."""
        kept = KeptStreams(max_bytes=4 * ROOM)
        streams = [keep(kept, f"client {index}") for index in range(4)]
        with pytest.raises(Unavailable, match="no room"):
            kept.make_room("e", SPEC)
        kept.leave(streams[0])
        with pytest.raises(Unavailable):
            kept.make_room("e", SPEC)
        await kept.close()

        unread, read = (keep(kept, "a", key, b"x" * 2 * ROOM) for key in "bc")
        await until(lambda: unread.has_ended and read.has_ended)
        for stream in (unread, read):
            kept.leave(stream)
        with pytest.raises(Unavailable):
            kept.make_room("a", SPEC)
        assert [event async for event in read.read()] == [b"x" * 2 * ROOM]
        kept.make_room("a", SPEC)
        assert kept.join("a", "c") is None
        assert kept.join("a", "b") is unread
        kept.leave(unread)
        await kept.close()

    async def test_one_client_leaves_a_quarter_to_another(self):
        """While that has a stream; alone it may have all."""
        kept = KeptStreams(max_bytes=4 * ROOM)
        for key in "abc":
            keep(kept, "a", key)
        kept.make_room("a", SPEC)
        keep(kept, "b")
        with pytest.raises(Unavailable):
            kept.make_room("a", SPEC)
        await kept.close()
        keep(kept, "a")
        keep(kept, "b")
        keep(kept, "b", "2")
        kept.make_room("a", SPEC)
        await kept.close()

    async def test_what_a_slow_reader_holds_is_counted(self):
        """Until it leaves, though nobody else may come any more."""
        kept = KeptStreams(lifetime_s=0.02, max_bytes=2 * ROOM)
        slow = keep(kept, "a", "k", b"x" * 2 * ROOM)
        reading = slow.read()
        await anext(reading)
        await asyncio.sleep(0.05)
        assert kept.join("a", "k") is None
        with pytest.raises(Unavailable):
            kept.make_room("a", SPEC)
        assert [event async for event in reading] == []
        kept.leave(slow)

        assert kept.make_room("a", SPEC) == ROOM
        assert repr(kept) == "<KeptStreams: 0, 0 bytes>"

    async def test_what_has_ended_holds_no_job(self):
        """Its pixels would take more than its events."""
        kept = KeptStreams()
        stream = keep(kept, "a", "k", b"x")
        await until(lambda: stream.has_ended)

        assert stream.ticket is None
        await kept.close()


ROOM = KeptStreams().make_room("a", SPEC)


def keep(kept: KeptStreams, client: str, key: str = "k", *events: bytes):
    """Keep the stream of a job with these events."""
    current_request.set(RequestContext("r", client))
    room_bytes = kept.make_room(client, SPEC) if not events else ROOM
    job = Job(events)
    return kept.keep(key, b"", job, job.stream(), headers={}, room_bytes=room_bytes)
