"""A safetensors file may come from anyone: its head is judged before it becomes objects."""

from __future__ import annotations

import io
import json
import time
import tracemalloc

import pytest

from app.engine.checkpoint import safetensors_header
from app.engine.checkpoint.safetensors_header import HeaderError, read_header
from tests.support.timing import TIMED

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def read(head: bytes, *, data: int = 32, length: int | None = None):
    """Read a file with *head* and so many bytes of tensors; it need not be as long as it says."""
    begin = (len(head) if length is None else length).to_bytes(8, "little")
    return read_header(io.BytesIO(begin + head), 8 + len(head) + data)


def text(**changes: object) -> bytes:
    """A head with one tensor that differs from a good one."""
    return json.dumps({"a": GOOD | changes}).encode()


def test_a_good_head_is_read_as_it_is() -> None:
    """Names, ranges counted from the file's start, empty tensors, brackets and quotes in texts."""
    head = json.dumps(
        {
            "__metadata__": {"notes": '{"[[[[[[[[[[[[\\"": 1}'},
            'odd "name" [[[[[[[[[[[[': GOOD,
            "empty": {"dtype": "I8", "shape": [0, 4096], "data_offsets": [16, 16]},
            "scalar": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
        }
    ).encode()
    entries, notes = read(head + b"   ")

    assert notes == {"notes": '{"[[[[[[[[[[[[\\"": 1}'}
    assert {entry.shape for entry in entries.values()} == {(2, 2), (0, 4096), ()}
    assert entries["scalar"].start == 8 + len(head) + 3 + 16


@pytest.mark.parametrize(
    "head",
    [
        *(b"[" * n for n in (9, 1000, 200_000)),
        *(b'{"a":' * n for n in (9, 1000, 100_000)),
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"__metadata__":{"a":' + b'{"b":' * 5000 + b"1" + b"}" * 5002,
        b'{"a":[' + b"{}," * 4_000 + b"{}]}",
        b'"' + b'\\"' * 1_000_000,
        b'{"' + b"a" * 1_000_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"\xff\xfe",
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
        b'{"a":1,"a":2}',
        json.dumps({"a": GOOD}).encode()[:-1] + b',"a":' + json.dumps(GOOD).encode() + b"}",
        b'{"__metadata__":{"a":"1","a":"2"}}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":null}',
        *(text(dtype=each) for each in (None, 1, [], {}, ["F32"])),
        *(text(shape=each) for each in (None, 4, "4", {"0": 4}, [None], ["4"], [[4]])),
        *(text(shape=each) for each in ([-1, -4], [True, 4], [4.0], [2**64], [1e400])),
        *(text(shape=each) for each in ([2**40, 2**40, 0], [1] * 17, [10**400])),
        *(text(data_offsets=each) for each in (None, 0, [], [0], [0, 8, 16], "01", [[0], [16]])),
        *(text(data_offsets=each) for each in ([-16, 0], [16, 0], [0.0, 16.0], [False, 16])),
        *(text(data_offsets=each) for each in ([0, 2**64], [2**64, 2**64], [-(2**63), 16])),
        *(text(data_offsets=each) for each in ([0, 33], [33, 33], [32, 2**40])),
        json.dumps({"a": GOOD, "b": GOOD | {"data_offsets": [8, 24]}}).encode(),
        json.dumps({"a": GOOD, "b": GOOD}).encode(),
        json.dumps({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}).encode(),
    ],
    ids=lambda head: ascii(head[:40].decode("latin-1")),
)
@TIMED
def test_a_bad_head_is_refused_in_words_at_once(head, monkeypatch, is_timed: bool) -> None:
    """Nothing but the one error, whatever it holds."""
    monkeypatch.setattr(safetensors_header, "_MAX_TOKENS", 5_000)
    begun = time.process_time()
    with pytest.raises(HeaderError) as refused:
        read(head)

    assert str(refused.value).startswith(("its header", "it ends", "the notes", "two of"))
    assert not is_timed or time.process_time() - begun < 10


@pytest.mark.parametrize("length", [16_000_001, 90_000_000, 2**63, 2**64 - 1])
def test_a_head_that_is_too_long_is_not_read(monkeypatch, length) -> None:
    """Not one byte of it: its length alone is judged, against the file's and the limit."""

    class Large(io.BytesIO):
        def read(self, count: int = -1) -> bytes:
            assert count <= 8
            return super().read(count)

    begin = length.to_bytes(8, "little")
    with pytest.raises(HeaderError, match="its header"):
        read_header(Large(begin), 100_000_000)


@pytest.mark.full
def test_as_long_as_allowed_is_read() -> None:
    """A limit that is told is one that can be reached."""
    head = json.dumps({"a": GOOD}).encode().ljust(safetensors_header.MAX_BYTES)

    assert list(read(head)[0]) == ["a"]


@pytest.mark.full
@pytest.mark.parametrize("piece", [b"[],", b"1,"])
def test_no_head_takes_memory_by_the_hundredfold(piece) -> None:
    """What it may describe is counted before it is parsed."""
    head = b'{"a":[' + piece * (6_000_000 // len(piece))
    tracemalloc.start()
    with pytest.raises(HeaderError):
        read(head)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 10 * len(head)
