"""What a decoder that a picture has taken over may say, and what of it the service believes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from app.errors import InvalidRequest
from app.images.decoder import LENGTH_BYTES, pack
from app.images.preparing import Edit, Upload
from app.images.processes import ENDED_EARLY, Decoder

TAKEN = {"nearest": [64, 64]}
ONE = {"references": [[64, 64]], "mask": None, "is_black_and_white": False}
MASKED = {**ONE, "mask": [64, 64]}

Say = Callable[..., Decoder]


@pytest.fixture
def say() -> Iterator[Say]:
    """Makes a decoder that has said some messages already, and goes on living."""
    open_ends: list[socket.socket | io.FileIO] = []

    def make(*messages: object, raw: bytes = b"", shared_bytes: int = 2**16) -> Decoder:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        shared = io.FileIO(os.memfd_create("image"), "r+b")
        os.truncate(shared.fileno(), shared_bytes)
        theirs.sendall(b"".join(map(pack, messages)) + raw)
        open_ends.extend((ours, theirs, shared))
        return Decoder(1, ours, shared)

    yield make
    for end in open_ends:
        end.close()


async def prepare(decoder: Decoder, *params: str, mask: bool = False, result=(64, 64)) -> Edit:
    """Prepare one file for each of *params*, and a mask where there is one."""
    uploads = [Upload(b"x", param) for param in params or ("image",)]
    over = Upload(b"x", "mask") if mask else None
    try:
        async with asyncio.timeout(5):
            return await decoder.prepare(uploads, over, None, lambda width, height: result)
    except TimeoutError:
        pytest.fail("it would have waited for the time limit")


def framed(text: bytes) -> bytes:
    """A message of any text."""
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


class TestMessages:
    async def test_each_gives_the_event_loop_a_turn(self, say):
        """However many there are at once: others are answered, and the time limit can end it."""
        params = [f"images[{index}]" for index in range(8)]
        decoder = say(*({"begin": [param, "invalid_image"]} for param in params), TAKEN, {})
        seen = set()

        async def watch() -> None:
            while True:
                seen.add(decoder.began and decoder.began[0])
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        with pytest.raises(ENDED_EARLY):
            await prepare(decoder, *params)
        watching.cancel()

        assert seen - {None} == set(params)

    async def test_one_that_comes_in_drops_gives_a_turn_with_each(self, say):
        """A byte at a time there are 65,536 of them in one message."""

        class Dripping(socket.socket):
            turn = 0
            received: ClassVar[Counter[int]] = Counter()

            def recv_into(self, buffer, *_) -> int:
                """A byte."""
                self.received[Dripping.turn] += 1
                return super().recv_into(buffer, 1)

        decoder = say(TAKEN, {**ONE, "padding": "x" * 1000})
        decoder.connection = Dripping(fileno=decoder.connection.detach())
        decoder.connection.setblocking(False)

        async def count() -> None:
            while True:
                Dripping.turn += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        try:
            await prepare(decoder)
        finally:
            counting.cancel()
            decoder.connection.close()

        assert sum(Dripping.received.values()) > 1000
        assert max(Dripping.received.values()) <= 2

    @pytest.mark.parametrize(
        "message", [{"begin": ["image", "invalid_image"]}, TAKEN], ids=["begin", "nearest"]
    )
    async def test_there_is_an_end_to_them(self, say, message):
        """A file begins once and the size is asked for once: whoever goes on has ended early."""
        with pytest.raises(ENDED_EARLY):
            await prepare(say(*[message] * 100))

    @pytest.mark.parametrize(
        "raw",
        [
            framed(b"[" * 60_000),
            framed(b'{"nearest": ' + b"[" * 60_000),
            framed(b'{"nearest": [1e999, 1]}'),
            framed(b'{"nearest": [64.5, 64]}'),
            framed(b'{"nearest": [true, 64]}'),
            framed(b'{"nearest": ["64", "64"]}'),
            framed(b'{"nearest": [64, 64, 64]}'),
            framed(b'{"nearest": [NaN, 64]}'),
            framed(b'{"nearest": 64}'),
            framed(b'{"nearest": [64000000, 1]}'),
            framed(b'{"nearest": [' + b"9" * 5000 + b", 1]}"),
            framed(b'{"begin": ["image", ["a"]]}'),
            framed(b'{"begin": ["another", "invalid_image"]}'),
            framed(b'{"begin": {"image": 1, "invalid_image": 2}}'),
            framed(b'{"refused": [1, 2, 3]}'),
            framed(b'{"refused": ["text", ["a"], "code"]}'),
            framed(b'{"refused": ["text", {"a": 1}, "code"]}'),
            framed(b'{"refused": ["text", "image", null]}'),
            framed(b'{"refused": ["text", "image"]}'),
            framed(b'{"refused": ["half of a pair: \\ud800", "image", "code"]}'),
            framed(b'{"refused": 1}'),
            framed(b'{"references": [[64, 64]], "mask": null}'),
            framed(b"\xff\xfe{}"),
            framed(b"1"),
            framed(b""),
            b"\xff\xff\xff\xff",
        ],
        ids=lambda raw: raw[LENGTH_BYTES:50].decode(errors="replace"),
    )
    async def test_whatever_else_it_says_it_has_ended_early(self, say, raw):
        """No answer and no line of the log is made of it, and no error is unexpected."""
        with pytest.raises(ENDED_EARLY):
            await prepare(say(raw=raw))

    async def test_a_refusal_is_three_texts(self, say):
        """The error about it can be worded for each of the interfaces."""
        with pytest.raises(InvalidRequest) as caught:
            await prepare(say({"refused": ["image is no picture.", "image", "invalid_image"]}))
        caught.value.rename({"image": "images[0]"})

        assert caught.value.message == "images[0] is no picture."
        assert (caught.value.param, caught.value.code) == ("images[0]", "invalid_image")


class TestResult:
    @pytest.mark.parametrize(
        ("said", "is_masked"),
        [
            ({**ONE, "references": []}, False),
            ({**ONE, "references": [[64, 64]] * 2}, False),
            ({**ONE, "references": [[64, 64]] * 16}, False),
            ({**ONE, "references": {"ab": 1}}, False),
            ({**ONE, "references": None}, False),
            ({**ONE, "references": [[1040, 1024]]}, False),
            ({**ONE, "references": [[8000, 8000]]}, False),
            ({**ONE, "references": [[1e999, 1]]}, False),
            ({**ONE, "references": [[0, 64]]}, False),
            ({**ONE, "references": [[-64, -64]]}, False),
            ({**ONE, "references": [[16, 16]]}, False),
            ({**ONE, "references": [[65, 64]]}, False),
            (MASKED, False),
            (ONE, True),
            ({"references": [[64, 64]]}, True),
            ({**MASKED, "references": [[64, 80]]}, True),
            ({**MASKED, "mask": [5001, 5000]}, True),
            ({**MASKED, "mask": []}, True),
        ],
        ids=str,
    )
    async def test_what_was_not_sent_does_not_come_back(self, say, said, is_masked):
        """As many references as images, each as large as one can be, and a mask for a mask."""
        decoder = say(TAKEN, raw=framed(json.dumps(said).encode()), shared_bytes=2**28)

        with pytest.raises(ENDED_EARLY):
            await prepare(decoder, mask=is_masked)

    async def test_the_largest_that_can_be(self, say):
        """Under a mask the first has the result's size, which may be larger than a reference."""
        said = {**MASKED, "references": [[2048, 2048], [1024, 1024]]}
        decoder = say(TAKEN, said, shared_bytes=2**24)

        edit = await prepare(decoder, "a", "b", mask=True, result=(2048, 2048))

        assert [len(each.pixels) for each in edit.references] == [3 * 2**22, 3 * 2**20]
        assert len(edit.mask.weights) == 4096

    async def test_its_size_is_the_services(self, say):
        """That of the request where it has one, whatever the decoder says of either."""
        decoder = say({"nearest": [96, 96]}, {**ONE, "size": [4096, 4096]})
        uploads = [Upload(b"x", "image")]

        edit = await decoder.prepare(uploads, None, (128, 64), lambda *size: size)

        assert edit.size == (128, 64)

    async def test_its_pixels_are_there_once(self, say):
        """Both sides share one file offset: whoever turns it back gives no pixel twice."""
        decoder = say(TAKEN, {**ONE, "references": [[256, 256], [64, 64]]}, shared_bytes=209_000)
        os.pwrite(decoder.shared.fileno(), b"\7" * 12_288, 196_608)

        async def turn_back() -> None:
            while True:
                os.lseek(decoder.shared.fileno(), 0, os.SEEK_SET)
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn_back())
        edit = await prepare(decoder, "a", "b")
        turning.cancel()

        assert set(edit.references[1].pixels) == {7}

    async def test_memory_is_taken_as_pixels_are_read(self, say):
        """None of it is there to be zeroed at once, and none for pixels that never come."""
        decoder = say(TAKEN, {**MASKED, "mask": [5000, 5000]}, shared_bytes=12_288 + 10)
        tracemalloc.start()
        try:
            with pytest.raises(EOFError):
                await prepare(decoder, mask=True)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
