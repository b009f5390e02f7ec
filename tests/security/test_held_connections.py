"""No client holds a connection, a place or memory that others need: by line ends, by answers that
it does not read, by requests that it sends ahead, or by their number."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import time

import pytest

from app.api.http_limits.connections import ConnectionTable, Phase, connection_limit
from app.api.http_limits.pacing import MeteredTransport
from app.api.http_limits.protocol import GuardedProtocol
from app.api.proxies import Proxies, client_of
from app.api.server import make_server
from tests.api.sockets import listening, until
from tests.security.conftest import guarded
from tests.support.timing import TIMED

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE_BYTES = 24_000_000


class Gated:
    """ASGI: answers with its path once it is let; notes who came and who left."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.asked = 0
        self.left = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("no lifespan")
        self.asked += 1
        waiting = asyncio.ensure_future(self.open.wait())
        leaving = asyncio.ensure_future(self._until_left(receive))
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        leaving.cancel()
        body = b"x" * LARGE_BYTES if scope["path"] == "/large" else scope["path"].encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _until_left(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left += not self.open.is_set()


class Watched(GuardedProtocol):
    """The same limits, but not worth a test's patience; notes the largest numbers."""

    head_limit_s = 0.3
    idle_limit_s = 0.2
    linger_s = 0.3
    min_bytes_per_s = 1_000_000
    pace_window_s = 0.25
    waiting = 0
    unparsed_bytes = 0
    lost = 0

    def connection_lost(self, exc: Exception | None) -> None:
        Watched.lost += 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        Watched.waiting = max(Watched.waiting, len(self.pipeline) + self.is_answering)
        Watched.unparsed_bytes = max(Watched.unparsed_bytes, len(self._intake))


def hasty_table(limit: int = 1024) -> ConnectionTable:
    return ConnectionTable(limit, look_every_s=0.05)


@pytest.fixture
async def gated():
    """The app and its port; it lets everyone through from the start."""
    app = Gated()
    app.open.set()
    Watched.waiting = Watched.unparsed_bytes = Watched.lost = 0
    async with listening(app, http=guarded(Watched, hasty_table())) as port:
        yield app, port
        app.open.set()


async def read_answers(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    """The bodies of *count* answers."""
    bodies = []
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        bodies.append(await reader.readexactly(length))
    return bodies


@TIMED
async def test_line_ends_between_messages_keep_no_connection_open(gated, is_timed: bool) -> None:
    """After one answered request, line ends without end: closed when the idle limit is over."""
    _, port = gated
    strays = (b"\r\n", b"\r", b"\n", b"\r\n" * 2000)
    took_s = await asyncio.gather(*(seconds_until_closed(port, stray) for stray in strays))

    assert not is_timed or min(took_s) >= 0.1


async def seconds_until_closed(port: int, stray: bytes) -> float:
    """How long a connection lives after its answer, with *stray* again and again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(GET)
        await read_answers(reader, 1)
        started = time.monotonic()
        async with asyncio.timeout(30):
            while not reader.at_eof():
                writer.write(stray)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(1), 0.05)
    return time.monotonic() - started


async def test_a_request_after_line_ends_is_answered(gated) -> None:
    """RFC 9112 2.2: a client may send one before its request."""
    _, port = gated
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\r\n" + GET + b"\r\n\r\n" + GET)

    assert await read_answers(reader, 2) == [b"/", b"/"]
    writer.close()


async def test_requests_sent_ahead_are_parsed_a_few_at_a_time(gated) -> None:
    """Of 1,500 requests in one go at most ten are parsed while the first one waits, the rest is
    left in the kernel; all of them are answered, in their order."""
    app, port = gated
    app.open.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.writelines(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % i for i in range(1_500))
    await until(lambda: Watched.unparsed_bytes)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.2)
    held = Watched.waiting, Watched.unparsed_bytes
    app.open.set()
    bodies = await read_answers(reader, 1_500)
    writer.close()

    assert held[0] <= 10
    assert held[1] <= 128 * 1024
    assert bodies == [b"/%d" % i for i in range(1_500)]


async def test_a_client_that_leaves_is_noticed_behind_what_it_sent_ahead(gated) -> None:
    """The running request is given up, though another one waits behind it."""
    app, port = gated
    app.open.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET * 3)
    await until(lambda: app.asked)
    writer.close()
    await until(lambda: app.left)

    assert app.asked == 1


async def test_what_came_before_a_broken_request_is_answered(gated) -> None:
    """Two good requests and a broken one: two answers, then the refusal, then the end."""
    _, port = gated
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET * 2 + b"GET / HTTP/9\r\n\r\n" + GET)
    *bodies, refusal = await read_answers(reader, 3)
    rest = await reader.read()
    writer.close()

    assert bodies == [b"/", b"/"]
    assert json.loads(refusal)["error"]["type"] == "invalid_request_error"
    assert rest == b""


def stingy_socket(port: int) -> socket.socket:
    """A connection whose kernel takes a few kilobytes and no more."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    client.connect(("127.0.0.1", port))
    return client


async def test_an_answer_that_is_not_read_is_cut(gated) -> None:
    """A client that takes nothing loses its connection when the window is over, and with it what
    was kept for it."""
    _, port = gated
    with stingy_socket(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        client.setblocking(False)
        got = 0
        await until(lambda: Watched.lost)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                while block := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                    got += len(block)

    assert got < LARGE_BYTES


@pytest.mark.full
async def test_an_answer_that_is_read_steadily_is_whole(gated) -> None:
    """More than two windows, a little above the least rate, and then the next request."""
    _, port = gated
    loop = asyncio.get_running_loop()
    with stingy_socket(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.setblocking(False)
        started, got = time.monotonic(), 0
        while (spent := time.monotonic() - started) < 0.6:
            if got < spent * 8_000_000:
                got += len(await loop.sock_recv(client, 65_536))
            else:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            while got < LARGE_BYTES:
                got += len(await loop.sock_recv(client, 1 << 20))

    assert got > LARGE_BYTES


async def test_a_stream_that_says_nothing_is_not_slow(gated) -> None:
    """Nothing waits to be sent, so no rate is asked for: its answer comes after the window."""
    app, port = gated
    app.open.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.35)
    app.open.set()

    assert await read_answers(reader, 1) == [b"/"]
    writer.close()


async def open_from(address: str, port: int, data: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    writer.write(data)
    return reader, writer


async def test_a_full_house_closes_whoever_does_nothing() -> None:
    """One client may have three of four places: its fourth connection takes the place of the one
    that has been idle longest, and every one of forty is served."""
    app = Gated()
    app.open.set()
    async with listening(app, http=guarded(table=ConnectionTable(4))) as port:
        writers = []
        for number in range(40):
            reader, writer = await open_from("127.0.0.1", port, GET if number % 2 else b"GET")
            writers.append(writer)
            if number % 2:
                assert await read_answers(reader, 1) == [b"/"]
        for writer in writers:
            writer.close()


async def test_where_nobody_can_go_a_new_connection_is_refused() -> None:
    """With a client's share full of requests that are being answered: 503 with Retry-After and an
    error object for it, a place for another client, and for itself once an answer is out."""
    app = Gated()
    async with listening(app, http=guarded(table=ConnectionTable(4))) as port:
        busy = [await open_from("127.0.0.1", port, GET) for _ in range(3)]
        await until(lambda: app.asked == 3)
        reader, refused = await open_from("127.0.0.1", port, b"")
        answer = await reader.read()
        _, other = await open_from("127.0.0.2", port, GET)
        await until(lambda: app.asked == 4)
        app.open.set()
        for reader, _ in busy:
            assert await read_answers(reader, 1) == [b"/"]
        reader, again = await open_from("127.0.0.1", port, GET)
        assert await read_answers(reader, 1) == [b"/"]
        for writer in (refused, other, again, *(writer for _, writer in busy)):
            writer.close()

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 5\r\n" in head
    assert json.loads(body)["error"]["code"] == "server_is_overloaded"


class Seat:
    """A connection as the table sees it."""

    is_answering = False
    unsent_bytes = taken_bytes = 0

    def __init__(self) -> None:
        self.is_open = True

    def abort(self) -> None:
        self.is_open = False

    def look(self, now: float) -> None:
        raise AssertionError("nobody waits that long")


async def test_the_idlest_goes_first() -> None:
    """First those between two messages, then those that have not finished asking, then those that
    take nothing of their answer; the longest first; and never one that is busy."""
    table = ConnectionTable(8)
    seats = [Seat() for _ in range(8)]
    for number, seat in enumerate(seats):
        assert table.admit(seat, f"10.0.0.{number}")
    table.move(seats[0], Phase.BUSY)
    table.move(seats[1], Phase.STALLED)
    for number in (5, 4):
        table.move(seats[number], Phase.IDLE)
    table.move(seats[3], Phase.BUSY)
    order = []
    for number in range(6):
        late = Seat()
        assert table.admit(late, f"10.0.1.{number}")
        table.move(late, Phase.BUSY)
        (gone,) = [i for i, seat in enumerate(seats) if not seat.is_open and i not in order]
        order.append(gone)

    assert order == [5, 4, 2, 6, 7, 1]
    assert not table.admit(Seat(), "10.0.2.1")
    assert repr(table) == "<ConnectionTable 8/8, 8 clients>"
    table.close()


async def test_one_client_has_three_quarters_at_most() -> None:
    """Addresses of one IPv6 network of /64 are one client, and so are an IPv4 address and the same
    one written as IPv6."""
    table = ConnectionTable(8)
    seats = [Seat() for _ in range(7)]
    admitted = [table.admit(seat, f"2001:db8::{i}") for i, seat in enumerate(seats)]
    assert admitted == [True] * 7
    assert [seat.is_open for seat in seats] == [False, *[True] * 6]
    assert table.admit(Seat(), "2001:db8:0:1::1")
    table.close()

    assert client_of("::ffff:10.0.0.1") == client_of("10.0.0.1")
    assert client_of("fe80::1%eth0") == client_of("fe80::2%eth0")
    assert client_of("10.0.0.1") != client_of("10.0.0.2")


async def test_a_declared_proxy_may_have_all_connections() -> None:
    """Behind it are many clients; behind an address that nobody declared is one."""
    table = ConnectionTable(8, Proxies(["10.0.0.0/24"]))
    behind = [Seat() for _ in range(8)]
    assert all(table.admit(seat, "10.0.0.7") for seat in behind)
    assert all(seat.is_open for seat in behind)
    table.close()


@pytest.mark.parametrize(
    ("descriptors", "limit"), [(1_500, 1024), (1152, 1024), (1024, 896), (256, 128), (64, 16)]
)
def test_descriptors_are_left_for_other_things(descriptors, limit) -> None:
    """128 of those that the process may have, or three quarters where there are very few."""
    assert connection_limit(descriptors) == limit


class Living(Gated):
    """The same, with a life of its own, as the server wants it."""

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            await super().__call__(scope, receive, send)
            return
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read"])
async def test_the_end_waits_for_answers_and_says_what_it_cut(is_read, caplog) -> None:
    """An answer that is taken within the time given is whole; of one that is not, the log says how
    many bytes were left."""
    app = Living()
    app.open.set()
    server = make_server(app)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    got, loop = 0, asyncio.get_running_loop()
    with stingy_socket(listener.getsockname()[1]) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.setblocking(False)
        got += len(await loop.sock_recv(client, 1))
        server.end(answers_s=1.0)
        if not is_read:
            await serving
        with contextlib.suppress(ConnectionError):
            while block := await loop.sock_recv(client, 1 << 20):
                got += len(block)
        await serving

    said = [line for line in caplog.messages if "were cut" in line]
    assert (got > LARGE_BYTES) is is_read
    assert len(said) == (not is_read)
    assert is_read or said[0].startswith("1 answers were cut, with ")


def test_a_connection_that_was_refused_may_leave() -> None:
    """Also one whose socket has no address, beside others without."""
    table = ConnectionTable(1, Proxies([]))
    first, refused = Seat(), Seat()
    asyncio.run(_admit_busy(table, first))
    assert not table.admit(refused, "")
    table.leave(refused)

    assert repr(table) == "<ConnectionTable 1/1, 1 clients>"


async def _admit_busy(table: ConnectionTable, seat: Seat) -> None:
    assert table.admit(seat, "")
    table.move(seat, Phase.BUSY)


async def test_an_answer_is_whole_though_its_upload_goes_on(gated) -> None:
    """The service has answered and hangs up, the body is still coming and the answer still going:
    all of it arrives, and then its end."""
    _, port = gated
    loop = asyncio.get_running_loop()
    head = b"POST /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    with stingy_socket(port) as client:
        client.sendall(head + b"Content-Length: 9999999\r\n\r\n" + b"x" * 50_000)
        client.setblocking(False)
        got = len(await loop.sock_recv(client, 1))
        await loop.sock_sendall(client, b"x" * 500_000)
        async with asyncio.timeout(5):
            while block := await loop.sock_recv(client, 1 << 20):
                got += len(block)

    assert got > LARGE_BYTES


class Reset(asyncio.Transport):
    """A transport whose client reset the connection a moment ago; nobody has noticed yet."""

    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_aborted

    def write_eof(self) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    def abort(self) -> None:
        self.is_aborted = True


def test_a_client_that_resets_while_it_is_refused_is_no_failure() -> None:
    """There is nobody left to tell that no more will come: the connection goes at once."""
    transport = Reset()
    MeteredTransport(transport, lambda: False).close()

    assert transport.is_aborted
