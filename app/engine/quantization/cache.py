"""A cache of quantized layers on disk: a later start reads half the bytes and quantizes nothing.

    <cache>/converted/<component>-<kind>-<hash of the sources' paths>.safetensors

A file's metadata names its sources with size and modification time. A file whose sources changed,
that is damaged, or that others may write to (`app.engine.hub.trust`) is replaced. It is written to
a temporary file and renamed, so no reader sees a partial one; a failed write costs time only.

Of several workers that start together one quantizes, and the others wait for its file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from app.engine.checkpoint.files import ComponentFiles
from app.engine.checkpoint.safetensors_io import NAMES, SafetensorsFile
from app.engine.hub.disk import QUANTIZED, hold
from app.engine.hub.trust import is_closed, lock_file, make_folder, whole_file, why_open
from app.errors import StartupError

_log = logging.getLogger(__name__)

_WAIT_S = 600.0
"""For another worker that quantizes; after that this one does it too."""
_VERSION = "2"
"""Has to be raised when the quantization of the same sources changes."""


class QuantizedCache:
    """The cached layers of *part* in the format *kind*. Not thread-safe."""

    def __init__(self, folder: Path, part: ComponentFiles, kind: str, name: str) -> None:
        places = "\n".join(str(path.resolve()) for path in part.sources)
        digest = hashlib.sha256((places + part.change).encode()).hexdigest()[:12]
        self._cache = folder
        self._path = folder / QUANTIZED / f"{name}-{kind}-{digest}.safetensors"
        stats = [(path.name, path.stat()) for path in part.sources]
        self._metadata = {
            "version": _VERSION,
            "sources": json.dumps([[file, each.st_size, each.st_mtime_ns] for file, each in stats]),
            "change": part.change,
        }
        self._place = self._path.with_name(f".{self._path.stem}.lock")
        self._lock: int | None = None
        """A file descriptor, while this process alone may write the file."""
        self._has_waited = False
        self._file = self._open()

    def read(self, names: Sequence[str], device: torch.device) -> list[torch.Tensor] | None:
        """Read the tensors *names* of one layer onto *device*; None where one is not cached.

        Where no layer is, the first call waits until no other process quantizes them.
        """
        if self._file is None and not self._has_waited:
            self._has_waited = True
            self._file = self._open_after_others()
        if self._file is None or not set(names) <= self._file.tensors.keys():
            return None
        return [self._file.tensors[name].read(device) for name in names]

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write *tensors*, unless a valid file is there; a failure is logged.

        They pass through host memory one at a time.
        """
        if self._file is not None or not tensors:
            return
        try:
            make_folder(self._path.parent, self._cache)
            if reason := why_open(self._path.parent, self._cache):
                _log.warning("The 8 bit weights are quantized at each start, because %s.", reason)
                return
            _write(self._path, tensors, self._metadata)
            hold(self._path)
        except OSError as error:
            _log.warning(
                "The 8 bit weights could not be kept in KLEIN_CACHE_DIR (%s); "
                "the next start quantizes them again.",
                error.strerror,
            )

    def close(self) -> None:
        """Close the file, if there is one, and let others that wait for it look."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            # Who waits for this one and who comes later may hold two: at worst both quantize.
            self._place.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _open_after_others(self) -> SafetensorsFile | None:
        """Lock the file's place, and open the file if another process has written it meanwhile.

        The lock ends with `close`, or with the process. Without it every worker quantizes.
        """
        try:
            make_folder(self._path.parent, self._cache)
            self._lock = lock_file(self._place, _WAIT_S)
        except OSError as error:
            _log.debug("The quantized weights' place cannot be locked: %s.", error.strerror)
        return self._open()

    def _open(self) -> SafetensorsFile | None:
        with suppress(OSError, StartupError):
            if is_closed(self._path, self._cache):
                file = SafetensorsFile(self._path)
                if file.metadata == self._metadata:
                    hold(self._path)
                    return file
                file.close()
        return None


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            plain = value.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
            file.write(plain.numpy().data)
