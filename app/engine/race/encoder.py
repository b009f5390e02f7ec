"""Which of the text encoder's two layers runs on a GPU: tried with random weights of its own size.

Whether our layer is right is tried at each load, in less than a tenth of a second, once Triton's
kernels are compiled, and with 300 MB. Both are timed once for a card and its versions, and the
times are kept as the race's are (`app.engine.race.kept`): the layers round at other places, so a
seed's pixels must not depend on how long they took at a start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.engine.kernels.triton_check import raise_unrelated, triton_fault
from app.engine.modules.attention import relative_error
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer, settled
from app.engine.quantization.formats import WeightFormat
from app.engine.race.kept import CARD, forget_race, race_once
from app.engine.race.measure import card_key, gpu_seconds, warm
from app.engine.race.results import Lap, Results

_log = logging.getLogger(__name__)

_EPS = 1e-6
_MARGIN = 0.95
"""Of the plain layer's time, what the other may take: it has to be worth other last bits."""
_TOLERANCE = 0.02
"""Between two layers that round to bf16 at other places."""
_TURNS = 3


@torch.no_grad()
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
    times are kept in the folder *cache*, if there is one.
    """
    is_possible = device.type == "cuda" and linears.name == "int8w"
    if not is_possible or not WideEncoderLayer.fits(tokens, shapes) or triton_fault():
        return EncoderLayer
    try:
        plain, wide = _trials(linears, shapes, head_size, tokens, device)
        error = relative_error(settled(wide()), plain())
    # Triton's errors have no common base.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("The text encoder's own kernels do not run here.", exc_info=True)
        return EncoderLayer
    if not error < _TOLERANCE:  # NaN too
        _log.warning("The text encoder's own kernels are wrong here, by %.1e.", error)
        return EncoderLayer
    hold = partial(_hold, device, plain, wide)
    key = _key(device, layer=f"{tokens} {dict(shapes)}")
    results = hold() if cache is None else race_once(cache, key, hold)
    plain_s, wide_s = (lap.seconds or 0.0 for lap in results.linears)
    wins = wide_s < _MARGIN * plain_s
    _log.info(
        "A layer of the text encoder takes %.2f ms, %.2f ms in int8 with an error of %.1e: %s.",
        1e3 * plain_s,
        1e3 * wide_s,
        error,
        "int8" if wins else "bf16",
    )
    return WideEncoderLayer if wins else EncoderLayer


def forget(device: torch.device, cache: Path) -> None:
    """Let the layers be timed anew at the next load."""
    forget_race(cache, _key(device))


def _trials(
    linears: WeightFormat,
    shapes: Mapping[str, tuple[int, int]],
    head_size: int,
    tokens: int,
    device: torch.device,
) -> list[Callable[[], Any]]:
    """Return a call of the plain layer and one of the other, with the same weights and inputs."""
    linear_layers, norms, inputs = _draw(linears, shapes, head_size, tokens, device)
    return [
        partial(kind(linear_layers, norms, eps=_EPS), *inputs)
        for kind in (EncoderLayer, WideEncoderLayer)
    ]


def _hold(device: torch.device, plain: Callable[[], Any], wide: Callable[[], Any]) -> Results:
    """Time both layers by turns and take the least of each: others may use the card meanwhile."""
    warm(device)
    turns = [[gpu_seconds(run, []) for run in (plain, wide)] for _ in range(_TURNS)]
    plain_s, wide_s = map(min, zip(*turns, strict=True))
    laps = Lap("bf16", plain_s), Lap("int8", wide_s)
    return Results(torch.cuda.get_device_capability(device), laps, ())


def _key(device: torch.device, **facts: str) -> dict[str, str]:
    key = card_key(device, **facts)
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
