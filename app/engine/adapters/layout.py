"""Recognises an adapter file of any layout by its header: each tensor's layer and part, checked.

Files are untrusted: sizes, names, dtypes and shapes are checked before a weight is read, and a file
that cannot be used completely is refused with the reason. No torch here: the process that speaks
HTTP lists adapters, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from app.engine.adapters.names import Key, Refused, Target, other_model, parse
from app.engine.checkpoint.safetensors_header import (
    HeaderError,
    TensorEntry,
    parse_json,
    read_header,
)

MAX_BYTES = 4_000_000_000
"""The largest file that is read."""
MAX_KRONECKER_RANK = 256
"""A Kronecker product's factors take at most the memory of a LoRA of this rank.

They are multiplied out, so that a small file could fill the memory.
"""

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
_ALPHA_DTYPES = _DTYPES | {"F64": 8, "I64": 8, "I32": 4}
"""Of alpha too: scripts that write adapters store a rank as it is."""
_SHOWN = 80
_PLAIN = re.compile(r"\^?[\w.-]+")
"""A name in PEFT's `alpha_pattern` that stands for itself."""
_KINDS = (
    {"down", "up"},
    {"w1", "w2"},
    {"w1", "w2_a", "w2_b"},
    {"w1_a", "w1_b", "w2"},
    {"w1_a", "w1_b", "w2_a", "w2_b"},
)

_JOINED = dict.fromkeys(("to_q", "to_k", "to_v"), "to_qkv") | dict.fromkeys(
    ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv"
)

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] of the weight of each linear layer of the transformer, by diffusers' module."""


class AdapterRefused(Exception):
    """The file cannot be used; the message is a sentence that names the file and says why.

    *why* is the same without the file's name; empty where another look at the file may help.
    """

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a file: key and entry of its tensors, by the words that `names.parse` gives."""

    name: str
    target: Target
    tensors: Mapping[str, tuple[str, TensorEntry]]

    @property
    def names(self) -> tuple[str, ...]:
        """The file's name of it, and diffusers' of the first module that it holds."""
        return self.name, self.target.modules[0]

    @property
    def rank(self) -> int:
        """The rank of a low-rank branch; 0 of any other."""
        return self.shape("down")[0] if "down" in self.tensors else 0

    @property
    def divisor(self) -> int:
        """The rank that divides alpha; 0 where both factors are whole, so LyCORIS ignores alpha.

        Of a Kronecker product it is that of the second factor, or else of the first.
        """
        kronecker = (self.shape(word)[0] for word in ("w2_b", "w1_b") if word in self.tensors)
        return self.rank or next(kronecker, 0)

    def shape(self, word: str) -> tuple[int, ...]:
        """Return the shape of the tensor *word*."""
        return self.tensors[word][1].shape


@dataclass(frozen=True, slots=True)
class Alphas:
    """What PEFT's config in the metadata says of alpha, by diffusers' modules."""

    default: float | None = None
    pattern: Mapping[str, float] | None = None
    is_root: bool = False
    """Whether alpha is divided by the rank's root (`use_rslora`)."""

    def of(self, layer: Layer) -> float:
        """Return alpha of *layer*: PEFT matches a pattern against the end of its name."""
        for name, value in (self.pattern or {}).items():
            end = name.removeprefix("^")
            if any(each == end or each.endswith(f".{end}") for each in layer.names):
                return value
        return float(layer.divisor) if self.default is None else self.default


@dataclass(frozen=True, slots=True)
class Layout:
    """What an adapter file holds; its names and shapes fit the model."""

    layers: tuple[Layer, ...]
    alphas: Alphas

    @property
    def rank(self) -> int:
        """The most that the file adds to the rank of one joined layer.

        Queries, keys and values are joined: separate ones count together, unless they share the
        first factor, which only their weights tell.
        """
        ranks: dict[str, int] = {}
        for layer in self.layers:
            joined = joined_name(layer.target.modules[0])
            ranks[joined] = ranks.get(joined, 0) + layer.rank
        return max(ranks.values())


def joined_name(module: str) -> str:
    """Name the layer that *module* is joined to: queries, keys and values are one."""
    block, _, name = module.rpartition(".")
    return f"{block}.{_JOINED.get(name, name)}"


def read_layout(path: Path, names: Mapping[str, Target], shapes: Shapes) -> Layout:
    """Read the header of the file at *path* and check it against a model's *names* and *shapes*.

    Raises:
        AdapterRefused: it is damaged, too large, of another kind, or of another model.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refusal(path, f"it has more than {MAX_BYTES / 1e9:.0f} GB")
        try:
            entries, metadata = read_header(file, size)
        except HeaderError as error:
            raise refusal(path, f"it is no whole safetensors file, since {error}") from None
    layers = _sort(path, entries, names)
    for layer in layers:
        _check(path, layer, shapes)
    return Layout(layers, _alphas(path, metadata))


def refusal(path: Path, what: str) -> AdapterRefused:
    """Return the error that says of the file at *path* *what* is wrong with it."""
    return AdapterRefused(f"{path.name} cannot be used as an adapter: {what}.", what)


def _sort(
    path: Path, entries: Mapping[str, TensorEntry], names: Mapping[str, Target]
) -> tuple[Layer, ...]:
    """Sort the tensors by layer; every one has its place, and no module two branches."""
    if not entries:
        raise refusal(path, "it holds no tensors")
    keys = sorted((_parse(path, name), name) for name in entries)
    grouped = {
        layer: [(key.tensor, name) for key, name in pairs]
        for layer, pairs in groupby(keys, key=lambda pair: pair[0].layer)
    }
    if unknown := {layer: None for layer in grouped if layer not in names}:
        of = other_model(unknown) or "another model"
        raise refusal(path, f"it is for {of}: this one has no layer {next(iter(unknown))[:_SHOWN]}")
    layers = []
    taken: set[str] = set()
    for name, pairs in grouped.items():
        target = names[name]
        tensors = {word: (key, entries[key]) for word, key in pairs}
        if len(tensors) < len(pairs) or taken & set(target.modules):
            raise refusal(path, f"it has two branches for {target.modules[0]}")
        taken.update(target.modules)
        layers.append(Layer(name, target, tensors))
    return tuple(layers)


def _parse(path: Path, name: str) -> Key:
    try:
        return parse(name)
    except Refused as refused:
        raise refusal(path, f"it holds {refused}, which are not supported") from None


def _check(path: Path, layer: Layer, shapes: Shapes) -> None:
    """Check that the tensors of *layer* are complete, of a known dtype, and of the right shapes."""
    words = [word for word in layer.tensors if word != "alpha"]
    if set(words) not in _KINDS:
        has = ", ".join(sorted(layer.tensors))
        raise refusal(path, f"{layer.name} is incomplete: it has only {has}")
    for word, (key, entry) in layer.tensors.items():
        bytes_of = _ALPHA_DTYPES if word == "alpha" else _DTYPES
        if entry.dtype not in bytes_of:
            raise refusal(path, f"{key[:_SHOWN]} is of the type {entry.dtype[:16]}, not a float")
        if entry.size_bytes != math.prod(entry.shape) * bytes_of[entry.dtype]:
            raise refusal(path, f"the bytes of {key[:_SHOWN]} do not fit its shape")
    if "alpha" in layer.tensors and math.prod(layer.shape("alpha")) != 1:
        raise refusal(path, f"alpha of {layer.name} is not one number")
    rows = [shapes[name][0] for name in layer.target.modules]
    wanted = sum(rows), shapes[layer.target.modules[0]][1]
    if _product_shape({word: layer.shape(word) for word in words}) != wanted:
        parts = " and ".join(f"{word} {list(layer.shape(word))}" for word in words)
        raise refusal(
            path,
            f"it is for another model: {layer.name} is {parts}, but the weight that it changes "
            f"is {list(wanted)}",
        )
    if _product_size(layer) > MAX_KRONECKER_RANK * sum(wanted):
        raise refusal(
            path,
            f"the factors of {layer.name} are larger than those of a LoRA of rank "
            f"{MAX_KRONECKER_RANK}",
        )


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


def _product_size(layer: Layer) -> int:
    """Count the numbers of both factors of a Kronecker product, multiplied out; 0 of any other."""
    if layer.rank:
        return 0
    sizes = (
        math.prod(layer.shape(word))
        if word in layer.tensors
        else layer.shape(f"{word}_a")[0] * layer.shape(f"{word}_b")[1]
        for word in ("w1", "w2")
    )
    return sum(sizes)


def _chained(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, int] | None:
    return (first[0], second[1]) if first[1] == second[0] else None


def _alphas(path: Path, metadata: Mapping[str, str]) -> Alphas:
    """Read PEFT's config, which diffusers stores as `lora_adapter_metadata`."""
    if not (text := metadata.get("lora_adapter_metadata")):
        return Alphas()
    found: Any = None
    with suppress(HeaderError):
        found = parse_json(text)
    if not isinstance(found, dict):
        raise refusal(path, "its lora_adapter_metadata cannot be read")
    config = {name.removeprefix("transformer."): value for name, value in found.items()}
    if config.get("use_dora"):
        raise refusal(path, "it holds DoRA, which is not supported")
    try:
        default, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if expression := next((name for name in pattern if not _PLAIN.fullmatch(name)), ""):
            raise refusal(
                path,
                f"its alpha_pattern has the regular expression {expression[:_SHOWN]}, which is not "
                "supported",
            )
        return Alphas(
            default=None if default is None else float(default),
            pattern={
                name.removeprefix("transformer."): float(value) for name, value in pattern.items()
            },
            is_root=bool(config.get("use_rslora")),
        )
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise refusal(path, "the alpha in its lora_adapter_metadata is no number") from None
