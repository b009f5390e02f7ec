"""Which modules a process imports that builds a model over our kernels and draws, as JSON.

Called as `python -m tests.support.imported_modules MODEL DEVICE CACHE`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from app.domain import ImageSpec, RawImage
from app.engine import engine
from app.engine.runtime.kernels_choice import KernelsChoice, choose_kernels
from tests.support.layout_files import build

UNWANTED = {"torch._dynamo", "torch._inductor", "diffusers", "transformers.modeling_utils"}
"""They take ten seconds of a start, and nothing of them would run."""


def unwanted(model: Path, device: str, cache: Path) -> set[str]:
    """Return those of `UNWANTED` that a new process imports."""
    command = [sys.executable, "-m", __name__, str(model), device, str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return UNWANTED & set(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def main(model: Path, device: torch.device, cache: Path) -> None:
    """Draw often enough that passes become CUDA graphs, then print."""
    kernels = choose_kernels(device, cache)
    if device.type == "cpu":
        kernels = KernelsChoice(is_on=True, has_graphs=False, reason="a test")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    made = build(model, linears="fp8", kernels=kernels, device=device, dtype=dtype)
    spec = ImageSpec(
        prompt="a",
        width=64,
        height=64,
        num_inference_steps=6,
        guidance_scale=1.0,
        seed=0,
        references=(RawImage(64, 64, bytes(64 * 64 * 3)),),
    )
    for _ in range(2):
        latents = engine.denoise(
            made,
            spec,
            engine.encode_text(made, spec),
            engine.encode_references(made, spec),
            engine.draw_noise(made, spec),
            on_step=lambda *_: None,
            is_cancelled=lambda: False,
        )
        engine.decode(made, latents, made.grid(spec))
    sys.stdout.write(json.dumps(list(sys.modules)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.device(sys.argv[2]), Path(sys.argv[3]))
