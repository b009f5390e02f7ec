"""Group normalization with SiLU, biases and residuals, over images in channels_last memory format.

After arXiv 1803.08494, in three kernels that together read an image twice and write it once:
`measure` takes means and squared deviations of each channel, adding a residual on the way where one
is due; `merge` turns them into a factor and a term for each channel; `normalize` applies these and
SiLU. The bias of a convolution is not added by a pass of its own: it moves a channel's mean.

Sums are float32, of differences from a value nearby, and merged in a fixed order (Chan, Golub,
LeVeque 1979): the same picture gives the same bytes, and a large mean costs no digits.

An upsampling convolution leaves its result *phased*, [1, 4 * c, h / 2 + 1, w / 2 + 1], see
`phase_weight`; the kernels read it where it lies.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from app.engine.kernels.triton_check import power_of_two, raise_unrelated

_log = logging.getLogger(__name__)

_TILE = 4096
"""Values that a program holds at once."""
_TILES = 2
"""Tiles that a program of `scale_silu` takes."""
_CHUNKS = 1024
"""The most programs of `measure`: nearly eight for each multiprocessor of an H100."""
_MERGED = 4096
"""Values that a program of `merge` holds at once."""
_WARPS = 4
_TOLERANCE = 0.02
"""The largest relative error at which the kernels count as right: bfloat16 rounds three times."""


@dataclass(slots=True)
class FeatureMap:
    """An image [1, c, h, w] between two layers, with the moments that the next norm needs."""

    data: torch.Tensor
    """As the convolution left it: phased or not, without *bias*."""
    height: int
    width: int
    bias: torch.Tensor | None = None
    """[c], still to be added."""
    moments: torch.Tensor | None = None
    """Float32 [chunks, 2, c]: mean and sum of squared deviations of each chunk's pixels."""

    @property
    def is_phased(self) -> bool:
        """Whether *data* is as an upsampling convolution leaves it, of four rows or more."""
        return self.data.shape[2] != self.height

    @property
    def channels(self) -> int:
        """Return c."""
        return self.data.shape[1] // (4 if self.is_phased else 1)


def phase_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight [4 * o, i, 2, 2] that stands for upsampling and *weight* [o, i, 3, 3].

    Upsampling is to twice the side, nearest neighbour; the large image is never made.

    A pixel in an even row sees rows y/2 - 1 and twice y/2 of the small image, one in an odd row
    (y-1)/2 twice and the next; so the three rows of the weight are two sums, one for each parity.
    With a padding of 1, row i of the result has even row 2 i and odd row 2 i - 1, likewise columns.
    """
    wide = weight.float()
    first, middle, last = wide.unbind(2)
    rows = [torch.stack((first, middle + last), 2), torch.stack((first + middle, last), 2)]
    parts = []
    for row in rows:
        left, centre, right = row.unbind(3)
        parts += [torch.stack((left, centre + right), 3), torch.stack((left + centre, right), 3)]
    return torch.cat(parts).to(weight.dtype)


def unphase(data: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reorder phased *data* [1, 4 * c, height / 2 + 1, width / 2 + 1] to [1, c, height, width]."""
    _, c, rows, columns = data.shape
    parts = data.view(2, 2, c // 4, rows, columns)
    out = data.new_empty((1, c // 4, height, width))
    for y in (0, 1):
        for x in (0, 1):
            out[0, :, y::2, x::2] = parts[y, x, :, y : y + height // 2, x : x + width // 2]
    return out


def measure(image: FeatureMap) -> FeatureMap:
    """Return *image* with its moments."""
    if not image.data.is_cuda:
        return FeatureMap(
            image.data, image.height, image.width, image.bias, _moments(_plain(image))
        )
    moments = _measure(image.data, image, None)
    return FeatureMap(image.data, image.height, image.width, image.bias, moments)


def add(data: torch.Tensor, residual: FeatureMap, bias: torch.Tensor) -> FeatureMap:
    """Return data + residual + bias with its moments, written into *data* on a card.

    *data* is [1, c, h, w]; *bias*, float32 [c], includes the residual's.
    """
    if data.is_cuda:
        moments = _measure(data, residual, bias)
    else:
        total = data.float() + _plain(residual).float() + bias[:, None, None]
        data = total.to(data.dtype)
        moments = _moments(data)
    return FeatureMap(data, residual.height, residual.width, None, moments)


def normalize(
    image: FeatureMap, norm: torch.nn.GroupNorm, *, has_silu: bool = True
) -> torch.Tensor:
    """Return silu(norm(image)), [1, c, h, w]; without *has_silu* the norm alone."""
    assert image.moments is not None
    if image.data.is_cuda:
        return _normalize(image, image.moments, norm, has_silu)
    factor, term = _coefficients(image, image.moments[0], norm)
    out = _plain(image).float() * factor[:, None, None] + term[:, None, None]
    return (functional.silu(out) if has_silu else out).to(image.data.dtype)


@functools.cache
def kernels_fault(device: torch.device) -> str:
    """Say why the kernels cannot be used on *device*; empty where they were tried and are right."""
    if device.type != "cuda":
        return ""
    try:
        # The second time launches what the first has compiled.
        errors = [_trial_error(device) for _ in range(2)]
    # Triton's errors have no common base, and its C compiler's are those of `subprocess`.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("The VAE's kernels do not run here.", exc_info=True)
        return f"they do not run here ({type(failure).__name__})"
    if all(error < _TOLERANCE for error in errors):  # NaN is not
        return ""
    return f"their relative errors are {errors[0]:.2g} and {errors[1]:.2g}"


def _trial_error(device: torch.device) -> float:
    """Return the kernels' relative error after an upsampling, a sum and a norm, in bfloat16."""
    generator, side = torch.Generator().manual_seed(0), 64
    phased = torch.randn(1, 512, side // 2 + 1, side // 2 + 1, generator=generator).bfloat16()
    data = torch.randn(1, 128, side, side, generator=generator).bfloat16()
    norm = torch.nn.GroupNorm(32, 128).requires_grad_(False).bfloat16()
    bias = torch.arange(128) / 128
    made = []
    for place in (torch.device("cpu"), device):
        there, norm = bias.to(place), norm.to(place)
        up, small = (
            each.to(place, memory_format=torch.channels_last, copy=True) for each in (phased, data)
        )
        image = measure(FeatureMap(up, side, side, there))
        total = add(small, FeatureMap(normalize(image, norm), side, side), there)
        made.append(normalize(total, norm).float().cpu())
    return float((made[1] - made[0]).norm() / made[0].norm())


def _plain(image: FeatureMap) -> torch.Tensor:
    if image.is_phased:
        return unphase(image.data, image.height, image.width)
    return image.data


def _moments(data: torch.Tensor) -> torch.Tensor:
    rows = data[0].flatten(1).float()
    mean = rows.mean(1)
    return torch.stack((mean, (rows - mean[:, None]).square().sum(1)))[None]


def _coefficients(
    image: FeatureMap, moments: torch.Tensor, norm: torch.nn.GroupNorm
) -> torch.Tensor:
    """Return factor and term of each channel, float32 [2, c], from *moments* of all pixels."""
    pixels = image.height * image.width
    mean, spread = moments
    pending = torch.zeros_like(mean) if image.bias is None else image.bias
    means = (mean + pending).view(norm.num_groups, -1)
    middle = means.mean(1, keepdim=True)
    between = pixels * (means - middle).square()
    variance = (spread.view_as(means) + between).mean(1, keepdim=True) / pixels
    factor = norm.weight.float() * torch.rsqrt(variance + norm.eps).expand_as(means).flatten()
    term = norm.bias.float() + (pending - middle.expand_as(means).flatten()) * factor
    return torch.stack((factor, term))


def _launch(name: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with *constants* in the order of its parameters.

    What Triton compiled is kept here by dtypes and constants, all that it depends on where tensors
    are aligned, as whole allocations are: looking it up takes Triton most of a launch's 28 us.
    """
    kinds = (each.dtype for each in arguments if isinstance(each, torch.Tensor))
    key = (name, arguments[0].device, *kinds, *constants.values())
    if (compiled := _compiled.get(key)) is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    kernel = getattr(importlib.import_module("app.engine.kernels.group_norm_triton"), name)
    _compiled[key] = kernel[(programs,)](*arguments, **constants, num_warps=_WARPS)


_compiled: dict[tuple[Any, ...], Any] = {}


def _tiling(image: FeatureMap) -> tuple[int, int, int]:
    """Return the columns and rows of a tile, and the pixels of a chunk: four tiles or more."""
    columns = power_of_two(image.channels)
    rows = _TILE // columns
    return columns, rows, rows * max(4, -(-image.height * image.width // (_CHUNKS * rows)))


def _measure(x: torch.Tensor, image: FeatureMap, bias: torch.Tensor | None) -> torch.Tensor:
    channels, pixels = image.channels, image.height * image.width
    columns, rows, chunk = _tiling(image)
    chunks = -(-pixels // chunk)
    moments = torch.empty((chunks, 2, channels), dtype=torch.float32, device=x.device)
    _launch(
        "measure",
        chunks,
        x,
        image.data,
        moments if bias is None else bias,
        moments,
        pixels,
        image.width,
        chunk,
        CHANNELS=channels,
        COLUMNS=columns,
        ROWS=rows,
        ADDS=bias is not None,
        IS_PHASED=image.is_phased,
    )
    return moments


def _normalize(
    image: FeatureMap, moments: torch.Tensor, norm: torch.nn.GroupNorm, has_silu: bool
) -> torch.Tensor:
    channels, pixels = image.channels, image.height * image.width
    columns, rows, chunk = _tiling(image)
    coefficients = torch.empty((2, channels), dtype=torch.float32, device=moments.device)
    group = channels // norm.num_groups
    _launch(
        "merge",
        norm.num_groups,
        moments,
        moments if image.bias is None else image.bias,
        norm.weight,
        norm.bias,
        coefficients,
        pixels,
        chunk,
        moments.shape[0],
        norm.eps,
        CHANNELS=channels,
        GROUP=group,
        COLUMNS=power_of_two(group),
        ROWS=_MERGED // power_of_two(group),
        HAS_BIAS=image.bias is not None,
    )
    out = torch.empty(
        (1, channels, image.height, image.width),
        dtype=image.data.dtype,
        device=image.data.device,
        memory_format=torch.channels_last,
    )
    _launch(
        "scale_silu",
        -(-pixels // (rows * _TILES)),
        image.data,
        coefficients,
        out,
        pixels,
        image.width,
        CHANNELS=channels,
        COLUMNS=columns,
        ROWS=rows,
        TILES=_TILES,
        IS_PHASED=image.is_phased,
        HAS_SILU=has_silu,
    )
    return out
