"""Whether and how things are compiled, and that nothing is once the service is ready."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)

_RECOMPILES = 64


@dataclass(frozen=True, slots=True)
class Compiler:
    """What is switched on, with the reason. Without a compiler everything runs as it is written."""

    is_on: bool
    has_graphs: bool
    reason: str

    def compile(self, function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
        """Compile *function* at its first call; a second size makes it ready for all others.

        With *whole* it must compile in one piece; foreign code may be cut into several.
        """
        if not self.is_on:
            return function
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=whole)
        return compiled


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
    _keep_results(cache)
    torch._dynamo.config.recompile_limit = _RECOMPILES
    torch._dynamo.config.accumulated_recompile_limit = 4 * _RECOMPILES
    return Compiler(is_on=True, has_graphs=True, reason="Triton and a C compiler are there")


def freeze() -> None:
    """From now on a size that was not foreseen runs uncompiled instead of waiting for a
    compiler.
    """
    torch.compiler.set_stance("eager_on_recompile")


def thaw() -> None:
    """Undo `freeze`, for another model in the same process."""
    torch.compiler.set_stance("default")


def _keep_results(cache: Path) -> None:
    """Let both compilers keep their work beside the weights, so that a second start is warm."""
    folder = cache / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    # The environment is the only way in: torch._inductor.runtime.cache_dir_utils.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
