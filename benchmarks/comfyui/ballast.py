"""A process that holds the card's memory but for what is to be left: a smaller card, but as fast.

    python -m benchmarks.comfyui.ballast 11.2

says how many bytes are free when it has taken the others, and holds them until its input ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = (sys.executable, "-m", "benchmarks.comfyui.ballast")
_GIB = 1 << 30
_GRAIN = 2 << 20
"""What the card's memory is given out in; less than that too much may stay free."""


class Memory(Protocol):
    """A card's memory: what is free of it, and who takes of it."""

    def free(self) -> int:
        """Count the bytes that nobody holds."""

    def take(self, count: int) -> None:
        """Hold *count* bytes more, until the process ends."""


class CardMemory:
    """The first card's, by torch."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def free(self) -> int:
        """Count the bytes that nobody holds."""
        import torch

        return torch.cuda.mem_get_info(0)[0]

    def take(self, count: int) -> None:
        """Hold *count* bytes more."""
        import torch

        self._held.append(torch.empty(count, dtype=torch.uint8, device="cuda:0"))


def fill(memory: Memory, leave: int) -> int:
    """Take all but *leave* bytes, in pieces of at most 1 GiB, and return what is free then.

    Raises:
        RuntimeError: less than that was free to begin with.
    """
    if (free := memory.free()) < leave:
        raise RuntimeError(
            f"{free / _GIB:.2f} GiB are free, less than the {leave / _GIB:.2f} asked"
        )
    while (excess := memory.free() - leave) >= _GRAIN:
        memory.take(min(excess // _GRAIN * _GRAIN, _GIB))
    return memory.free()


@contextlib.contextmanager
def ballast(leave_gib: float, command: Sequence[str] = _COMMAND) -> Iterator[int]:
    """Have a process hold all but *leave_gib* of the card, and give the bytes really free then.

    Raises:
        RuntimeError: it could not, and has said why on the standard error.
    """
    with subprocess.Popen(
        [*command, str(leave_gib)],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"no ballast: exit code {process.wait(60)}")
            yield int(line)
        finally:
            process.stdin.close()


def main() -> None:
    """Fill the card, say what is left, and wait for the end of the input."""
    print(fill(CardMemory(), round(float(sys.argv[1]) * _GIB)), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
