"""Whether our own kernels run, and where what Triton compiles of them is kept.

Triton compiles each kernel once, at its first call, and calls a C compiler for what launches it. On
a machine that lacks a part of this the same arithmetic runs in torch, and pictures take longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from app.engine.hub import disk, trust
from app.engine.kernels.triton_check import refuse, triton_fault
from app.engine.runtime.toolchain import (
    HEADERS,
    WITHOUT_KERNELS,
    find_compiler,
    install_command,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KernelsChoice:
    """Whether our kernels run and passes become CUDA graphs, with the reason."""

    is_on: bool
    has_graphs: bool
    reason: str
    remedy: str = ""
    """The command that installs what is missing; empty where nothing is."""

    @property
    def summary(self) -> str:
        """Return whether our kernels run, in words."""
        return f"{'own' if self.is_on else 'no own'} kernels: {self.reason}"


EXACT = KernelsChoice(
    is_on=False, has_graphs=False, reason="the libraries' own modules run as they are written"
)


def _missing_tools() -> list[str]:
    """Return what Triton needs and is not here; a warm cache may do without the headers."""
    return [each for each in find_compiler().missing if each != HEADERS]


def choose_kernels(device: torch.device, cache: Path, *, is_exact: bool = False) -> KernelsChoice:
    """Take our kernels on a GPU where Triton runs one; keep what it compiles in *cache*.

    Where they are not taken, none is launched (`triton_check.refuse`): so with *is_exact*, for
    which neither Triton nor a folder is needed.
    """
    if is_exact:
        refuse(EXACT.reason)
        return EXACT
    if device.type != "cuda":
        return KernelsChoice(is_on=False, has_graphs=False, reason="the processor needs none")
    if missing := _missing_tools():
        return _without(f"{' and '.join(missing)} missing", missing)
    if reason := _keep_results(cache):
        return _without(reason, find_compiler().missing)
    refuse("")
    if reason := triton_fault():
        return _without(reason, find_compiler().missing)
    return KernelsChoice(is_on=True, has_graphs=True, reason="Triton and a C compiler are there")


def _without(reason: str, missing: Collection[str]) -> KernelsChoice:
    refuse(reason)
    remedy = install_command(missing) if missing else ""
    return KernelsChoice(is_on=False, has_graphs=False, reason=reason, remedy=remedy)


def _keep_results(cache: Path) -> str:
    """Have Triton cache its results beside the weights, so that a second start is warm.

    Return why there is no folder for it, empty where there is one.
    """
    own = cache / disk.COMPILED
    folder, reason = own, _why_unfit(own, cache)
    if reason:
        remedy = trust.remedy(cache) if _is_open(own, cache) else trust.ANOTHER_FOLDER
        for folder in _private_folders():
            if not (fault := _why_unfit(folder, folder)):
                break
        else:
            _log.warning(
                "Pictures take about %s times as long, since no kernel can be kept: %s, and %s; "
                "mount the folder of temporary files so that code in it can be run (exec), or %s",
                WITHOUT_KERNELS,
                reason,
                fault,
                remedy,
            )
            return fault
        _log.warning(
            "Compiled code is kept in %s and not in KLEIN_CACHE_DIR, because %s; to end this, %s",
            folder,
            reason,
            remedy,
        )
    # Triton reads it at each compilation, and would else follow what was set outside.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    disk.hold(folder)
    return ""


def _why_unfit(folder: Path, root: Path) -> str:
    """Return why code cannot be kept in *folder* and executed; make the folder where it is missing.

    Its contents are executed, so nobody else may write to it. Refusing to start instead would take
    the service from those whose only volume is open to others, and compiling again costs them a
    minute.
    """
    try:
        trust.make_folder(folder, root, trust.PRIVATE_MODE)
        if reason := trust.why_tree_open(folder, root) or trust.why_swappable(folder):
            return reason
        if not os.access(folder, os.W_OK):
            return f"{folder} may not be written to"
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return f"{folder} lies on a file system from which no code can be run (noexec)"
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror})"
    return ""


def _is_open(folder: Path, root: Path) -> bool:
    """Return whether closing *root* and its contents may help."""
    try:
        return bool(trust.why_tree_open(folder, root))
    except OSError:
        return True


def _private_folders() -> Iterator[Path]:
    """Yield other folders, the best first: the home folder outlasts a restart of the machine."""
    name = "klein-compiled"
    with contextlib.suppress(RuntimeError):  # this user has no home
        yield Path.home() / ".cache" / name
    temporary = Path(tempfile.gettempdir())
    if not (kept := temporary / f"{name}-{os.geteuid()}").is_symlink():
        yield kept
    new = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    yield new
    # The caller asked for another folder, so this one was unfit.
    new.rmdir()
