"""Lower bounds of an image's time on a GPU: its FLOPs divided by the datasheet's peak rates.

Pure arithmetic, no torch, no GPU. A bound is not an estimate: it counts matmuls and convolutions
only, at the peak rate of the tensor cores, and omits memory-bound operations (norms, RoPE, softmax,
quantization). Half the peak rate is a good result on real hardware. A measured time divided by its
bound says how much there is still to gain.

FLOPs follow from the architecture: the transformer's blocks over image and text tokens, the text
encoder's layers that are used over the padded prompt, and the VAE decoder. A multiply-add counts as
two. The blocks' linear layers run at the rate of the chosen precision; attention, text
encoder and VAE decoder at that of bf16.

GeForce rates: the tensor cores of one SM do 512 fp16 multiply-adds per clock with fp16
accumulation, half of that with fp32 accumulation (as bf16 has), and twice the 512 with int8; fp8
with fp32 accumulation, the only kind that PyTorch uses, is as fast as fp16 with fp16. Clocks are
the published boost clocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.engine.models.entry import Architecture
from app.engine.quantization.formats import FORMATS

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GpuDatasheet:
    """A GPU's datasheet; rates are dense, in FLOP/s (for int8, OP/s)."""

    key: str
    """The value of `--card`, such as `rtx-3060`."""
    name: str
    """NVML's product name."""
    memory_bytes: int
    """Total memory, near enough to NVML's figure to tell variants of one name apart."""
    capability: tuple[int, int]
    bandwidth_bytes_s: float
    bf16: float
    int8: float
    fp8: float | None
    """None where the tensor cores do not support fp8."""
    sms: int
    clock_ghz: float

    def linear_rate(self, precision: str) -> float | None:
        """Return the rate of the blocks' linear layers in FLOP/s; None for an unknown precision.

        On a GPU without fp8, fp8 weights are multiplied in bf16.
        """
        known = FORMATS.get(precision)
        if known is None or known.rate is None:
            return None
        return float(getattr(self, known.rate) or self.bf16)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one image by stage.

    *linears* are the linear layers of the transformer's blocks; *rest* is attention, embedders and
    modulation.
    """

    text: float
    linears: float
    rest: float
    decode: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Lower bounds of an image's time in seconds, by stage."""

    text_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return self.text_s + self.denoise_s + self.decode_s


def roofline(
    architecture: Architecture,
    gpu: GpuDatasheet,
    precision: str,
    width: int,
    height: int,
    steps: int,
    *,
    references: int = 0,
    branches: int = 1,
) -> Roofline | None:
    """Compute the lower bound of one image; None where *precision* has no rate in the table.

    *references* have the output's size; *branches* is 2 where classifier-free guidance runs the
    transformer twice a step.
    """
    if (rate := gpu.linear_rate(precision)) is None:
        return None
    work = picture_work(
        architecture, width, height, steps, references=references, branches=branches
    )
    return Roofline(
        text_s=work.text / gpu.bf16,
        denoise_s=work.linears / rate + work.rest / gpu.bf16,
        decode_s=work.decode / gpu.bf16,
    )


def picture_work(
    architecture: Architecture,
    width: int,
    height: int,
    steps: int,
    *,
    references: int = 0,
    branches: int = 1,
) -> Work:
    """Count the FLOPs of one image of *width* x *height* pixels."""
    token, latent = architecture.token_side, architecture.latent_side
    tokens = (width // token) * (height // token) * (1 + references)
    linears, rest = _transformer(architecture, tokens)
    passes = steps * branches
    return Work(
        text=_text(architecture) * branches,
        linears=linears * passes,
        rest=rest * passes,
        decode=_decode(architecture, (width // latent) * (height // latent)),
    )


def _transformer(architecture: Architecture, image_tokens: int) -> tuple[float, float]:
    """Count the FLOPs of a forward pass: the blocks' linear layers, and everything else."""
    width, mlp, prompt = architecture.width, architecture.mlp_width, architecture.prompt_tokens
    double, single = architecture.double_blocks, architecture.single_blocks
    tokens = image_tokens + prompt
    block = 4 * width * width + 3 * width * mlp  # q, k, v, out; gate, up and down
    fused = width * (3 * width + 2 * mlp) + (width + mlp) * width
    linears = 2 * tokens * (double * block + single * fused)
    attention = 4 * tokens * tokens * width * (double + single)
    channels = 4 * architecture.latent_channels
    joint = len(architecture.text_layers) * architecture.text_width
    embedders = 2 * (2 * channels * width * image_tokens + joint * width * prompt)
    timestep = architecture.timestep_channels * width + width * width
    modulation = 2 * (2 * 6 * width * width + 5 * width * width + timestep)
    return float(linears), float(attention + embedders + modulation)


def _text(architecture: Architecture) -> float:
    """Count the FLOPs of the text encoder's layers that are used, over the padded prompt."""
    width, prompt = architecture.text_width, architecture.prompt_tokens
    queries, keys = architecture.text_query_width, architecture.text_key_width
    layer = 2 * width * queries + 2 * width * keys + 3 * width * architecture.text_mlp_width
    each = 2 * layer * prompt + 4 * prompt * prompt * queries
    return float(architecture.text_layers[-1] * each)


def _decode(architecture: Architecture, latents: int) -> float:
    """Count the FLOPs of the VAE decoder for *latents* positions, upsampled by 2 three times."""
    levels, channels = architecture.decoder_widths, architecture.latent_channels
    top = levels[0]
    work = _convolution(channels, channels, latents, 1) + _convolution(channels, top, latents)
    work += 2 * _residual(top, top, latents)
    work += 2 * 4 * top * top * latents + 4 * latents * latents * top
    positions, before = latents, top
    for level, width in enumerate(levels):
        for _ in range(architecture.decoder_blocks):
            work += _residual(before, width, positions)
            before = width
        if level < len(levels) - 1:
            positions *= 4
            work += _convolution(width, width, positions)
    return float(work + _convolution(levels[-1], 3, positions))


def _convolution(inputs: int, outputs: int, positions: int, kernel: int = 3) -> int:
    return 2 * inputs * outputs * kernel * kernel * positions


def _residual(inputs: int, outputs: int, positions: int) -> int:
    shortcut = _convolution(inputs, outputs, positions, 1) if inputs != outputs else 0
    return (
        _convolution(inputs, outputs, positions)
        + _convolution(outputs, outputs, positions)
        + shortcut
    )


def _geforce(
    model: str, sms: int, clock_ghz: float, gib: int, gb_s: float, capability: tuple[int, int]
) -> GpuDatasheet:
    """Derive a GPU's rates from its SM count and its boost clock."""
    fp16 = sms * 512 * 2 * clock_ghz * 1e9
    return GpuDatasheet(
        key=f"rtx-{model.lower().replace(' ', '-')}",
        name=f"NVIDIA GeForce RTX {model}",
        memory_bytes=gib * 1024 * _MIB,
        capability=capability,
        bandwidth_bytes_s=gb_s * 1e9,
        bf16=fp16 / 2,
        int8=fp16 * 2,
        fp8=fp16 if capability >= (8, 9) else None,
        sms=sms,
        clock_ghz=clock_ghz,
    )


GPUS: tuple[GpuDatasheet, ...] = (
    _geforce("3060", 28, 1.777, 12, 360, (8, 6)),
    _geforce("3060 Ti", 38, 1.665, 8, 448, (8, 6)),
    _geforce("3070", 46, 1.725, 8, 448, (8, 6)),
    _geforce("3080", 68, 1.710, 10, 760, (8, 6)),
    _geforce("3090", 82, 1.695, 24, 936, (8, 6)),
    _geforce("4060", 24, 2.460, 8, 272, (8, 9)),
    _geforce("4060 Ti", 34, 2.535, 16, 288, (8, 9)),
    _geforce("4070", 46, 2.475, 12, 504, (8, 9)),
    _geforce("4070 Ti", 60, 2.610, 12, 504, (8, 9)),
    _geforce("4080", 76, 2.505, 16, 717, (8, 9)),
    _geforce("4090", 128, 2.520, 24, 1008, (8, 9)),
    _geforce("5060 Ti", 36, 2.572, 16, 448, (12, 0)),
    _geforce("5070", 48, 2.512, 12, 672, (12, 0)),
    _geforce("5090", 170, 2.407, 32, 1792, (12, 0)),
    GpuDatasheet(
        key="h200",
        name="NVIDIA H200",
        memory_bytes=143_771 * _MIB,
        capability=(9, 0),
        bandwidth_bytes_s=4.8e12,
        bf16=989e12,
        int8=1979e12,
        fp8=1979e12,
        sms=132,
        clock_ghz=1.980,
    ),
)
"""GPUs by compute capability and size; the last is the one that the project measures on."""


def find_gpu(key: str) -> GpuDatasheet | None:
    """Look up a GPU by key, ignoring case, dashes, vendor and memory size."""
    wanted = _plain(key)
    return next((gpu for gpu in GPUS if _plain(gpu.key) == wanted), None)


def recognise(name: str, total_bytes: int) -> GpuDatasheet | None:
    """Find the GPU that NVML calls *name*; None where the table does not have it.

    The memory must agree within 5 %, since different chips are sold under one name.
    """
    return next(
        (
            gpu
            for gpu in GPUS
            if gpu.name == name and abs(total_bytes - gpu.memory_bytes) <= 0.05 * gpu.memory_bytes
        ),
        None,
    )


def _plain(text: str) -> str:
    plain = "".join(letter for letter in text.lower() if letter.isalnum())
    return re.sub("^(nvidia)?(geforce)?|(8|10|12|16|24|32)gb$", "", plain)
