"""Small pictures of adapters, from files beside theirs.

Such a file is as untrusted as a client's picture, so a decoder's process reads it, one at a time.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from app import images
from app.engine.adapters.directory import Adapter, find_preview
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.images.preparing import Edit, Size, Upload

FORMAT = OutputFormat("webp", 80)
MAX_SIDE = 384
MAX_BYTES = 20_000_000
_KEPT = 64


class Decoders(Protocol):
    """What is needed of `app.images.pool.DecoderPool`."""

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: Size | None,
        nearest: Callable[[int, int], Size],
        *,
        client: str,
    ) -> Edit:
        """Decode *images*."""


class Previews:
    """Makes previews, and keeps the last ones."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._kept: OrderedDict[tuple[object, ...], bytes | None] = OrderedDict()
        self._turn = asyncio.Lock()

    async def get(self, adapter: Adapter, client: str) -> bytes | None:
        """Return the preview of *adapter* as `FORMAT`; None where there is none to be shown.

        Raises:
            Unavailable: no decoder can be started.
        """
        async with self._turn:
            found = await asyncio.to_thread(_find, Path(adapter.path))
            if found is None:
                return None
            path, key = found
            if key not in self._kept:
                self._kept[key] = await self._make(path, client)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    async def _make(self, path: Path, client: str) -> bytes | None:
        data = await asyncio.to_thread(_read, path)
        if not data:
            return None
        upload = Upload(data, "preview")
        try:
            edit = await self._decoders.prepare([upload], None, None, _as_it_is, client=client)
        except InvalidRequest:
            return None
        picture = edit.references[0]
        share = min(1.0, MAX_SIDE / max(picture.width, picture.height))
        size = round(picture.width * share), round(picture.height * share)
        return await asyncio.to_thread(images.encode, picture, FORMAT, None, None, size)


def _as_it_is(width: int, height: int) -> Size:
    return width, height


def _find(adapter: Path) -> tuple[Path, tuple[object, ...]] | None:
    """Return the picture beside *adapter* and what tells it from any other."""
    try:
        path = find_preview(adapter)
        if path is None:
            return None
        found = path.stat()
    except OSError:
        return None
    return path, (path, found.st_ino, found.st_size, found.st_mtime_ns)


def _read(path: Path) -> bytes:
    """Read the file at *path*; nothing where it is no regular file, too large, or unreadable."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                return b""
            return file.read(MAX_BYTES)
    except OSError:
        return b""
