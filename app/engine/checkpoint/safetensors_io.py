"""Reads safetensors files: the header first, each tensor's bytes on demand.

Only this format is supported, since it contains no code. Files are read with `pread` instead of
mmap: mapped pages count as this process's memory, and the first load has to stay small on a machine
with 16 GB. Several threads read, each a piece: one alone copies from the page cache at a fraction
of what memory and bus allow. Tensors for a GPU pass through small pinned buffers: allocating host
memory for each would take several times as long. With KLEIN_OFFLOAD=disk files are memory-mapped,
so the kernel evicts and reads pages as memory allows. This module knows bytes and names, no model.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from app.engine.checkpoint.safetensors_header import HeaderError, TensorEntry, read_header
from app.errors import StartupError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""The format's names of dtypes."""

CPU = torch.device("cpu")

_SHOWN = 16
"""The most characters of a string of the file that a message repeats."""
_PIECE_BYTES = 1 << 22
_READERS = 4


Read = Callable[[torch.device], torch.Tensor]
"""Reads one tensor into newly allocated memory on a device."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of *file*: its dtype, shape, and byte range."""

    file: SafetensorsFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        """Read the tensor onto *device*."""
        return self.file.read(self, device)


class SafetensorsFile(AbstractContextManager["SafetensorsFile"]):
    """An open safetensors file and context manager. Not thread-safe.

    With *is_mapped* CPU tensors are views of the memory-mapped file, valid after `close` too.

    Raises:
        StartupError: the file is no complete safetensors file, or has an unsupported dtype.
    """

    def __init__(self, path: Path, *, is_mapped: bool = False) -> None:
        self.path = path
        self._is_mapped = is_mapped
        self._map: mmap.mmap | None = None
        self._readers: _Readers | None = None
        self._file: FileIO = path.open("rb", buffering=0)
        try:
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a memory map is released with its last tensor."""
        self._map = None
        if self._readers is not None:
            self._readers.close()
            self._readers = None
        self._file.close()

    def read(self, tensor: Tensor, device: torch.device = CPU) -> torch.Tensor:
        """Read *tensor* onto *device*; an aligned tensor of a mapped file is a view."""
        if self._is_mapped and tensor.size_bytes and tensor.start % tensor.dtype.itemsize == 0:
            return self._view(tensor).to(device)
        buffer = torch.empty(tensor.size_bytes, dtype=torch.uint8, device=device)
        if self._readers is None:
            self._readers = _Readers()
        self._readers.fill(buffer, partial(self._read_at, tensor.start))
        return buffer.view(tensor.dtype).reshape(tensor.shape)

    def _read_at(self, start: int, place: torch.Tensor, offset: int) -> None:
        """Fill *place*, uint8 on the host, from *start* + *offset* in the file."""
        view = memoryview(place.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + offset + done)
            if not count:
                raise _damaged(self.path, "it ends before its last tensor")
            done += count

    def _view(self, tensor: Tensor) -> torch.Tensor:
        if self._map is None:
            # Copy-on-write: no change of a weight can reach the file.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(
            self._map, dtype=tensor.dtype, offset=tensor.start, count=math.prod(tensor.shape)
        ).reshape(tensor.shape)

    def _read_header(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        if self._file.read(4) == b"GGUF":
            raise StartupError(
                f"{self.path.name} is a GGUF file, which is not supported; "
                "use the fp8 or bf16 safetensors file."
            )
        self._file.seek(0)
        try:
            entries, notes = read_header(self._file, self.path.stat().st_size)
        except HeaderError as error:
            raise _damaged(self.path, str(error)) from None
        return {name: self._locate(name, entry) for name, entry in entries.items()}, notes

    def _locate(self, name: str, entry: TensorEntry) -> Tensor:
        if (dtype := _DTYPES.get(entry.dtype)) is None:
            raise StartupError(
                f"{self.path.name} holds tensors of the type {entry.dtype[:_SHOWN]!r}, which is "
                "not supported; use the fp8 or bf16 safetensors file."
            )
        if entry.size_bytes != math.prod(entry.shape) * dtype.itemsize:
            raise _damaged(self.path, "a tensor's bytes do not fit its shape")
        return Tensor(self, name, dtype, entry.shape, entry.start, entry.size_bytes)


class _Readers:
    """Threads that read pieces of a tensor, two pinned buffers for each where it is for a GPU.

    One buffer is copied to the GPU while the other is filled.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_READERS, "reader")
        self._places: SimpleQueue[tuple[torch.Tensor, Any]] | None = None

    def fill(self, target: torch.Tensor, read: Callable[[torch.Tensor, int], None]) -> None:
        """Fill *target*, uint8, by *read*, which fills a piece that begins at an offset."""
        move = read
        if target.device.type == "cuda":
            if self._places is None:
                self._places = _pinned_places()
            move = partial(_by_pinned_memory, self._places, read)

        def move_at(offset: int) -> None:
            move(target[offset : offset + _PIECE_BYTES], offset)

        offsets = range(0, len(target), _PIECE_BYTES)
        # A thread takes longer to wake than a small tensor to read.
        for _ in map(move_at, offsets) if len(offsets) == 1 else self._pool.map(move_at, offsets):
            pass

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _pinned_places() -> SimpleQueue[tuple[torch.Tensor, Any]]:
    """Return pinned buffers, each with the event of its last copy to the GPU."""
    places: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()
    lanes: Any = torch.cuda
    for _ in range(2 * _READERS):
        place = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        places.put((place, lanes.Event()))
    return places


def _by_pinned_memory(
    places: SimpleQueue[tuple[torch.Tensor, Any]],
    read: Callable[[torch.Tensor, int], None],
    piece: torch.Tensor,
    offset: int,
) -> None:
    """Read at *offset* into one of *places*, and begin to copy it to *piece* on the GPU.

    The copy goes into the device's usual stream, in whose order its memory was allocated.
    """
    place, copied = places.get()
    try:
        copied.synchronize()
        read(place[: len(piece)], offset)
        piece.copy_(place[: len(piece)], non_blocking=True)
        copied.record(torch.cuda.current_stream(piece.device))
    finally:
        places.put((place, copied))


def _damaged(path: Path, what: str) -> StartupError:
    return StartupError(f"{path.name} is not a whole safetensors file: {what}; download it again.")
