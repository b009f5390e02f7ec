"""Whether and how functions are compiled, and that none is once the service is ready.

Each function is compiled twice: for the sizes of its first call, which are the default image's, and
with dynamic shapes for all others. The two are kept apart. Left to itself torch.compile tries its
newest code first, so the default size too would run the dynamic code from the warm-up on; and
dynamic code leaves convolutions in a memory format that the GPU must transpose before each, which
takes a sixth more time and 0.8 GB at 1024x1024.

Compilation can fail on a GPU or driver that nobody tried: then that function runs eagerly.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock, Thread
from types import FunctionType
from typing import Any

import torch
from tqdm import tqdm

from app.engine import torch_private
from app.engine.hub import disk, trust
from app.engine.runtime.toolchain import HEADERS, UNCOMPILED, find_compiler, install_command

_log = logging.getLogger(__name__)

_RECOMPILES = 64


@dataclass(frozen=True, slots=True)
class Compiler:
    """What is enabled, with the reason. Without a compiler every function runs eagerly."""

    is_on: bool
    has_graphs: bool
    reason: str
    backend: str | Callable[..., Any] = field(default="inductor", repr=False)
    failures: list[str] = field(default_factory=list, repr=False)
    """The compiler's errors for the functions that it could not compile."""
    remedy: str = ""
    """The command that installs what is missing; empty where nothing is."""

    @property
    def summary(self) -> str:
        """Return whether functions are compiled, in words."""
        if not self.is_on:
            return f"not compiled: {self.reason}"
        if self.failures:
            return f"not all compiled: {self.failures[0]}"
        return f"compiled: {self.reason}"

    def compile(
        self, function: Callable[..., Any], *, whole: bool = True, convolves: bool = False
    ) -> Callable[..., Any]:
        """Compile *function* at its first call; a second size compiles it with dynamic shapes.

        With *whole* it must compile as one graph; third-party code may have graph breaks. With
        *convolves* images keep the channels_last memory format, with dynamic shapes too.
        """
        if not self.is_on:
            return function
        options: dict[str, Any] | None = None
        if self.backend == "inductor":
            # With "dynamic_scale_rblock" every load halves the stored block sizes of reductions
            # once more and compiles them: a second start then takes 6 s longer than a third.
            options = {"dynamic_scale_rblock": False, "force_layout_optimization": convolves}
        first, general = (
            torch.compile(each, fullgraph=whole, backend=self.backend, options=options)
            for each in (function, _twin(function))
        )
        return _Compiled(function, first, general, self.failures)


@dataclass(slots=True)
class _Compiled:
    """Calls *first* with the sizes of its first call, *general* with all others.

    Once compilation has failed, *function* itself is called; the error goes to *failures*.
    """

    function: Callable[..., Any]
    first: Callable[..., Any]
    general: Callable[..., Any]
    failures: list[str]
    has_failed: bool = False
    sizes: list[torch.Size] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.has_failed:
            return self.function(*inputs)
        sizes = [each.shape for each in inputs if isinstance(each, torch.Tensor)]
        if self.sizes is None:
            self.sizes = sizes
        try:
            return self.first(*inputs) if sizes == self.sizes else self.general(*inputs)
        except torch_private.compiler_errors() as error:
            self.has_failed = True
            self.failures.append(type(error).__name__)
            _log.warning("Pictures take longer: a function could not be compiled.", exc_info=True)
        return self.function(*inputs)


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy *function*, code included: compiled code is cached by the code object it came from.

    Name and file remain, by which the compiler remembers the sizes it has seen; so the twin's first
    code has dynamic shapes already.
    """
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


NO_COMPILER = Compiler(
    is_on=False, has_graphs=False, reason="the libraries' own modules run as they are written"
)


def missing_tools() -> list[str]:
    """Return what compiling needs and is not here; a function may do without the headers."""
    # Whether it needs them shows when it is compiled.
    return [each for each in find_compiler().missing if each != HEADERS]


def choose_compiler(device: torch.device, cache: Path) -> Compiler:
    """Compile on a GPU where Triton and a C compiler are found; cache the results in *cache*."""
    if device.type != "cuda":
        return Compiler(is_on=False, has_graphs=False, reason="the processor needs none")
    if missing := missing_tools():
        reason = f"{' and '.join(missing)} missing"
        remedy = install_command(missing)
        return Compiler(is_on=False, has_graphs=False, reason=reason, remedy=remedy)
    if reason := _keep_results(cache):
        return Compiler(is_on=False, has_graphs=False, reason=reason)
    # The compiler's progress bars, shown or not, would make a lock between processes, and one that
    # ends without its clean-up (app.worker.child) leaves it behind with a warning.
    tqdm.set_lock(RLock())
    torch_private.limit_recompiles(_RECOMPILES, 4 * _RECOMPILES)
    return Compiler(is_on=True, has_graphs=True, reason="Triton and a C compiler are there")


def freeze() -> None:
    """Run sizes that were not compiled eagerly from now on, instead of waiting for a compiler.

    The compiler's processes, one for each core, are ended.
    """
    torch.compiler.set_stance("eager_on_recompile")
    # An image need not wait for their end.
    Thread(target=torch_private.end_compile_workers, name="compilers' end", daemon=True).start()


def thaw() -> None:
    """Undo `freeze`, for another model in the same process."""
    torch.compiler.set_stance("default")


def _keep_results(cache: Path) -> str:
    """Have both compilers cache their results beside the weights, so that a second start is warm.

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
                "Pictures take about %s times as long, since nothing is compiled: %s, and %s; "
                "mount the folder of temporary files so that code in it can be run (exec), or %s",
                UNCOMPILED,
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
    # Only the environment sets it: torch._inductor.runtime.cache_dir_utils. Triton's own setting
    # takes precedence over Inductor's.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
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
