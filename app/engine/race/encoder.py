"""Which of the text encoder's two layers runs on a GPU: tried with random weights of its own size.

It takes a tenth of a second at each load, once Triton's kernels are compiled, and 300 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from app.engine.kernels.triton_check import raise_unrelated, triton_fault
from app.engine.modules.attention import relative_error
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer, settled
from app.engine.quantization.formats import WeightFormat
from app.engine.race.measure import gpu_seconds

_log = logging.getLogger(__name__)

_EPS = 1e-6
_MARGIN = 0.95
"""Of the plain layer's time: equal ones must not change places, and bits, from start to start."""
_TOLERANCE = 0.02
"""Between two layers that round to bf16 at other places."""


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
    try:
        linear_layers, norms, inputs = _draw(linears, shapes, head_size, tokens, device)
        runs = [
            partial(kind(linear_layers, norms, eps=_EPS), *inputs)
            for kind in (EncoderLayer, WideEncoderLayer)
        ]
        error = relative_error(settled(runs[1]()), runs[0]())
        plain_s, wide_s = map(gpu_seconds, runs)
    # Triton's errors have no common base.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("The text encoder's own kernels do not run here.", exc_info=True)
        return EncoderLayer
    _log.info(
        "A layer of the text encoder takes %.2f ms, %.2f ms in int8 with an error of %.1e.",
        1e3 * plain_s,
        1e3 * wide_s,
        error,
    )
    wins = wide_s < _MARGIN * plain_s
    return WideEncoderLayer if error < _TOLERANCE and wins else EncoderLayer


def _draw(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter], list[torch.Tensor]]:
    """Draw a layer's weights, its norms' ones, and its inputs, with a mask of a short prompt."""
    generator = torch.Generator(device).manual_seed(0)
    make, width = linears.layers().make, shapes["qkv"][1]

    def weight(rows: int, columns: int) -> nn.Module:
        values = torch.randint(
            -127, 128, (rows, columns), dtype=torch.int8, generator=generator, device=device
        )
        return make(values, torch.full((rows,), 0.01 / columns**0.5, device=device))

    def ones(length: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(length, device=device, dtype=torch.bfloat16), False)

    def draw(columns: int) -> torch.Tensor:
        return torch.randn(1, tokens, columns, generator=generator, device=device).bfloat16()

    half = draw(head_size // 2)
    angles = torch.cat([half, half], dim=-1)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    mask[..., tokens // 8 :] = False
    return (
        {name: weight(*shape) for name, shape in shapes.items()},
        {"in": ones(width), "post": ones(width), "q": ones(head_size), "k": ones(head_size)},
        [draw(width), mask, angles.cos(), angles.sin()],
    )
