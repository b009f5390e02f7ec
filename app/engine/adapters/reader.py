"""Reads an adapter file of any layout into branches of diffusers' modules; every key is used.

Low-rank adapters (LoRA, arXiv 2106.09685) add scale * (x A^T) B^T to a layer's output, Kronecker
adapters (LoKr, arXiv 2309.14859) scale * x (W1 (x) W2)^T, W1 and W2 perhaps products themselves.
The scale is alpha / rank, where alpha is a tensor of the layer or stands in PEFT's config in the
file's metadata; without either it is the rank. Files are untrusted: names, shapes and sizes are checked
before a weight is read, and what cannot be used completely is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from app.engine.adapters.names import Key, Refused, Target, other_model, parse
from app.engine.checkpoint.safetensors_header import HeaderError, parse_json
from app.engine.checkpoint.safetensors_io import SafetensorsFile, Tensor
from app.errors import StartupError

MAX_BYTES = 4_000_000_000
"""The largest file that is read."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALPHA_LIMIT = 1e6
_SHOWN = 80

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] of the weight of each linear layer of the transformer, by diffusers' module."""


class AdapterRefused(Exception):
    """The file cannot be used; the message is a sentence that names the file and says why."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A branch scale * (x A^T) B^T: *down* is A, [rank, in], *up* is B, [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Kronecker:
    """A branch scale * x (left (x) right)^T, of whose outputs *rows* are taken, in this order.

    *left* is [a, b] and *right* [c, d], where b * d is the layer's number of inputs.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    rows: tuple[slice, ...]


Branch = LowRank | Kronecker


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in canonical form: one branch for each module, by diffusers' names."""

    branches: Mapping[str, Branch]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a file: its tensors by the names that `names.parse` gives them."""

    name: str
    target: Target
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """The rank of a low-rank branch; 0 of any other."""
        return self.tensors["down"].shape[0] if "down" in self.tensors else 0


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An open file whose names and shapes fit the model; `read` reads its weights."""

    file: SafetensorsFile
    layers: tuple[Layer, ...]
    scale_of: Callable[[Layer], float] = field(repr=False)

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank for each module; modules of one fused layer share theirs."""
        return {name: each.rank for each in self.layers for name in each.target.modules}

    def read(self) -> Adapter:
        """Read every weight.

        Raises:
            AdapterRefused: a value is not finite, or alpha is no number that can be one.
        """
        branches: dict[str, Branch] = {}
        for layer in self.layers:
            branches |= _branches(layer, self.scale_of(layer), self._read(layer))
        return Adapter(branches)

    def _read(self, layer: Layer) -> dict[str, torch.Tensor]:
        found = {kind: each.read() for kind, each in layer.tensors.items() if kind != "alpha"}
        if not all(torch.isfinite(each).all() for each in found.values()):
            raise _refusal(self.file.path, f"{layer.name} has values that are not finite")
        return found


def open_adapter(path: Path, names: Mapping[str, Target], shapes: Shapes) -> AdapterFile:
    """Open the file at *path* and check it against a model's *names* and *shapes*.

    Close the returned object's `file` after use.

    Raises:
        AdapterRefused: it is damaged, too large, of another kind, or of another model.
    """
    if path.stat().st_size > MAX_BYTES:
        raise _refusal(path, f"it has more than {MAX_BYTES / 1e9:.0f} GB")
    try:
        file = SafetensorsFile(path)
    except StartupError as error:
        raise AdapterRefused(str(error)) from None
    try:
        layers = _sort(file, names)
        for layer in layers:
            _check(file, layer, shapes)
        return AdapterFile(file, layers, _scales(file))
    except BaseException:
        file.close()
        raise


def _sort(file: SafetensorsFile, names: Mapping[str, Target]) -> tuple[Layer, ...]:
    """Sort the tensors by layer; every one has its place, and no module two branches."""
    keys = sorted(
        ((_parse(file, name), tensor) for name, tensor in file.tensors.items()),
        key=lambda pair: pair[0].layer,
    )
    grouped = {
        layer: [(key.tensor, tensor) for key, tensor in pairs]
        for layer, pairs in groupby(keys, key=lambda pair: pair[0].layer)
    }
    if unknown := {layer: None for layer in grouped if layer not in names}:
        guess = other_model(unknown)
        of = f"; it is for {guess}" if guess else "; it is for another model"
        raise _refusal(file.path, f"this model has no layer {next(iter(unknown))[:_SHOWN]}{of}")
    layers = []
    taken: set[str] = set()
    for name, pairs in grouped.items():
        target, tensors = names[name], dict(pairs)
        if len(tensors) < len(pairs) or taken & set(target.modules):
            raise _refusal(file.path, f"it has two branches for {target.modules[0]}")
        taken.update(target.modules)
        layers.append(Layer(name, target, tensors))
    return tuple(layers)


def _parse(file: SafetensorsFile, name: str) -> Key:
    try:
        return parse(name)
    except Refused as refused:
        raise _refusal(file.path, f"it holds {refused}, which are not supported") from None


_KINDS = (
    {"down", "up"},
    {"w1", "w2"},
    {"w1", "w2_a", "w2_b"},
    {"w1_a", "w1_b", "w2"},
    {"w1_a", "w1_b", "w2_a", "w2_b"},
)


def _check(file: SafetensorsFile, layer: Layer, shapes: Shapes) -> None:
    """Check that the tensors of *layer* are complete, of a known dtype, and of the right shapes."""
    matrices = {kind: each for kind, each in layer.tensors.items() if kind != "alpha"}
    if set(matrices) not in _KINDS:
        has = ", ".join(sorted(layer.tensors))
        raise _refusal(file.path, f"{layer.name[:_SHOWN]} is incomplete: it has only {has}")
    for each in layer.tensors.values():
        if each.dtype not in _DTYPES:
            raise _refusal(file.path, f"{each.name[:_SHOWN]} is {each.dtype}, not a float")
    alpha = layer.tensors.get("alpha")
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise _refusal(file.path, f"{alpha.name[:_SHOWN]} is not one number")
    wanted = _wanted(layer.target, shapes)
    found = _product_shape({kind: each.shape for kind, each in matrices.items()})
    if found != wanted:
        is_ = " and ".join(f"{kind} {list(each.shape)}" for kind, each in matrices.items())
        raise _refusal(
            file.path,
            f"{layer.name[:_SHOWN]} is {is_}, but the weight that it changes is {list(wanted)}; "
            "it is for another model",
        )


def _wanted(target: Target, shapes: Shapes) -> tuple[int, int]:
    outputs = [shapes[name] for name in target.modules]
    return sum(rows for rows, _ in outputs), outputs[0][1]


def _product_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Return the shape of the change of a weight; None where the factors do not fit."""
    if not all(len(shape) == 2 and min(shape) > 0 for shape in shapes.values()):
        return None
    if "down" in shapes:
        return _chained(shapes["up"], shapes["down"])
    left, right = (
        shapes.get(word) or _chained(shapes[f"{word}_a"], shapes[f"{word}_b"])
        for word in ("w1", "w2")
    )
    return None if left is None or right is None else (left[0] * right[0], left[1] * right[1])


def _chained(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, int] | None:
    return (first[0], second[1]) if first[1] == second[0] else None


def _branches(layer: Layer, scale: float, tensors: Mapping[str, torch.Tensor]) -> dict[str, Branch]:
    """Return the branch of each module of *layer*."""
    modules = layer.target.modules
    if layer.rank:
        up, down = tensors["up"], tensors["down"]
        if layer.target.is_swapped:
            up = torch.cat(up.chunk(2)[::-1])
        return {
            name: LowRank(down, part, scale)
            for name, part in zip(modules, up.chunk(len(modules)), strict=True)
        }
    left, right = (
        tensors[word] if word in tensors else _product(tensors, word) for word in ("w1", "w2")
    )
    size = left.shape[0] * right.shape[0] // (2 if layer.target.is_swapped else len(modules))
    parts: list[tuple[slice, ...]]
    parts = [(slice(start, start + size),) for start in range(0, size * len(modules), size)]
    if layer.target.is_swapped:
        parts = [(slice(size, 2 * size), slice(size))]
    return {
        name: Kronecker(left, right, scale, rows) for name, rows in zip(modules, parts, strict=True)
    }


def _product(tensors: Mapping[str, torch.Tensor], word: str) -> torch.Tensor:
    first, second = tensors[f"{word}_a"], tensors[f"{word}_b"]
    return (first.float() @ second.float()).to(first.dtype)


def _scales(file: SafetensorsFile) -> Callable[[Layer], float]:
    """Return the function that gives a layer's scale."""
    config = _peft_config(file)

    def scale_of(layer: Layer) -> float:
        rank = layer.rank or _kronecker_rank(layer)
        if not rank:
            # LyCORIS ignores alpha where both factors are whole.
            return 1.0
        alpha = float(rank)
        root = False
        if (tensor := layer.tensors.get("alpha")) is not None:
            alpha = float(tensor.read().float())
        elif config is not None:
            alpha, root = config.alpha(layer.target.modules[0], alpha), config.is_root
        if not math.isfinite(alpha) or abs(alpha) > _ALPHA_LIMIT:
            raise _refusal(file.path, f"the alpha of {layer.name[:_SHOWN]} is {alpha}")
        return alpha / (math.sqrt(rank) if root else rank)

    return scale_of


def _kronecker_rank(layer: Layer) -> int:
    """Return the rank that divides alpha: that of the second factor, or else of the first."""
    for kind in ("w2_b", "w1_b"):
        if (tensor := layer.tensors.get(kind)) is not None:
            return tensor.shape[0]
    return 0


@dataclass(frozen=True, slots=True)
class _PeftConfig:
    """What PEFT's config says of alpha; names as in the file."""

    default: float | None
    pattern: Mapping[str, float]
    is_root: bool
    """Whether alpha is divided by the rank's root (`use_rslora`)."""

    def alpha(self, module: str, otherwise: float) -> float:
        """Return alpha for *module*: PEFT matches a pattern against the end of its name."""
        for name, value in self.pattern.items():
            end = name.removeprefix("^")
            if module == end or module.endswith(f".{end}"):
                return value
        return otherwise if self.default is None else self.default


def _peft_config(file: SafetensorsFile) -> _PeftConfig | None:
    """Read what diffusers stores as `lora_adapter_metadata`; None without it.

    Raises:
        AdapterRefused: it cannot be read, or asks for what is not supported.
    """
    if not (text := file.metadata.get("lora_adapter_metadata")):
        return None
    found: Any = None
    with suppress(HeaderError):
        found = parse_json(text)
    if not isinstance(found, dict):
        raise _refusal(file.path, "its lora_adapter_metadata cannot be read")
    config = {re.sub(r"^transformer\.", "", name): value for name, value in found.items()}
    if config.get("use_dora"):
        raise _refusal(file.path, "it holds DoRA, which is not supported")
    try:
        default = config.get("lora_alpha")
        return _PeftConfig(
            default=None if default is None else float(default),
            pattern={
                str(name).removeprefix("transformer."): float(value)
                for name, value in (config.get("alpha_pattern") or {}).items()
            },
            is_root=bool(config.get("use_rslora")),
        )
    except (TypeError, ValueError, AttributeError):
        raise _refusal(file.path, "the alpha in its lora_adapter_metadata is no number") from None


def _refusal(path: Path, what: str) -> AdapterRefused:
    return AdapterRefused(f"{path.name} cannot be used as an adapter: {what}.")
