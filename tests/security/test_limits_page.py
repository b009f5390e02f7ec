"""docs/security.md lists every limit with the test that holds it and the code's own value."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from python_multipart import multipart as parser

from app import limits, log_writer, logs
from app.api import pieces
from app.api.http_limits import connections, held, protocol, refusals
from app.api.http_limits.protocol import GuardedProtocol
from app.api.middleware import body_limit, cors
from app.api.openai import fields as openai_fields
from app.api.openai import image_store, kept_streams
from app.api.schema import json_scanner, multipart, table
from app.api.system import jobs
from app.cli import serve
from app.engine.adapters import directory, layout
from app.engine.checkpoint import safetensors_header
from app.images import decoder, pool, processes, uploads
from app.images.pool import DecoderPool
from app.jobs import shares
from app.service import previews, prompt_tokens
from app.settings import Settings
from app.telemetry import tracing
from app.worker import restarts
from app.worker.supervisor import TimeLimits
from tests.support.sources import tree_of

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
_ID = re.compile(r"`((?:\w+/)+\w+\.py)::(\w+)`")
PAGES = ("docs/security.md", "SECURITY.md")
_NUMBER = re.compile(r"(?<![\w./-])(\d[\d,]*\d|\d)( [KMG]iB| million)?(?![\w.])")
_UNITS = {"": 1, " KiB": 2**10, " MiB": 2**20, " GiB": 2**30, " million": 10**6}
DECODER, WORKER = decoder.Limits(), TimeLimits()

VALUES: dict[str, tuple[float, ...]] = {
    "connections": (connections.MAX_CONNECTIONS, connections.OTHER_DESCRIPTORS),
    "between two requests": (GuardedProtocol.idle_limit_s,),
    "time for a request's head": (GuardedProtocol.head_limit_s,),
    "head, trailers, a chunk's extension": (refusals.MAX_HEAD_BYTES, refusals.MAX_HEADER_LINES),
    "requests sent ahead of their answers": (
        GuardedProtocol.max_pipelined,
        protocol._MAX_UNPARSED_BYTES + protocol._MAX_AHEAD_BYTES,
    ),
    "rate at which an answer is read": (
        GuardedProtocol.min_bytes_per_s,
        GuardedProtocol.pace_window_s,
        GuardedProtocol.max_taking_s,
    ),
    "an answer's bytes written and not taken": (pieces.PIECE_BYTES,),
    "pictures kept for answers that are being taken": (held.MAX_BYTES,),
    "upload after its answer": (GuardedProtocol.linger_s,),
    "one body": (Settings().max_body_bytes,),
    "its time": (Settings().body_limit_s,),
    "all bodies that are being read": (body_limit.BODIES_AT_ONCE, body_limit.SMALL_BYTES),
    "JSON where no pictures belong": (json_scanner.MAX_PLAIN,),
    "JSON beside its pictures": (json_scanner.MAX_PLAIN,),
    "strings, brackets and commas in JSON": (json_scanner.MAX_VALUES,),
    "a text": (limits.MAX_PROMPT, table.MAX_TEXT),
    "a picture in JSON": (openai_fields.MAX_URL,),
    "a number in a form": (table._MAX_DIGITS,),
    "parts of a form": (
        multipart.MAX_FILES,
        multipart.MAX_FIELDS,
        multipart.MAX_TEXT_BYTES,
        multipart.MAX_TEXTS_BYTES,
        multipart.MAX_NAME_BYTES,
        parser.DEFAULT_MAX_HEADER_COUNT,
    ),
    "a name that an error repeats": (table._MAX_NAME,),
    "requests decoded at a time": (DecoderPool()._size, 1),
    "silence of the process that decoders are forked from": (
        DECODER.start_s,
        pool._SERVER_START_S,
    ),
    "processor time of a request's pictures": (DECODER.cpu_s,),
    "time by the clock": (DECODER.wall_s,),
    "address space": (DECODER.memory_bytes,),
    "memory shared with the service, which holds files and pixels": (DECODER.memory_bytes,),
    "scans of a JPEG": (uploads.MAX_SCANS,),
    "pixels": (uploads.MAX_PIXELS, uploads.MAX_JPEG_PIXELS),
    "what a decoder says that a picture has taken over": (processes.MAX_MESSAGE_BYTES,),
    "what it returns": (uploads.REFERENCE_PIXELS, uploads.MAX_PIXELS),
    "no room for a process": (DECODER.start_s,),
    "places while a body of more than 64 KiB, or of unknown length, is read": (1,),
    "prompts that are counted (`/v1/tokens`)": (prompt_tokens.MOST_WAITING,),
    "images that wait": (Settings().queue_images,),
    "places kept for who was turned away": (shares.PRESENT_S,),
    "those turned away that are remembered": (shares.CLAIMS_MOST,),
    "jobs that `/v1/jobs` lists and cancels": (jobs.MAX_LISTED,),
    "streams with an `Idempotency-Key`": (kept_streams.MAX_BYTES, kept_streams.MAX_STREAMS),
    "pictures of one such stream": (limits.three_quarters(kept_streams.MAX_BYTES),),
    "a kept stream without a reader": (kept_streams.LIFETIME_S,),
    "readers of a kept stream": (kept_streams.MAX_READERS,),
    "links to pictures": (image_store.MAX_BYTES, image_store.MAX_COUNT),
    "header names that a preflight's answer repeats": (cors._MAX_NAMES,),
    "a caller's word in a line": (logs._MAX_WORD,),
    "lines of requests that made no picture": (log_writer.MOST_ACCESS, log_writer.WINDOW_S),
    "equal lines": (log_writer.MOST_OWN, log_writer.WINDOW_S, log_writer.MOST_FOREIGN),
    "lines that nobody reads": (log_writer.MAX_WAITING_BYTES,),
    "waiting for a reader at the end": (log_writer.FLUSH_S,),
    "waiting for the traces' collector at the end": (tracing.FLUSH_S,),
    "starts and deaths without a picture": (
        restarts.MAX_DEATHS,
        restarts.WINDOW_S,
        restarts.MAX_DEATHS,
    ),
    "silence of an idle worker": (WORKER.beat_s, WORKER.silence_idle_s),
    "time to leave": (WORKER.close_s,),
    "end of a service that has given up": (serve.END_S,),
    "silence of a download": (Settings().download_silence_s,),
    "end after SIGTERM": (serve._LAST_ANSWERS_S,),
    "header of a safetensors file": (
        safetensors_header.MAX_BYTES,
        safetensors_header.MAX_DEPTH,
        safetensors_header._MAX_TOKENS,
    ),
    "adapters in a folder": (directory.MAX_FILES, directory.MAX_ENTRIES, directory.MAX_DEPTH),
    "header of an adapter": (directory.MAX_HEADER_BYTES,),
    "previews of adapters": (previews.MAX_BYTES, previews._KEPT),
    "an adapter of the hub": (layout.MAX_BYTES,),
}
"""The numbers of a row in its order, in bytes, seconds or pieces."""
BOUNDS = {"hold of the event loop", "memory after callers who left", "end after a second SIGTERM"}
"""Rows whose number stands in a test alone, which measures."""


def rows() -> list[list[str]]:
    """The cells of each limit: its name, value, consequence and tests."""
    lines = [line for line in (ROOT / PAGES[0]).read_text().splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| limit |")]


def numbers(cell: str) -> tuple[float, ...]:
    """What a cell says in digits; statuses and versions are no limits."""
    return tuple(int(n.replace(",", "")) * _UNITS[unit] for n, unit in _NUMBER.findall(cell))


@cache
def defined(path: Path) -> set[str]:
    """The names of the functions in a file, methods too."""
    nodes = ast.walk(tree_of(path))
    return {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    """A limit whose test was renamed or dropped would else be promised by nothing."""
    named = _ID.findall((ROOT / page).read_text())

    assert named
    assert [each for each in named if not (TESTS / each[0]).is_file()] == []
    assert [each for each in named if each[1] not in defined(TESTS / each[0])] == []


def test_every_limit_has_a_test() -> None:
    """Each row of each table names at least one."""
    assert len(rows()) > 60
    assert [row for row in rows() if not _ID.search(row[-1])] == []


def test_every_number_is_the_codes_own() -> None:
    """A value that is changed in the code is changed on the page, and a new row is compared too."""
    said = {name: found for name, value, *_ in rows() if (found := numbers(value))}

    assert {name: found for name, found in said.items() if name not in BOUNDS} == VALUES


def test_three_quarters_are_the_codes_own() -> None:
    """Of connections, links and places in the queue alike."""
    assert (limits.three_quarters(100), shares.Shares(100).most) == (75, 75)


def test_every_promise_has_a_test() -> None:
    """Each promise of SECURITY.md names the tests that hold it, by what the service does."""
    section = (ROOT / PAGES[1]).read_text().partition("## What is promised")[2]
    promises = re.split(r"^- ", section.partition("\n## ")[0], flags=re.MULTILINE)[1:]

    assert len(promises) >= 8
    assert [each for each in promises if not _ID.search(each)] == []
    assert "test_limits_page" not in section
