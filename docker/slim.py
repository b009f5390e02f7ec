"""Take out of an environment what the service never imports: `python3 slim.py SITE-PACKAGES`.

Files go by the table below, each with its reason. Bytecode is made by importing what the service
imports, and by nothing else: a container's root is read-only, so a module without it is compiled at
each start, but most modules of the libraries are never loaded.
"""

from __future__ import annotations

import compileall
import importlib
import pkgutil
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

UNUSED = {
    "comfy_kitchen/backends/hip": "kernels for AMD's cards; imported under a torch for ROCm only",
    "torch/test": "torch's tests in C++",
    "torch/bin/*": "torch's tests and tools; see KEPT",
    "torch/include": "headers for extensions of torch; Triton brings those that it needs",
    "torch/share": "CMake's files for them",
    "torch/lib/*.a": "static libraries for them",
    "torch/lib/lib*_test.so": "what torch's tests load",
    "torch/lib/libbackend_with_compiler.so": "what torch's tests load",
    "torch/lib/libaoti_custom_ops.so": "what torch's tests load",
    "mpmath/**/tests": "tests",
    "networkx/**/tests": "tests",
    "numpy/**/tests": "tests",
    "sympy/**/tests": "tests",
    "pip": "installs nothing here: the root is read-only",
    "pip-*.dist-info": "goes with pip",
}
"""Paths below site-packages, with `*` and `**` as in pathlib, and why nobody misses them."""
KEPT = {"torch/bin/torch_shm_manager": "torch starts it where tensors are shared by file"}

WHOLE = ("app", "comfy_kitchen", "triton")
"""Packages that are compiled whole: what is imported of them depends on the card."""
ALSO = {
    "diffusers": (
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "transformers.models.qwen3.modeling_qwen3": ("Qwen3Model",),
}
"""What the engine imports when it loads, by module and name."""


def remove_unused(site: Path) -> int:
    """Remove what `UNUSED` lists and return its bytes; bytecode of every kind goes too."""
    kept = {site / name for name in KEPT}
    freed = 0
    for pattern in (*UNUSED, "**/__pycache__"):
        for path in [found for found in site.glob(pattern) if found not in kept]:
            freed += sum(each.stat().st_size for each in _files(path))
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return freed


def compile_imported(site: Path) -> list[str]:
    """Import what the service does, so that Python writes its bytecode; return what cannot be here.

    Modules for a card cannot where torch was built for none.
    """
    for name in WHOLE:
        if (site / name).is_dir():
            compileall.compile_dir(site / name, quiet=1)
    app = importlib.import_module("app")
    missing = []
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            missing.append(f"{module.name}: {error}")
    for name, parts in ALSO.items():
        for part in parts:
            getattr(importlib.import_module(name), part)
    return missing


def _files(path: Path) -> Iterator[Path]:
    found = path.rglob("*") if path.is_dir() and not path.is_symlink() else iter([path])
    return (each for each in found if each.is_file() and not each.is_symlink())


def main() -> None:
    """Do both, and say what was freed and what is not importable here."""
    site = Path(sys.argv[1])
    sys.stdout.write(f"{remove_unused(site) / 1e6:.0f} MB removed\n")
    sys.dont_write_bytecode = False
    for line in compile_imported(site):
        sys.stdout.write(f"not imported here: {line}\n")


if __name__ == "__main__":
    main()
