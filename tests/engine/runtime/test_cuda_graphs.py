"""When a pass is recorded, which recordings are kept, and that they are replayed."""

from __future__ import annotations

import pytest
import torch

from app.engine.runtime import cuda_graphs
from app.engine.runtime.cuda_graphs import CudaGraphs, new_pool

pytestmark = pytest.mark.torch


@pytest.fixture
def recorded(monkeypatch):
    """The shapes that were recorded; a recording computes as the function does."""
    seen = []

    class Recording:
        def __init__(self, function, inputs, pool):
            assert pool == "the pool"
            seen.append(len(inputs[0]))
            self._function = function

        def replay(self, inputs):
            return self._function(*inputs)

    monkeypatch.setattr(cuda_graphs, "_Graph", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    return seen


def run(graphs: CudaGraphs, rows: int) -> None:
    x = torch.arange(rows)
    assert torch.equal(graphs.run(lambda each: each + 1, (x,)), x + 1)


def test_a_shape_is_recorded_after_its_first_uses(recorded):
    """Four plain passes, the fifth records, all later ones replay."""
    graphs = CudaGraphs(new_pool(), is_on=True, after=4)
    for _ in range(4):
        run(graphs, 5)
    assert recorded == []
    for _ in range(4):
        run(graphs, 5)
    assert recorded == [5]


def test_a_rehearsed_shape_is_recorded_at_its_first_use(recorded):
    """After the rehearsal, which a shape whose recording was given up has anew."""
    graphs, rehearsed = CudaGraphs(new_pool(), is_on=True, after=4), []

    def rehearse(x):
        rehearsed.append((len(x), recorded.copy()))

    for rows in (5, 5, 6, 5, 1, 2, 3, 6):
        x = torch.arange(rows)
        assert torch.equal(graphs.run(lambda each: each + 1, (x,), (), rehearse), x + 1)

    assert recorded == [5, 6, 1, 2, 3, 6]
    assert rehearsed == [(rows, recorded[:count]) for count, rows in enumerate(recorded)]


def test_nothing_is_recorded_where_graphs_are_off(recorded):
    """Without a card every pass is plain, and none is rehearsed."""
    graphs = CudaGraphs(new_pool(), is_on=False, after=1)
    for _ in range(4):
        run(graphs, 5)
    x = torch.arange(5)
    assert torch.equal(graphs.run(lambda each: each + 1, (x,), (), pytest.fail), x + 1)
    assert recorded == []


def test_the_last_few_are_kept_and_a_lost_one_waits_again(recorded):
    """Five sizes in turn: the fifth takes the oldest's place, which must be used anew to return."""
    graphs = CudaGraphs(new_pool(), is_on=True, after=1)
    for rows in (1, 2, 3, 4, 5):
        run(graphs, rows)
        run(graphs, rows)
    assert recorded == [1, 2, 3, 4, 5]
    run(graphs, 1)
    run(graphs, 5)
    assert recorded == [1, 2, 3, 4, 5]
    run(graphs, 1)
    assert recorded == [1, 2, 3, 4, 5, 1]


def test_what_is_counted_is_bounded(recorded):
    """A caller who asks for every size there is takes no memory for it."""
    graphs = CudaGraphs(new_pool(), is_on=True, after=2)
    for rows in range(1, 300):
        run(graphs, rows)
    assert len(graphs._uses) == 64
    assert recorded == []


def test_each_variant_is_recorded_by_itself(recorded):
    """A pass whose operations differ is not replayed as another."""
    graphs = CudaGraphs(new_pool(), is_on=True, after=1)
    x = torch.arange(5)
    for _ in range(2):
        for add in (1, 2, 1):
            made = graphs.run(lambda each, add=add: each + add, (x,), variant=add)
            assert torch.equal(made, x + add)
    assert recorded == [5, 5]
