"""Which of the text encoder's two layers runs on a GPU: tried with random weights of its own size.

It takes a few tenths of a second at each load, once Triton's kernels are compiled, and 300 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from app.engine.kernels.triton_check import triton_fault
from app.engine.modules.attention import TOLERANCE, relative_error
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer
from app.engine.quantization.formats import WeightFormat
from app.engine.race.measure import gpu_seconds

_log = logging.getLogger(__name__)


@torch.no_grad()
def choose_layer(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
) -> type[EncoderLayer]:
    """Return the layer that is right and fastest for linear layers of *shapes*, [out, in].

    *shapes* has `qkv`, `out`, `up` and `down`; *tokens* is a prompt's length with its padding.
    """
    is_possible = device.type == "cuda" and linears.name == "int8w"
    if not is_possible or not WideEncoderLayer.fits(tokens, shapes) or triton_fault():
        return EncoderLayer
    run = partial(_run, linears, shapes, head_size, tokens, device)
    try:
        (plain, plain_s), (wide, wide_s) = run(EncoderLayer), run(WideEncoderLayer)
    # Triton's errors have no common base.
    except Exception:
        _log.warning("The text encoder's own kernels do not run here.", exc_info=True)
        return EncoderLayer
    finally:
        torch.cuda.empty_cache()
    error = relative_error(wide, plain)
    _log.info(
        "A layer of the text encoder takes %.2f ms, %.2f ms in int8 with an error of %.1e.",
        1e3 * plain_s,
        1e3 * wide_s,
        error,
    )
    return WideEncoderLayer if error < TOLERANCE and wide_s < plain_s else EncoderLayer


def _run(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
    kind: type[EncoderLayer],
) -> tuple[torch.Tensor, float]:
    """Return the output of a layer of *kind* and its seconds; the same weights each time."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def ones(width: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(width, device=device, dtype=torch.bfloat16), False)

    layer = kind(
        {
            name: linears.build(draw(*shape) / shape[1] ** 0.5, torch.bfloat16)
            for name, shape in shapes.items()
        },
        {"in": ones(shapes["qkv"][1]), "post": ones(shapes["qkv"][1])}
        | {"q": ones(head_size), "k": ones(head_size)},
        eps=1e-6,
    )
    hidden, angle = draw(1, tokens, shapes["qkv"][1]).bfloat16(), draw(1, tokens, head_size // 2)
    angles = torch.cat([angle, angle], dim=-1).bfloat16()
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    mask[..., tokens // 8 :] = False
    run = partial(layer, hidden, mask, angles.cos(), angles.sin())
    return run(), gpu_seconds(run)
