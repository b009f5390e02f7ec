"""Training of the autoencoder, and the statistics of its latents.

The encoder's answer is its mean; what the decoder sees in training is that mean with some noise,
and the mean is held near unit size: so the decoder forgives small errors that a velocity leaves.
The posterior's width is fixed at that noise, and the weights that would vary it stay zero.

Twelve of the sixteen channels are drawn towards plain averages of the picture: the colours of the
four 4x4 blocks under each latent. Left to itself the encoder finds colour last, and a first
training that stopped before it did drew every object gray (20 dB); anchored, colour is there from
the start, and the flow learns latents that are nearly pixels.
"""

import logging
import math
import random
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

from tools.shapes.draw import render
from tools.shapes.feed import Crate, Order, Packers
from tools.shapes.fitting import Batch, FlatWeights, LossFunction, RunningFigures, Stepper
from tools.shapes.linear_start import ANCHORED, anchors
from tools.shapes.nets import LATENT_CHANNELS, TOKEN_PIXELS, patchify

_log = logging.getLogger(__name__)

_NOISE = 0.2
_HOLD = 1e-3
_RATE = 2e-3
# rows, columns, pictures in a batch, share of the steps
_SHAPES = (
    (8, 8, 64, 0.5),
    (16, 16, 24, 0.3),
    (8, 16, 48, 0.08),
    (16, 8, 48, 0.04),
    (32, 32, 6, 0.08),
)


@dataclass(frozen=True)
class Pace:
    """How long a training may take, and how much smaller than full its batches are."""

    seconds: float
    shrink: int = 1


def train_codec(
    codec: AutoencoderKLFlux2, packers: Packers, pace: Pace, device: torch.device
) -> dict[str, float]:
    """Train until the time is over, then set the weights' average and the latents' statistics."""
    codec.to(device).train()
    torch.backends.cudnn.benchmark = True
    _fix_posterior(codec)
    weights = FlatWeights(codec.parameters(), device)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    steppers = [Stepper(weights, _loss_of(codec), pool=pool) for _ in _SHAPES]
    rng, figures, started = random.Random(1), RunningFigures(), time.monotonic()
    step, told = 0, started
    crates = [_Pictures(packers, rows, columns) for rows, columns, _, _ in _SHAPES]
    while (passed := (time.monotonic() - started) / pace.seconds) < 1:
        which = rng.choices(range(len(_SHAPES)), [share for *_, share in _SHAPES])[0]
        count = max(1, _SHAPES[which][2] // pace.shrink)
        rate = _RATE * pace.shrink**-0.5 * min(1, step / 100)
        weights.rate.fill_(rate * 0.5 * (1 + math.cos(math.pi * passed)))
        weights.set_averaging(step, 300)
        figures.add(steppers[which].step({"images": crates[which].images(count, device)}))
        step += 1
        if time.monotonic() - told > 8:
            told = time.monotonic()
            loss, difference, size, norm = figures.take()
            _log.info(
                "codec step %d: loss %.4f, mean square error %.2e, latent size %.2f, gradient %.2f",
                *(step, loss, difference, size, norm),
            )
    weights.settle()
    codec.eval()
    torch.backends.cudnn.benchmark = False
    _measure_latents(codec, packers, device, 2048 // pace.shrink)
    return {"codec_steps": step, "codec_psnr_db": _quality(codec, packers, device, pace)}


class _Pictures:
    """Endless pictures of one size, half of them out of place and in colours without a name."""

    def __init__(self, packers: Packers, rows: int, columns: int) -> None:
        self._packers, self._rows, self._columns = packers, rows, columns
        self._crate: tuple[Tensor, Tensor] | None = None
        self._seed = 7_000_000 + rows * 100_000 + columns * 1_000
        self._uses = 0

    def images(self, count: int, device: torch.device) -> Tensor:
        """A batch, drawn on the device."""
        if self._crate is None or self._uses >= 40:
            self._packers.ask(Order(self._rows, self._columns, 512, self._seed))
            self._crate = on_device(self._packers.take(), device)
            self._seed, self._uses = self._seed + 1, 0
        self._uses += 1
        marks, backgrounds = self._crate
        chosen = torch.randint(len(marks), (count,), device=device)
        marks, background = marks[chosen, 0].clone(), backgrounds[chosen, 0]
        odd = torch.rand(count, 1, 1, device=device) < 0.5
        marks[..., 1:3] += odd * 20 * torch.randn(count, 1, 2, device=device)
        colours = torch.rand(count, 3, 3, device=device)
        marks[..., 4:7] = torch.where(odd, colours[:, :2], marks[..., 4:7])
        background = torch.where(odd[:, 0], colours[:, 2], background)
        pixels = (self._columns * TOKEN_PIXELS, self._rows * TOKEN_PIXELS)
        return render(marks, background, *pixels)[0]


def on_device(crate: Crate, device: torch.device) -> tuple[Tensor, Tensor]:
    """A crate's marks and backgrounds as tensors."""
    return torch.from_numpy(crate.marks).to(device), torch.from_numpy(crate.backgrounds).to(device)


def _fix_posterior(codec: AutoencoderKLFlux2) -> None:
    with torch.no_grad():
        codec.quant_conv.weight[LATENT_CHANNELS:] = 0
        codec.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(_NOISE)


def _loss_of(codec: AutoencoderKLFlux2) -> LossFunction:
    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        wanted = batch["images"] * 2 - 1
        # On a processor convolutions run several times faster with channels last.
        pictures = wanted.to(codec.dtype, memory_format=torch.channels_last)
        mean = codec._encode(pictures)[:, :LATENT_CHANNELS]
        seen = mean + _NOISE * torch.randn_like(mean)
        found = codec._decode(seen, return_dict=False)[0].float()
        absolute = (found - wanted).abs().mean()
        square = F.mse_loss(found, wanted)
        edges = sum(
            (found.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (-1, -2)
        )
        size = mean.float().square().mean()
        astray = F.mse_loss(mean[:, :ANCHORED].float(), anchors(wanted))
        total = absolute + square + edges + astray + _HOLD * size
        return total, torch.stack((total, square / 4, size))

    return loss


@torch.no_grad()
def _measure_latents(
    codec: AutoencoderKLFlux2, packers: Packers, device: torch.device, count: int
) -> None:
    """Set the batch norm's statistics from the latents of ordinary scenes."""
    found = []
    for index, (rows, columns) in enumerate(((16, 16), (16, 16), (8, 8), (12, 20), (20, 12))):
        packers.ask(Order(rows, columns, max(8, count // 4), 9_000_000 + index))
        for images in ordinary_images(packers.take(), device):
            patches = patchify(codec.encode(images * 2 - 1).latent_dist.mode().float())
            found.append(patches.transpose(0, 1).flatten(1))
    joined = torch.cat(found, dim=1)
    codec.bn.running_mean.copy_(joined.mean(1))
    codec.bn.running_var.copy_(joined.var(1))
    codec.bn.num_batches_tracked.fill_(len(found))


def ordinary_images(crate: Crate, device: torch.device, at_once: int = 64) -> list[Tensor]:
    """A crate's first pictures, drawn as they are, in batches."""
    marks, backgrounds = on_device(crate, device)
    pixels = (crate.order.columns * TOKEN_PIXELS, crate.order.rows * TOKEN_PIXELS)
    return [
        render(marks[at : at + at_once, 0], backgrounds[at : at + at_once, 0], *pixels)[0]
        for at in range(0, len(marks), at_once)
    ]


@torch.no_grad()
def _quality(
    codec: AutoencoderKLFlux2, packers: Packers, device: torch.device, pace: Pace
) -> float:
    packers.ask(Order(16, 16, max(8, 128 // pace.shrink), 9_100_000))
    errors = []
    for images in ordinary_images(packers.take(), device):
        again = codec.decode(codec.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        errors.append(F.mse_loss(again.clamp(0, 1), images))
    return float(-10 * torch.stack(errors).mean().log10())
