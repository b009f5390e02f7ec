"""A joined layer's branch is what its modules' branches give one by one."""

from __future__ import annotations

import pytest
import torch

from app.engine.adapters.joined import join_low_rank, kronecker_of, multiply_kronecker
from app.engine.adapters.reader import Kronecker, LowRank

MODULES, OUTPUTS, INPUTS = ("q", "k", "v"), (6, 6, 6), 8


def _low_rank(rank: int, down: torch.Tensor | None = None) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, INPUTS, generator=generator) if down is None else down
    return LowRank(down, torch.randn(6, len(down), generator=generator), 0.5)


@pytest.mark.parametrize(
    ("branches", "rank"),
    [
        ({"q": _low_rank(2), "k": _low_rank(3), "v": _low_rank(4)}, 9),
        ({"q": _low_rank(2), "v": _low_rank(4)}, 6),
        (dict.fromkeys(MODULES, _low_rank(2)), 2),
        ({"q": _low_rank(2), "k": _low_rank(5, _low_rank(2).down.clone()), "v": _low_rank(3)}, 5),
    ],
    ids=["separate", "one missing", "one A", "two with equal A"],
)
def test_low_rank_branches_join_to_one(branches, rank) -> None:
    """Ranks add up, but for branches that share A."""
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(0))
    wanted = [
        x @ branches[name].down.t() @ branches[name].up.t() * branches[name].scale
        if name in branches
        else torch.zeros(5, 6)
        for name in MODULES
    ]

    down, up = join_low_rank(branches, MODULES, OUTPUTS, torch.float32)

    assert down.shape == (rank, INPUTS)
    torch.testing.assert_close(x @ down.t() @ up, torch.cat(wanted, dim=-1))


def test_without_a_branch_there_is_nothing_to_join() -> None:
    """Neither of low rank nor of another kind."""
    assert join_low_rank({}, MODULES, OUTPUTS, torch.float32) is None
    assert kronecker_of({}, MODULES, OUTPUTS) == []


def test_a_kronecker_product_is_multiplied_without_its_matrix() -> None:
    """As x times the transposed matrix, of which each module takes its rows."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=generator) for s in ((3, 4), (6, 2)))
    branch = Kronecker(left, right, 0.25, (slice(12, 18), slice(0, 6)))
    x = torch.randn(2, 5, 8, generator=generator)
    matrix = torch.kron(left, right) * 0.25
    wanted = x @ torch.cat([matrix[12:18], matrix[0:6]]).t()

    torch.testing.assert_close(multiply_kronecker(branch, x), wanted)
    assert kronecker_of({"k": branch}, MODULES, OUTPUTS) == [(slice(6, 12), branch)]
