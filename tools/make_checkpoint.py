"""Write a random model of klein's shape, full-size by default: to measure without the weights.

    python tools/make_checkpoint.py FOLDER [--tiny] [--fp8] [--device cuda] [--seed 0]

With --fp8 the transformer lies at the folder's top as one file, as the published fp8 file does,
with weight_scale and input_scale. The input scales are one number for all layers: the weights are
drawn so that activations stay near unit size everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app.engine.checkpoint.bfl import rules
from app.engine.quantization.linear import quantize_fp8
from tools import random_weights

_INPUT_SCALE = 12.0 / 448.0
"""Activations are near unit size, and a few reach a dozen."""


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes")
    parser.add_argument("--fp8", action="store_true", help="the transformer as one fp8 file")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    begun = time.perf_counter()
    architecture = random_weights.TINY if asked.tiny else random_weights.FULL

    def save_fp8(tensors: dict[str, torch.Tensor], part: Path) -> None:
        target = part.parent / "flux-2-klein-4b-fp8.safetensors"
        write_fp8(tensors, architecture, target, asked.device)

    random_weights.write_random(
        asked.folder,
        architecture,
        seed=asked.seed,
        dtype=torch.bfloat16,
        device=asked.device,
        save_transformer=save_fp8 if asked.fp8 else None,
    )
    print(f"wrote {asked.folder} in {time.perf_counter() - begun:.1f} s", flush=True)


def write_fp8(
    tensors: dict[str, torch.Tensor],
    architecture: random_weights.Architecture,
    target: Path,
    device: str,
) -> None:
    """Turn diffusers' bf16 transformer into one fp8 file with BFL's names."""
    shape = architecture.transformer
    pieces: dict[str, list[torch.Tensor]] = {}
    for rule in rules(shape["num_layers"], shape["num_single_layers"]):
        value = tensors[rule.our_name]
        if rule.is_swapped:
            value = torch.cat(value.chunk(2)[::-1])
        pieces.setdefault(rule.their_name, []).append(value)
    made, layers = {}, {}
    for name in list(pieces):
        value = torch.cat(pieces.pop(name))
        if "_blocks." not in name or value.ndim != 2:
            made[name] = value
            continue
        module = name.removesuffix(".weight")
        weight, scale = quantize_fp8(value.to(device))
        made[name], made[f"{module}.weight_scale"] = weight.cpu(), scale.cpu()
        made[f"{module}.input_scale"] = torch.tensor(_INPUT_SCALE)
        layers[module] = {"format": "float8_e4m3fn"}
    notes = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(made, target, metadata={"_quantization_metadata": notes})


if __name__ == "__main__":
    main()
