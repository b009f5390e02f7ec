"""Joins the branches of modules whose layers are concatenated into one low-rank branch.

Query, key and value are one layer of the fused blocks. Branches that share A keep their rank there;
separate ones stand on the diagonal, and their ranks add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from app.engine.adapters.reader import Branch, Kronecker, LowRank


def join_low_rank(
    branches: Mapping[str, Branch],
    modules: Sequence[str],
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Join the low-rank branches of *modules*, whose layers have so many *outputs*, in this order.

    Return A, [rank, in], and the transpose of B, [rank, out], so that the factors of several
    adapters are concatenated along their first dimension. The scale is multiplied into B, in
    float32. None where no module has one.
    """
    places: list[tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]] = []
    start = 0
    for name, size in zip(modules, outputs, strict=True):
        branch = branches.get(name)
        if isinstance(branch, LowRank):
            up = branch.up if branch.scale == 1 else branch.up.float() * branch.scale
            part = (start, up.t())
            same = next((parts for down, parts in places if _are_same(down, branch.down)), None)
            if same is None:
                places.append((branch.down, [part]))
            else:
                same.append(part)
        start += size
    if not places:
        return None
    downs, ups = [], []
    for down, parts in places:
        up = torch.zeros(len(down), start, dtype=dtype)
        for begin, columns in parts:
            up[:, begin : begin + columns.shape[1]] = columns
        downs.append(down.to(dtype))
        ups.append(up)
    return torch.cat(downs), torch.cat(ups)


def _are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def kronecker_of(
    branches: Mapping[str, Branch], modules: Sequence[str], outputs: Sequence[int]
) -> list[tuple[slice, Kronecker]]:
    """List the Kronecker branches of *modules* with their places among the joined outputs."""
    found, start = [], 0
    for name, size in zip(modules, outputs, strict=True):
        if isinstance(branch := branches.get(name), Kronecker):
            found.append((slice(start, start + size), branch))
        start += size
    return found


def multiply_kronecker(branch: Kronecker, x: torch.Tensor) -> torch.Tensor:
    """Return scale * x (left (x) right)^T, the rows that *branch* takes: [..., in] -> [..., out].

    With X the reshape of x to [b, d] it is the reshape of left X right^T, [a, c]: two small matmuls
    instead of one with a matrix that is never made.
    """
    (_, b), (_, d) = branch.left.shape, branch.right.shape
    folded = x.reshape(*x.shape[:-1], b, d) @ branch.right.t()
    product = (branch.left @ folded).flatten(-2) * branch.scale
    return torch.cat([product[..., rows] for rows in branch.rows], dim=-1)


def matrix(branch: Branch) -> torch.Tensor:
    """Return the change of the weight that *branch* is, float32 [out, in]."""
    if isinstance(branch, LowRank):
        return branch.up.float() @ branch.down.float() * branch.scale
    product = torch.kron(branch.left.float(), branch.right.float()) * branch.scale
    return torch.cat([product[rows] for rows in branch.rows])
