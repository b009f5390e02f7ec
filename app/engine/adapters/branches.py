"""The branches of one layer, as they run: what the chosen adapters add to its product.

Beside the libraries' own modules a branch computes what PEFT computes, operation by operation.
Beside our fused blocks it reads static slots, so that a CUDA graph stays valid when another adapter
is copied into them.

Shapes: n tokens, r the rank, of all adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from app.engine.adapters.joined import join_low_rank, kronecker_of, multiply_kronecker
from app.engine.adapters.reader import Branch, Kronecker, LowRank
from app.engine.kernels import blocks
from app.engine.kernels.blocks import FP8_LIMIT, TINY
from app.engine.kernels.fp8_linear import multiply_fp8

BUCKETS = (32, 64, 128, 256)
"""The ranks that slots have; a branch runs at the smallest that holds its adapters'."""


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer that adapters may change, and the modules of diffusers' that it joins."""

    modules: tuple[str, ...]
    layer: nn.Module
    is_hooked: bool
    """Whether a forward hook adds the branch; else `app.engine.modules.ops` asks the layer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What one adapter adds to one layer, in host memory."""

    down: torch.Tensor | None
    """A, [r, in]; None without a low-rank branch."""
    up: torch.Tensor | None
    """B as the kind of branch reads it."""
    scale: float
    """alpha / rank, where B does not hold it."""
    kroneckers: tuple[tuple[slice, Kronecker], ...]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors."""
        yield from (each for each in (self.down, self.up) if each is not None)
        for _, branch in self.kroneckers:
            yield from (branch.left, branch.right)

    def pinned(self) -> Prepared:
        """Return the same in pinned memory, from which a GPU copies without waiting."""
        return Prepared(
            None if self.down is None else self.down.pin_memory(),
            None if self.up is None else self.up.pin_memory(),
            self.scale,
            tuple(
                (
                    part,
                    replace(each, left=each.left.pin_memory(), right=each.right.pin_memory()),
                )
                for part, each in self.kroneckers
            ),
        )


Parts = Sequence[tuple[Prepared, float]]
"""What each of the chosen adapters adds to a layer, with the scale that is asked for."""


def prepare_exact(
    branches: Mapping[str, Branch],
    modules: Sequence[str],
    _outputs: Sequence[int],
    dtype: torch.dtype,
) -> Prepared | None:
    """Prepare the branch of a single module for `ExactBranch`; None where it has none."""
    (name,) = modules
    branch = branches.get(name)
    if branch is None:
        return None
    if isinstance(branch, LowRank):
        return Prepared(branch.down.to(dtype), branch.up.to(dtype), branch.scale, ())
    return Prepared(None, None, 1.0, ((slice(None), _cast(branch, dtype)),))


class ExactBranch:
    """Adds one adapter after the other as PEFT does: each is y + B(A(x)) * scale."""

    def __init__(self, place: Place, outputs: int, device: torch.device) -> None:
        del place, outputs
        self._device = device
        self._parts: list[tuple[Prepared, float]] = []
        self.size_bytes = 0
        self.variant: int | None = None

    def make_room(self, rank: int) -> bool:
        """Drop nothing: there are no slots."""
        del rank
        return False

    def clear(self) -> None:
        """Drop what `fill` copied."""
        self._parts.clear()
        self.size_bytes = 0

    def drop(self) -> None:
        """Drop what `fill` copied."""
        self.clear()

    def fill(self, parts: Parts) -> None:
        """Copy *parts* to the device."""
        self.clear()
        self._parts.extend(
            (
                replace(
                    each,
                    down=_to(each.down, self._device),
                    up=_to(each.up, self._device),
                    kroneckers=_moved(each, 1.0, self._device),
                ),
                scale,
            )
            for each, scale in parts
        )
        self.size_bytes = sum(t.nbytes for each, _ in self._parts for t in each.tensors())

    def add(
        self,
        product: torch.Tensor | None,
        x: torch.Tensor,
        input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return *product*, [..., out], plus the adapters of *x*, [..., in], in their order."""
        assert product is not None
        assert input_scale is None
        for part, scale in self._parts:
            if part.down is not None and part.up is not None:
                inner = functional.linear(x, part.down)
                product = product + functional.linear(inner, part.up) * (part.scale * scale)
            for _, branch in part.kroneckers:
                product = product + multiply_kronecker(branch, x) * scale
        return product


def prepare_slots(
    branches: Mapping[str, Branch],
    modules: Sequence[str],
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> Prepared | None:
    """Prepare the joined branch of *modules* for `SlotBranch`; None where none has one."""
    factors = join_low_rank(branches, modules, outputs, dtype)
    kroneckers = tuple(
        (part, _cast(branch, dtype)) for part, branch in kronecker_of(branches, modules, outputs)
    )
    if factors is None and not kroneckers:
        return None
    down, up = factors or (None, None)
    return Prepared(down, up, 1.0, kroneckers)


class SlotBranch:
    """Adds all low-rank adapters by two matmuls of factors in slots, whose addresses stay.

    Where the layer's input arrives in fp8, A is stored in fp8 too, each row with a scale of its own
    that is multiplied into B, so that the input need not exist in another dtype.
    """

    def __init__(self, place: Place, outputs: int, device: torch.device) -> None:
        self._is_fp8 = getattr(place.layer, "input_cast", None) is not None
        self._outputs, self._device = outputs, device
        self._down, self._up = torch.empty(0), torch.empty(0)
        self._one = torch.ones((), device=device)
        self._rank = 0
        self._kroneckers: list[tuple[slice, Kronecker]] = []
        self.allocations = 0
        """How often the slots were allocated: a graph of those before must not run again."""

    @property
    def size_bytes(self) -> int:
        """The bytes of the slots."""
        return self._down.nbytes + self._up.nbytes

    @property
    def variant(self) -> int | None:
        """The rank, with the allocation that it lies in."""
        return None if self._kroneckers else self.allocations * (BUCKETS[-1] + 1) + self._rank

    def make_room(self, rank: int) -> bool:
        """Drop slots that are too small for *rank*; return whether there were any."""
        if not 0 < len(self._down) < bucket(rank):
            return False
        self.drop()
        return True

    def clear(self) -> None:
        """Drop Kronecker products, which are in no slot."""
        self._kroneckers = []

    def drop(self) -> None:
        """Drop the slots too; what is counted of them stays."""
        self.clear()
        self._down, self._up = torch.empty(0), torch.empty(0)

    def fill(self, parts: Parts) -> None:
        """Copy *parts* into the slots, the scales multiplied into B; rows without one are zero."""
        factors = [
            (each.down, each.up, scale)
            for each, scale in parts
            if each.down is not None and each.up is not None
        ]
        self._rank = bucket(sum(len(down) for down, _, _ in factors))
        self._allocate(factors)
        end = 0
        for down, up, scale in factors:
            begin, end = end, end + len(down)
            self._store(slice(begin, end), down, up, scale)
        for slots in (self._down, self._up):
            slots[end : self._rank].view(torch.uint8).zero_()
        self._kroneckers = [
            each for part, scale in parts for each in _moved(part, scale, self._device)
        ]

    def add(
        self,
        product: torch.Tensor | None,
        x: torch.Tensor,
        input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the branch of *x*, [..., in], into *product*, [..., out]; return what it is then.

        Without a *product* the branch alone. *input_scale* is that of an *x* in fp8.
        """
        dtype = self._up.dtype if self._rank else self._kroneckers[0][1].left.dtype
        if product is None:
            product = torch.zeros(*x.shape[:-1], self._outputs, dtype=dtype, device=x.device)
        if self._rank:
            down, up = self._down[: self._rank], self._up[: self._rank]
            if input_scale is None:
                inner = x @ down.t()
            else:
                inner = multiply_fp8(x, down, input_scale, self._one, dtype)
            blocks.add_product(product, inner, up)
        if self._kroneckers:
            wide = x if input_scale is None else (x.float() * input_scale).to(dtype)
            for part, branch in self._kroneckers:
                product[..., part] += multiply_kronecker(branch, wide)
        return product

    def _allocate(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """Make the slots as large as the rank; they never shrink, but `drop` drops them."""
        if self._rank <= len(self._down):
            return
        down, up, _ = factors[0]
        kind = torch.float8_e4m3fn if self._is_fp8 else down.dtype
        # Both or none: where there is no room, the next job may find some.
        self._down, self._up = (
            torch.empty(self._rank, down.shape[1], dtype=kind, device=self._device),
            torch.empty(self._rank, up.shape[1], dtype=up.dtype, device=self._device),
        )
        self.allocations += 1

    def _store(self, rows: slice, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        a, b = (each.to(self._device, non_blocking=True) for each in (down, up))
        if self._is_fp8:
            wide = a.float()
            step = wide.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / FP8_LIMIT
            self._down[rows] = (wide / step).clamp(-FP8_LIMIT, FP8_LIMIT).to(self._down.dtype)
            self._up[rows] = b.float() * (step * scale)
            return
        self._down[rows] = a
        self._up[rows] = b if scale == 1 else b.float() * scale


def bucket(rank: int) -> int:
    """Return the rank of the slots for adapters of *rank* together; 0 for 0."""
    return next(each for each in (0, *BUCKETS) if each >= rank)


def _moved(
    part: Prepared, scale: float, device: torch.device
) -> tuple[tuple[slice, Kronecker], ...]:
    return tuple(
        (
            columns,
            Kronecker(
                each.left.to(device, non_blocking=True),
                each.right.to(device, non_blocking=True),
                each.scale * scale,
                each.rows,
            ),
        )
        for columns, each in part.kroneckers
    )


def _cast(branch: Kronecker, dtype: torch.dtype) -> Kronecker:
    return replace(branch, left=branch.left.to(dtype), right=branch.right.to(dtype))


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
