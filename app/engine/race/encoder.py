"""Which of the text encoder's two layers runs on a GPU: tried with random weights of its own size.

It takes a tenth of a second, once Triton's kernels are compiled, and 300 MB. The result is kept, as
the race is (`app.engine.race.kept`): the layers round at other places, so a seed's pixels must not
depend on how they were timed at a start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from app.engine.kernels.triton_check import raise_unrelated, triton_fault
from app.engine.modules.attention import relative_error
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer, settled
from app.engine.quantization.formats import WeightFormat
from app.engine.race.kept import CARD, race_once
from app.engine.race.measure import card_key, gpu_seconds, is_spread
from app.engine.race.results import Lap, Results, settle, wrong

_log = logging.getLogger(__name__)

_EPS = 1e-6
_MARGIN = 0.95
"""Of the plain layer's time: equal ones are no reason for other bits."""
_TOLERANCE = 0.02
"""Between two layers that round to bf16 at other places."""


def choose_layer(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
    cache: Path | None,
) -> type[EncoderLayer]:
    """Return the layer that is right and fastest for linear layers of *shapes*, [out, in].

    *shapes* has `qkv`, `out`, `up` and `down`; *tokens* is a prompt's length with its padding. The
    result is kept in the folder *cache*, if there is one.
    """
    is_possible = device.type == "cuda" and linears.name == "int8w"
    if not is_possible or not WideEncoderLayer.fits(tokens, shapes) or triton_fault():
        return EncoderLayer
    hold = partial(
        settle, partial(_hold, linears, shapes, head_size, tokens, device), wait=lambda: None
    )
    try:
        results = hold() if cache is None else race_once(cache, _key(device, shapes, tokens), hold)
    # Triton's errors have no common base.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("The text encoder's own kernels do not run here.", exc_info=True)
        return EncoderLayer
    return WideEncoderLayer if _wins(results) else EncoderLayer


@torch.no_grad()
def _hold(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
) -> Results:
    """Time both layers, the plain one first; the error is that of the other against it."""
    linear_layers, norms, inputs = _draw(linears, shapes, head_size, tokens, device)
    runs = [
        partial(kind(linear_layers, norms, eps=_EPS), *inputs)
        for kind in (EncoderLayer, WideEncoderLayer)
    ]
    error = relative_error(settled(runs[1]()), runs[0]())
    spreads: list[float] = []
    plain_s, wide_s = (gpu_seconds(run, spreads) for run in runs)
    _log.info(
        "A layer of the text encoder takes %.2f ms, %.2f ms in int8 with an error of %.1e.",
        1e3 * plain_s,
        1e3 * wide_s,
        error,
    )
    laps = Lap("plain", plain_s), Lap("int8 in two terms", wide_s, error, _TOLERANCE)
    capability = torch.cuda.get_device_capability(device)
    return Results(capability, laps, (), disturbed=is_spread(spreads))


def _wins(results: Results) -> bool:
    """Return whether the layer in int8 is right, and faster where the times decide anything."""
    plain, wide = results.linears
    if wrong(wide) or plain.seconds is None or wide.seconds is None:
        return False
    return bool(results.disturbed) or wide.seconds < _MARGIN * plain.seconds


def _key(
    device: torch.device, shapes: Mapping[str, tuple[int, int]], tokens: int
) -> dict[str, str]:
    key = card_key(device, layer=f"{tokens} {dict(shapes)}")
    return key | {CARD: f"{key[CARD]} text encoder"}


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
