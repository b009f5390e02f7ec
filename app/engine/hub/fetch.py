"""Downloads one published file over HTTP: resumed, with a stall timeout, and verified by hash.

huggingface_hub gives the address, the headers with the user's token, and the client with its
proxies and certificates. The transfer is our own, because `hf_hub_download` deletes a partial file
when the process ends (https://github.com/huggingface/huggingface_hub/pull/4228), and a connection
lost after four of five gigabytes must not start the download over. The hub's responses are not
trusted for the content: size and SHA-256 come from the catalogue.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from app import __version__
from app.engine.hub.trust import may_go_on
from app.engine.models.entry import RemoteFile
from app.errors import StartupError

OnBytes = Callable[[int], None]

_HASH_BLOCK_BYTES = 8 * 1024 * 1024
_TIMEOUT_S = 30.0
_SHORT_ANSWERS = 5
"""After so many responses in a row without a missing byte, the hub does not have the file."""
_LONGEST_WAIT_S = 10.0
_SYNC_BYTES = 256 * 1024 * 1024
"""Bytes between calls of fsync, so that none of them takes minutes."""
SILENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Hub:
    """Where files come from: *endpoint* and *token* default to HF_ENDPOINT and the user's login."""

    endpoint: str | None = None
    token: str | None = None
    wait: Callable[[float], None] = time.sleep
    silence_s: float = SILENCE_S
    """Seconds without a byte after which a download fails, however many tries there were."""
    clock: Callable[[], float] = time.monotonic

    @property
    def host(self) -> str:
        """The hub's host name for messages."""
        from huggingface_hub import constants

        return urlsplit(self.endpoint or constants.ENDPOINT).hostname or "the hub"


class _Interrupted(Exception):
    """The transfer ended early for a reason that may be temporary."""


@dataclass(slots=True)
class _Line:
    """Reports progress, and measures how long no bytes have come."""

    hub: Hub
    report: OnBytes
    heard_at: float

    def on_bytes(self, done: int) -> None:
        """Record progress and report it."""
        self.heard_at = self.hub.clock()
        self.report(done)

    @property
    def left_s(self) -> float:
        """The seconds until the silence counts as a failure."""
        return self.heard_at + self.hub.silence_s - self.hub.clock()


def fetch(file: RemoteFile, target: Path, hub: Hub, on_bytes: OnBytes) -> None:
    """Download *file* to *target*, resuming what an earlier run left.

    *on_bytes* is called during hashing too, so that it is never silent for long.

    Raises:
        StartupError: the file cannot be downloaded, or is not the published one.
    """
    part = partial_path(target)
    if os.path.lexists(part) and not may_go_on(part):
        # Its owner could go on changing it, or make this process write elsewhere.
        part.unlink()
    reason, idle, short, line = "", 0, 0, _Line(hub, on_bytes, hub.clock())
    while (have := size_of(part)) < file.size_bytes:
        on_bytes(have)
        if short == _SHORT_ANSWERS:
            raise _gave_up(file, have, hub, reason)
        if idle:
            # A long silence has thousands of tries, whose power of two overflows a float.
            wait_s = min(2.0 ** min(idle - 1, 10), _LONGEST_WAIT_S, line.left_s)
            hub.wait(max(0.0, wait_s))
        if line.left_s <= 0:
            silence = f"has sent nothing for {hub.silence_s:g} s (KLEIN_DOWNLOAD_SILENCE_S)"
            raise _gave_up(file, have, hub, f"{reason} and {silence}" if reason else silence)
        try:
            _append(file, part, hub, line)
            reason, short = "sends less than the whole file", short + 1
        except _Interrupted as error:
            reason, short = str(error), 0
        idle, short = (0, 0) if size_of(part) > have else (idle + 1, short)
    if size_of(part) != file.size_bytes or file.sha256 != hash_file(
        part, lambda done: on_bytes(file.size_bytes)
    ):
        part.unlink()
        raise damaged(file)
    part.replace(target)


def partial_path(target: Path) -> Path:
    """Return the path of the partial file while *target* is downloaded."""
    return target.with_name(target.name + ".part")


def size_of(path: Path) -> int:
    """Return the size of a file, 0 where it is missing."""
    return path.stat().st_size if path.exists() else 0


def hash_file(path: Path, on_bytes: OnBytes = lambda done: None) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as source:
        while block := source.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            on_bytes(done)
    return digest.hexdigest()


def damaged(file: RemoteFile) -> StartupError:
    """Build the error for a file whose content is not the published one."""
    return StartupError(
        f"{file.path} is damaged: its size or SHA-256 is not the published one. It has been "
        "deleted; start again, or run `klein download`, to download it anew."
    )


def _append(file: RemoteFile, part: Path, hub: Hub, line: _Line) -> None:
    """Append the body of one response to *part*, up to one block more than belongs there."""
    from huggingface_hub import get_session, get_token, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    url = hf_hub_url(file.repository, file.path, revision=file.revision, endpoint=hub.endpoint)
    headers = {"Accept-Encoding": "identity", "User-Agent": f"klein-server/{__version__}"}
    if token := hub.token or get_token():
        headers["Authorization"] = f"Bearer {token}"
    if have := size_of(part):
        headers["Range"] = f"bytes={have}-"
    reason = "cannot be reached"
    try:
        timeout_s = max(0.001, min(_TIMEOUT_S, line.left_s))
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            reason = "broke the connection off"
            _check_status(response, file, part, hub.host, has_token=bool(token))
            _write(response, part, have, file, line.on_bytes)
    except OfflineModeIsEnabled:
        raise StartupError(
            f"{file.path} is not in the cache and HF_HUB_OFFLINE forbids downloading it; unset "
            "HF_HUB_OFFLINE and start again."
        ) from None
    except Exception as error:
        # The hub's client is httpx or httpx2, by the hub's version.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _Interrupted(reason) from error


def _write(response: Any, part: Path, have: int, file: RemoteFile, on_bytes: OnBytes) -> None:
    """Write the body to *part*, behind the *have* bytes there unless the range was ignored."""
    found = response.headers.get("Content-Range", "")
    is_rest = response.status_code == 206 and found.startswith(f"bytes {have}-")
    start = synced = have if is_rest else 0
    with part.open("ab" if start else "wb") as sink:
        try:
            # Blocks as they come: buffering would lose the last ones when the connection breaks.
            for block in response.iter_bytes():
                sink.write(block)
                start += len(block)
                on_bytes(start)
                if start > file.size_bytes:
                    break
                if start - synced >= _SYNC_BYTES:
                    synced = start
                    _sync(sink)
        finally:
            # fsync: a crash of the machine must not leave a file of the right size full of zeros.
            _sync(sink)


def _sync(sink: IO[bytes]) -> None:
    sink.flush()
    os.fsync(sink.fileno())


def _check_status(
    response: Any, file: RemoteFile, part: Path, host: str, *, has_token: bool
) -> None:
    """Tell temporary errors from those that the operator has to resolve."""
    status, name = response.status_code, file.repository
    if status in (200, 206):
        return
    if status == 416:
        # The partial file is longer than the hub's file.
        part.unlink(missing_ok=True)
    if status == 416 or status >= 500:
        raise _Interrupted(f"answers {status}")
    found = "does not know the token that it got" if has_token else "wants a token"
    seconds = response.headers.get("Retry-After", "300")
    reasons = {
        401: f"{found} for {name}; set HF_TOKEN to a valid one",
        403: f"does not let you read {name}; accept its terms there and set HF_TOKEN",
        404: f"lacks {file.path} of {name} at the pinned revision; check HF_ENDPOINT",
        429: f"has had too many requests from you; wait {seconds} seconds or set HF_TOKEN",
    }
    other = f"answers {status} for {file.path}; check HF_ENDPOINT and the proxy"
    raise StartupError(f"{host} {reasons.get(status, other)}, and start again.")


def _gave_up(file: RemoteFile, have: int, hub: Hub, reason: str) -> StartupError:
    if have == 0:
        return StartupError(
            f"{file.path} is not in the cache and {hub.host} {reason}; connect this machine, or "
            "copy the cache of one that has it, and start again."
        )
    return StartupError(
        f"{file.path} is not whole, because {hub.host} {reason}: {have:,} of {file.size_bytes:,} "
        "bytes have come and are kept; start again to go on from there."
    )
