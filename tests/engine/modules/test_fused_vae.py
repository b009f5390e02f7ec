"""Our own passes of the VAE against diffusers', with the same weights."""

from __future__ import annotations

import weakref
from copy import deepcopy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLFlux2

from app.engine.memory.offload import Offloader
from app.engine.models.registry import find_model
from app.engine.modules.fused_vae import FusedDecoder, fuse_vae
from app.engine.pipeline import build as pipeline_build
from app.engine.quantization.formats import FORMATS
from app.engine.runtime.cuda_graphs import CudaGraphs
from app.engine.runtime.kernels_choice import KernelsChoice
from tests.support.layout_files import build

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


@pytest.fixture(
    scope="module", params=[None, (8, 24, 48, 48)], ids=["same widths", "small decoder"]
)
def vae(request):
    """Weights and biases that all count; the decoder's widths are the encoder's, or others."""
    torch.manual_seed(0)
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=request.param,
        latent_channels=4,
        norm_num_groups=8,
    )
    made.eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return made


@torch.no_grad()
def test_pictures_and_latents_are_those_of_diffusers(vae):
    """Decoder and encoder in float32, at a size that is not square."""
    fused = deepcopy(vae)
    fuse_vae(fused)
    latents, pixels = torch.randn(1, 4, 6, 10), torch.rand(1, 3, 48, 80) * 2 - 1

    for made, right in (
        (fused.decode(latents).sample, vae.decode(latents).sample),
        (fused.encode(pixels).latent_dist.mode(), vae.encode(pixels).latent_dist.mode()),
    ):
        assert made.shape == right.shape
        assert float((made - right).norm() / right.norm()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_no_block_runs_beside_an_image_of_an_earlier_one(vae, part):
    """While a block runs, of the images before it its own input alone is held."""
    fused = deepcopy(vae)
    fuse_vae(fused)
    network = getattr(fused, part)
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def note(_, inputs) -> None:
        held.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(inputs[0].data))

    for block in network.blocks:
        block.register_forward_pre_hook(note)
    network(torch.rand(1, 4, 4, 4) if part == "decoder" else torch.rand(1, 3, 32, 32))

    assert len(held) > 8
    assert max(held) == 0


@torch.no_grad()
def test_all_its_weights_move_with_it(vae):
    """A network on another device can be brought whole: it holds every tensor that it reads."""
    fused = deepcopy(vae)
    fuse_vae(fused)
    offloader = Offloader(CPU, pin=False)
    right = fused.decoder(torch.ones(1, 4, 4, 4))
    offloader.admit(fused.decoder, stays=False)
    for each in [*fused.decoder.parameters(), *fused.decoder.buffers()]:
        each.data = torch.zeros_like(each)

    with offloader.on_gpu(fused.decoder):
        assert torch.equal(fused.decoder(torch.ones(1, 4, 4, 4)), right)


@pytest.mark.parametrize(("linears", "is_ours"), [("fp8", True), ("bf16", False)])
def test_they_are_taken_where_nothing_must_be_exact(tiny_klein, linears, is_ours):
    """Where Triton runs; an exact model runs diffusers' modules."""
    kernels = KernelsChoice(is_on=True, has_graphs=False, reason="a test")
    components = build(tiny_klein, linears=linears, kernels=kernels)

    assert isinstance(components.vae.decoder, FusedDecoder) == is_ours


def test_where_the_kernels_fail_diffusers_modules_run(tiny_klein, monkeypatch, caplog):
    """And the log says why."""
    monkeypatch.setattr(pipeline_build, "kernels_fault", lambda _: "they do not run here")
    kernels = KernelsChoice(is_on=True, has_graphs=False, reason="a test")
    components = build(tiny_klein, kernels=kernels)

    assert isinstance(components.vae, diffusers.AutoencoderKLFlux2)
    assert "they do not run here" in caplog.text


def test_small_pictures_are_decoded_by_graphs(monkeypatch):
    """Previews are, up to 256x256; a graph of a large picture would keep its memory."""

    class Graphs(CudaGraphs):
        def run(self, function, inputs):
            replayed.append(inputs[0].shape)
            return function(*inputs)

    replayed, vae = [], SimpleNamespace(post_quant_conv=None, decoder=torch.neg)
    options = SimpleNamespace(
        linears=FORMATS["fp8"],
        kernels=KernelsChoice(is_on=True, has_graphs=True, reason="a test"),
        architecture=find_model("flux.2-klein-4b").architecture,
    )
    monkeypatch.setattr(pipeline_build, "CudaGraphs", Graphs)
    decode = pipeline_build._decoder(vae, options)

    for side in (16, 32, 33):
        assert decode(torch.ones(1, 4, side, side)).shape[2] == side
    assert [shape[2] for shape in replayed] == [16, 32]
