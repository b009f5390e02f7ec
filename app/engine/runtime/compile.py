"""Whether and how things are compiled, and that nothing is once the service is ready.

Each function is compiled twice: for the sizes of its first call, which are the default picture's,
and for all others together. The two are kept apart. Left to itself the compiler tries its newest
code first, so the default size too would run the general code from the warm-up on; and general code
leaves convolutions in the layout that the card must turn around before each, which takes a sixth
more time and 0.8 GB at 1024x1024.

Compilers fail, on a card or driver that nobody tried: then that function runs as it is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock, Thread
from types import FunctionType
from typing import Any

import torch
from tqdm import tqdm

from app.engine.hub import trust

_log = logging.getLogger(__name__)

_RECOMPILES = 64


@dataclass(frozen=True, slots=True)
class Compiler:
    """What is switched on, with the reason. Without a compiler everything runs as it is written."""

    is_on: bool
    has_graphs: bool
    reason: str
    backend: str | Callable[..., Any] = field(default="inductor", repr=False)
    failures: list[str] = field(default_factory=list, repr=False)
    """What the compiler said of the functions that it could not compile."""

    @property
    def summary(self) -> str:
        """Whether things are compiled, in words."""
        if not self.is_on:
            return f"not compiled: {self.reason}"
        if self.failures:
            return f"not all compiled: {self.failures[0]}"
        return f"compiled: {self.reason}"

    def compile(
        self, function: Callable[..., Any], *, whole: bool = True, convolves: bool = False
    ) -> Callable[..., Any]:
        """Compile *function* at its first call; a second size makes it ready for all others.

        With *whole* it must compile in one piece; foreign code may be cut into several. With
        *convolves* images keep their channels together, in general code too.
        """
        if not self.is_on:
            return function
        options: dict[str, Any] | None = None
        if self.backend == "inductor":
            # With "dynamic_scale_rblock" every load halves the kept block sizes of reductions once
            # more and compiles them: a second start then takes 6 s longer than a third.
            options = {"dynamic_scale_rblock": False, "force_layout_optimization": convolves}
        first, general = (
            torch.compile(each, fullgraph=whole, backend=self.backend, options=options)
            for each in (function, _twin(function))
        )
        return _Compiled(function, first, general, self.failures)


class _Compiled:
    """Calls *first* with the sizes that it was first called with, *general* with all others.

    Once the compiler failed, *function* itself; what it said goes to *failures*.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        first: Callable[..., Any],
        general: Callable[..., Any],
        failures: list[str],
    ) -> None:
        self._function = function
        self._first = first
        self._general = general
        self._failures = failures
        self._has_failed = False
        self._sizes: list[torch.Size] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self._has_failed:
            return self._function(*inputs)
        sizes = [each.shape for each in inputs if isinstance(each, torch.Tensor)]
        if self._sizes is None:
            self._sizes = sizes
        try:
            return self._first(*inputs) if sizes == self._sizes else self._general(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._has_failed = True
            self._failures.append(type(error).__name__)
            _log.warning("Pictures take longer: a function could not be compiled.", exc_info=True)
        return self._function(*inputs)


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy *function*, code included: compiled code is kept by the code object it came from.

    Name and place remain, by which the compiler remembers the sizes it has seen; so the twin's
    first code is general already.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    return FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


NO_COMPILER = Compiler(
    is_on=False, has_graphs=False, reason="the libraries' own modules run as they are written"
)


def choose_compiler(device: torch.device, cache: Path) -> Compiler:
    """Compile on a card where Triton and a C compiler are found; keep the results in *cache*."""
    if device.type != "cuda":
        return Compiler(is_on=False, has_graphs=False, reason="the processor needs none")
    missing = [
        name
        for name, is_there in (
            ("Triton", importlib.util.find_spec("triton") is not None),
            ("a C compiler", shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")),
        )
        if not is_there
    ]
    if missing:
        _log.warning("Pictures take about twice as long: %s is missing.", " and ".join(missing))
        return Compiler(is_on=False, has_graphs=False, reason=f"{' and '.join(missing)} missing")
    if reason := _keep_results(cache):
        return Compiler(is_on=False, has_graphs=False, reason=reason)
    # The compiler's progress bars, shown or not, would make a lock between processes, and one that
    # ends without its clean-up (app.worker.child) leaves it behind with a warning.
    tqdm.set_lock(RLock())
    torch._dynamo.config.recompile_limit = _RECOMPILES
    torch._dynamo.config.accumulated_recompile_limit = 4 * _RECOMPILES
    return Compiler(is_on=True, has_graphs=True, reason="Triton and a C compiler are there")


def freeze() -> None:
    """From now on a size that was not foreseen runs uncompiled instead of waiting for a
    compiler, and the compiler's processes, one for each core, give their memory back.
    """
    torch.compiler.set_stance("eager_on_recompile")
    workers = sys.modules.get("torch._inductor.async_compile")
    if workers is not None:
        # Their end is nothing that a picture has to wait for.
        Thread(target=workers.shutdown_compile_workers, name="compilers' end", daemon=True).start()


def thaw() -> None:
    """Undo `freeze`, for another model in the same process."""
    torch.compiler.set_stance("default")


def _keep_results(cache: Path) -> str:
    """Let both compilers keep their work beside the weights, so that a second start is warm.

    Returns why there is no folder for it, empty where there is one.
    """
    own = cache / "compiled"
    folder, reason = own, _why_unfit(own, cache)
    if reason:
        remedy = trust.remedy(cache) if _is_open(own, cache) else trust.ANOTHER_FOLDER
        for folder in _private_folders():
            if not (fault := _why_unfit(folder, folder)):
                break
        else:
            _log.warning(
                "Pictures take about twice as long, since nothing is compiled: %s, and %s; mount "
                "the folder of temporary files so that code in it can be run (exec), or %s",
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
    # The environment is the only way in: torch._inductor.runtime.cache_dir_utils. Triton's own goes
    # before the other.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return ""


def _why_unfit(folder: Path, root: Path) -> str:
    """Say why code cannot be kept in *folder* and run from there; make it where it is missing.

    What lies there is run, so nobody else may write to it. Refusing to start instead would take the
    service from those whose only volume is open to others, and compiling again costs them a minute.
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
    """Whether closing *root* and what lies in it may help."""
    try:
        return bool(trust.why_tree_open(folder, root))
    except OSError:
        return True


def _private_folders() -> Iterator[Path]:
    """Name others, the best first: what lies in the home outlasts a restart of the machine."""
    name = "klein-compiled"
    with contextlib.suppress(RuntimeError):  # this user has no home
        yield Path.home() / ".cache" / name
    temporary = Path(tempfile.gettempdir())
    if not (kept := temporary / f"{name}-{os.geteuid()}").is_symlink():
        yield kept
    new = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    yield new
    # Asked for another one, so this did not do.
    new.rmdir()
