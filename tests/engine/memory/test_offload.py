"""Networks that wait on the host come to the device for a stage, and their layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.engine.memory.layer_stream import StreamedLayers
from app.engine.memory.offload import Offloader

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def away(monkeypatch):
    """A device that is not there: what is brought to it is other memory of the host's."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.detach().clone())


def places(network: nn.Module) -> list[int]:
    return [each.data_ptr() for each in network.state_dict().values()]


def admitted(network: nn.Module, *, stays: bool = False) -> Offloader:
    offloader = Offloader(CPU, pin=False)
    offloader.admit(network, stays=stays)
    return offloader


def test_a_network_is_on_the_device_within_its_stage_only():
    """Its weights and buffers; the host keeps the same memory, so nothing is copied back."""
    network = nn.BatchNorm1d(4)
    before = places(network)
    offloader = admitted(network)
    for _ in range(2):
        with offloader.on_gpu(network):
            assert not set(places(network)) & set(before)
        assert places(network) == before


def test_a_failing_stage_gives_the_device_back():
    """The next job finds the weights where they were."""
    network = nn.Linear(2, 2)
    before = places(network)
    with pytest.raises(RuntimeError, match="no room"), admitted(network).on_gpu(network):
        raise RuntimeError("no room")

    assert places(network) == before


def test_a_network_that_stays_is_moved_once():
    """A stage changes nothing about it, nor about one that was never admitted."""
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    before = places(network)
    offloader = admitted(network, stays=True)
    moved = places(network)
    assert moved != before
    for each, expected in ((network, moved), (other, places(other))):
        with offloader.on_gpu(each):
            assert places(each) == expected
        assert places(each) == expected


def layers(count: int) -> nn.ModuleList:
    made = nn.ModuleList()
    for number in range(count):
        layer = nn.Module()
        layer.rows = nn.Parameter(torch.full((3, 5), number, dtype=torch.int8), requires_grad=False)
        layer.scale = nn.Parameter(torch.full((3,), number + 0.5), requires_grad=False)
        layer.none = nn.Parameter(torch.empty(0), requires_grad=False)
        made.append(layer)
    return made


@pytest.mark.parametrize("count", [2, 3, 6])
def test_streamed_layers_come_in_order_with_their_own_weights(count):
    """Of any dtype and odd size, and again in the next pass."""
    stream = StreamedLayers(layers(count), CPU)
    for _ in range(2):
        seen = [(layer.rows.clone(), layer.scale.clone()) for layer in stream]
        assert [rows.unique().tolist() for rows, _ in seen] == [[each] for each in range(count)]
        assert [scale.tolist() for _, scale in seen] == [[each + 0.5] * 3 for each in range(count)]


def test_streamed_layers_take_two_places():
    """However many there are: the rest is on the host."""
    places = {layer.rows.data_ptr() for layer in StreamedLayers(layers(5), CPU)}

    assert len(places) == 2


def test_a_pass_that_was_left_begins_anew():
    """A cancelled job leaves no half of a layer behind."""
    stream = StreamedLayers(layers(4), CPU)
    for layer in stream:
        if int(layer.rows[0, 0]) == 1:
            break

    assert [int(layer.rows[0, 0]) for layer in stream] == [0, 1, 2, 3]
