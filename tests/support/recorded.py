"""Requests as clients send them, byte for byte, recorded from the HTTP libraries that they use.

`tests/data/sdapi/*.http` and `tests/data/openai/*.http` have one in each file; there a line of the
head ends in a line feed alone, and the last line feed is no part of the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Answer:
    """What came back: the status, headers by lower-case name, and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Parse the body, which must say that it is JSON."""
        assert self.headers["content-type"].startswith("application/json")
        return json.loads(self.body)


def recorded(name: str, api: str = "sdapi") -> bytes:
    """Read the request that is called *name*."""
    text = (FOLDER / api / f"{name}.http").read_bytes().removesuffix(b"\n")
    head, _, body = text.partition(b"\n\n")
    return head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body


def without(request: bytes, name: str) -> bytes:
    """Leave the header *name*, in lower case, out of *request*."""
    head, _, body = request.partition(b"\r\n\r\n")
    kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(name.encode())]
    return b"\r\n".join(kept) + b"\r\n\r\n" + body


async def exchange(port: int, request: bytes) -> Answer:
    """Send *request* to a port of this machine, and read the answer to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
        }
        body = await reader.readexactly(int(headers["content-length"]))
    await writer.wait_closed()
    return Answer(int(head[0].split()[1]), headers, body)
