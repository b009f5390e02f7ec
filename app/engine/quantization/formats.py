"""The registry of weight formats: `FORMATS`, from a format's name to all that sets it apart.

A format says how its layers are made, kept in the cache and counted in memory, where they run, and
what the operator calls it. Adding one means one entry here, and its layer beside the others in
`app.engine.quantization.linear`.

Nothing here imports torch before a layer is made: the HTTP process and `klein --help` read the
names, and neither may wait for torch. So an entry is plain data, and the functions that make its
layers import what they need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from app.errors import StartupError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from app.engine.checkpoint.files import QuantizedLayer
    from app.engine.models.entry import Architecture

AUTO = "auto"
"""The value of `KLEIN_PRECISION` that leaves the choice to the GPU and its probes."""


@dataclass(frozen=True, slots=True)
class Layers:
    """How a format's linear layers are made; a weight is [out, in]."""

    make: Callable[..., nn.Module]
    """Makes a layer from the tensors of a quantized weight, as `quantize` returns them."""
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None
    """Quantizes a weight of full precision; None where it is only converted to another dtype."""
    take: Callable[[QuantizedLayer, torch.device], nn.Module] | None = None
    """Makes a layer from a file's own fp8 weight; None where that is restored and quantized."""
    cached: tuple[str, ...] = ("weight", "scale")
    """The layer's attributes that the cache stores, in the order of `make`'s arguments."""
    fused: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]] | None = None
    """Computes a layer at its cost in our blocks' kernels; None where that is the layer's own."""


def _layers(kind: str) -> Layers:
    """Import torch and return the layers that the formats below are made of."""
    from app.engine.quantization import linear

    return {
        "plain": Layers(linear.plain_linear, cached=()),
        "fp8": Layers(
            linear.Fp8Linear, linear.quantize_fp8, linear.take_fp8, fused=linear.fused_fp8
        ),
        "fp8w": Layers(linear.WeightOnlyLinear, linear.quantize_fp8, linear.take_fp8_weight),
        "int8": Layers(linear.int8_linear, linear.quantize_rotated),
        "int8w": Layers(linear.WeightOnlyLinear, linear.quantize_int8),
    }[kind]


_plain = partial(_layers, "plain")


def _missing_kitchen() -> str:
    from app.engine.quantization.int8_kernel import why_missing

    return why_missing()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One format of the weights of a network's large linear layers."""

    name: str
    layers: Callable[[], Layers] = _plain
    """Imports torch and says how the layers are made."""
    weight_bytes: float
    """Bytes of one weight in GPU memory."""
    is_choice: bool = True
    """Whether `KLEIN_PRECISION` may name it."""
    is_exact: bool = False
    """Whether the libraries' own modules run, instead of fused blocks of these layers."""
    dtype: str = "bfloat16"
    """torch's name of the dtype of everything that is not quantized."""
    encoder: str = "int8w"
    """The format of the text encoder's layers."""
    file: str = "bf16"
    """The transformer's file, a key of `ModelEntry.transformers`."""
    also_from: str = ""
    """The file that `auto` takes instead where it is there and *file* is not; both errors add."""
    rate: str | None = "bf16"
    """The field of `roofline.GpuDatasheet` with its matmul's rate; None where there is none."""
    kernel: str = "PyTorch"
    """Whose matmul runs, in messages."""
    missing: Callable[[], str] = str
    """Says what the kernel needs and is not installed; empty where nothing is missing."""
    package: str = ""
    """What pip installs for the kernel."""
    must_win: bool = False
    """Whether the probe also has to find it faster than bf16."""
    max_error: float = 0.04
    """The largest relative error of a heavy-tailed product at which a race admits it."""
    substitute: str | None = None
    """The format that takes its place on a GPU that does not run its kernel."""
    reason: str | None = None
    """Why `auto` takes it where its probe passed, with the compute capability's numbers {0} and
    {1}; None where it is chosen by name only."""
    oldest: tuple[int, int] = (8, 0)
    """The compute capability from which on its kernel usually runs."""

    def build(self, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
        """Make the layer of a *weight* of full precision; without quantization it gets *dtype*."""
        layers = self.layers()
        tensors = (weight.to(dtype),) if layers.quantize is None else layers.quantize(weight)
        return layers.make(*tensors).to(weight.device)

    def instead(self, asked: str) -> str:
        """Return the file that may take the place of `file`; none where *asked* names a format."""
        return self.also_from if asked == AUTO else ""

    def fault(self, device: torch.device, architecture: Architecture) -> str:
        """Say why it does not run on *device*; return an empty string where it does.

        Where it must win against bf16, it is timed at the widest matmul of *architecture*.
        """
        from app.engine.quantization.probe import kernel_fault

        return self.missing() or kernel_fault(self, device, architecture)


FORMATS: dict[str, WeightFormat] = {
    each.name: each
    for each in (
        WeightFormat(
            name="fp8",
            layers=partial(_layers, "fp8"),
            weight_bytes=1,
            file="fp8",
            rate="fp8",
            substitute="fp8w",
            reason="sm_{0}{1} multiplies in fp8, and the probe agreed with bf16",
            oldest=(8, 9),
        ),
        WeightFormat(
            name="int8",
            layers=partial(_layers, "int8"),
            weight_bytes=1,
            rate="int8",
            kernel="comfy-kitchen",
            missing=_missing_kitchen,
            package="comfy-kitchen==0.2.40",
            also_from="fp8",
            must_win=True,
            reason="the card multiplies in int8 faster than in bf16; fp8 it does not know",
        ),
        WeightFormat(name="bf16", weight_bytes=2, is_exact=True),
        WeightFormat(name="fp32", weight_bytes=4, is_exact=True, dtype="float32", rate=None),
        WeightFormat(
            name="fp8w",
            layers=partial(_layers, "fp8w"),
            weight_bytes=1,
            is_choice=False,
            file="fp8",
        ),
        WeightFormat(
            name="int8w", layers=partial(_layers, "int8w"), weight_bytes=1, is_choice=False
        ),
        WeightFormat(name="plain", weight_bytes=2, is_choice=False),
    )
}
"""All formats by name, those that `auto` prefers first."""


def choices() -> tuple[str, ...]:
    """Return the values of `KLEIN_PRECISION`."""
    return (AUTO, *(name for name, each in FORMATS.items() if each.is_choice))


def automatic() -> tuple[WeightFormat, ...]:
    """Return the formats that `auto` chooses from, the preferred first; each needs its probe."""
    return tuple(each for each in FORMATS.values() if each.reason is not None)


def check_choice(asked: str, *also: str) -> None:
    """Check a value of `KLEIN_PRECISION`.

    Raises:
        StartupError: it is none of `choices`, nor of *also*; the message lists them.
    """
    names = (*choices(), *also)
    *others, last = map(repr, names)
    if asked not in names:
        raise StartupError(
            "KLEIN_PRECISION has a value that does not fit: Input should be "
            f"{', '.join(others)} or {last}. Correct it and start again."
        )
