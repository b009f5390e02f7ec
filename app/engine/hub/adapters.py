"""Downloads an adapter's file from a model hub, pinned by commit and SHA-256.

The hub is asked for the size alone, which only bounds the download: what came is used only if its
hash is the one that the operator has given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from app import __version__
from app.engine.hub.fetch import Hub, fetch
from app.engine.models.entry import RemoteFile
from app.errors import StartupError

_ADDRESS = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40}):(?P<path>[^\s/][^\s]*\.safetensors)"
)
_SHA256 = re.compile("[0-9a-f]{64}")


def parse_address(text: str, sha256: str | None) -> RemoteFile:
    """Read `owner/repository@commit:path/file.safetensors`; the size is still unknown: 0.

    Raises:
        StartupError: it is none, or *sha256* is none; the message says how they are written.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in found["path"].split("/"):
        raise StartupError(
            "That is neither a file nor a pinned hub id, which is written "
            "owner/repository@commit:path/file.safetensors, with all 40 digits of the commit."
        )
    if sha256 is None or not _SHA256.fullmatch(sha256):
        raise StartupError(
            "A hub id needs --sha256 with the 64 digits of the file's SHA-256; the hub shows them "
            "on the file's page."
        )
    return RemoteFile(found["repository"], found["revision"], found["path"], 0, sha256)


def download(
    file: RemoteFile, target: Path, hub: Hub, max_bytes: int, on_bytes: Callable[[int, int], None]
) -> None:
    """Download *file* to *target*; *on_bytes* is told the bytes done and their number.

    Raises:
        StartupError: it cannot be downloaded, is larger than *max_bytes*, or is not the one that
            its hash names.
    """
    size_bytes = _ask_size(file, hub)
    if not 0 < size_bytes <= max_bytes:
        raise StartupError(
            f"{file.path} has {size_bytes:,} bytes; an adapter's file may have {max_bytes:,}."
        )
    whole = RemoteFile(file.repository, file.revision, file.path, size_bytes, file.sha256)
    fetch(whole, target, hub, lambda done: on_bytes(done, size_bytes))


def _ask_size(file: RemoteFile, hub: Hub) -> int:
    """Ask the hub for the size of *file*, and whether it knows it by another hash."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    url = hf_hub_url(file.repository, file.path, revision=file.revision, endpoint=hub.endpoint)
    try:
        found = get_hf_file_metadata(
            url,
            token=hub.token or get_token(),
            library_name="klein-server",
            library_version=__version__,
            endpoint=hub.endpoint,
        )
    except OfflineModeIsEnabled:
        raise StartupError("HF_HUB_OFFLINE forbids downloading; unset it.") from None
    except Exception as error:
        # The client's errors are those of httpx or httpx2, by the hub's version.
        raise StartupError(
            f"{hub.host} does not say how large {file.path} of {file.repository} is "
            f"({type(error).__name__}); check the id, HF_ENDPOINT and HF_TOKEN."
        ) from None
    if found.etag and _SHA256.fullmatch(found.etag) and found.etag != file.sha256:
        raise StartupError(
            f"{file.path} has another SHA-256 on {hub.host} than the one given: {found.etag}."
        )
    return found.size or 0
