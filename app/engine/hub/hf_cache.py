"""Hugging Face's own cache, in which another program may have put a file already.

    <cache>/models--<owner>--<name>/blobs/<hash>
    <cache>/models--<owner>--<name>/snapshots/<commit>/<path>, a link to a blob

A large file's blob is named by its SHA-256. Here a name only finds a file; who uses it compares
size and hash (`app.engine.hub.cache`). Nothing in that cache is ever changed.
"""

from __future__ import annotations

from pathlib import Path

from app.engine.hub.fetch import size_of
from app.engine.models.entry import RemoteFile
from app.engine.models.registry import MODELS
from app.errors import StartupError

_PREFIX = "models--"


def find_file(file: RemoteFile) -> Path | None:
    """Return where *file*, or another of its size under its name, lies in the cache.

    HF_HOME and HF_HUB_CACHE say where the cache is.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{_PREFIX}{file.repository.replace('/', '--')}"
    places = (folder / "blobs" / file.sha256, folder / "snapshots" / file.revision / file.path)
    try:
        return next((path.resolve() for path in places if size_of(path) == file.size_bytes), None)
    except OSError:
        # It may belong to another user.
        return None


def find_snapshot(folder: Path) -> Path:
    """Return the snapshot to use where *folder* is a repository's in such a cache, else *folder*.

    It is the catalogue's commit, else that of the branch main, else the only one.

    Raises:
        StartupError: there is none, or several that could be meant.
    """
    if not folder.name.startswith(_PREFIX) or not (folder / "snapshots").is_dir():
        return folder
    # A snapshot may hold nothing but the one small file that somebody looked at.
    found = sorted(
        path
        for path in (folder / "snapshots").iterdir()
        if (path / "model_index.json").is_file() or any(path.glob("*.safetensors"))
    )
    pinned = {file.revision for entry in MODELS.values() for file in entry.files}
    main = folder / "refs" / "main"
    branch = {main.read_text().strip()} if main.is_file() else set()
    for commits in (pinned, branch):
        if named := [path for path in found if path.name in commits]:
            return named[0]
    if len(found) == 1:
        return found[0]
    raise StartupError(
        f"{folder.name} holds {len(found)} snapshots that could be meant; set KLEIN_MODEL to the "
        "path of one, or download the model again."
    )
