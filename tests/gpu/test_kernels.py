"""The card's kernels against the same arithmetic on the processor, and the probes of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.memory.planner import Plan
from app.engine.models.registry import find_model
from app.engine.modules.attention import KERNELS, choose_attention, plain_attention
from app.engine.pipeline.decode import decode
from app.engine.pipeline.tiled_decode import decode_tiled
from app.engine.quantization import linear
from app.engine.quantization.linear import Fp8Linear, WeightOnlyLinear
from app.engine.quantization.probe import probe_gpu
from app.engine.quantization.select import choose_precision
from app.engine.runtime.kernels_choice import choose_kernels
from tests.support.checkpoints import write_tiny_klein
from tests.support.imported_modules import unwanted
from tests.support.layout_files import build, latents_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    # Triton and torch tell of what is deprecated in one another.
    pytest.mark.filterwarnings("ignore"),
]

TOLERANCE = 1e-2
WIDTHS = (3072, 9216, 12288)


def heavy(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    squares = sum(torch.randn(shape, generator=generator).square() for _ in range(5))
    return torch.randn(shape, generator=generator) / (squares / 5).sqrt()


def difference(made: torch.Tensor, right: torch.Tensor) -> float:
    made, right = made.float().cpu(), right.float().cpu()
    return float((made - right).norm() / right.norm())


def make(kind: str, weight: torch.Tensor, x: torch.Tensor) -> torch.nn.Module:
    if kind == "int8":
        return linear.int8_linear(*linear.quantize_rotated(weight))
    if kind == "int8w":
        return WeightOnlyLinear(*linear.quantize_int8(weight))
    if kind == "fp8w":
        return WeightOnlyLinear(*linear.quantize_fp8(weight))
    scale = x.abs().amax().float() / 448 if kind == "fp8 static" else None
    return Fp8Linear(*linear.quantize_fp8(weight), scale)


@pytest.mark.parametrize("rows", [5, 512])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["fp8 static", "fp8 dynamic", "fp8w", "int8", "int8w"])
def test_each_linear_is_its_emulation(card, kind, width, rows):
    """At klein's widths, heavy-tailed, with few rows and many."""
    if kind.startswith("fp8 ") and torch.cuda.get_device_capability(card) < (8, 9):
        pytest.skip("this card knows no fp8")
    weight, x = heavy(256, width, seed=0).bfloat16(), heavy(rows, width, seed=1).bfloat16()
    layer = make(kind, weight, x)
    right = layer(x)

    assert difference(layer.to(card)(x.to(card)), right) < TOLERANCE


def test_cudnns_attention_is_torchs(card):
    """Where the probe takes it; at a megapixel's length and at an odd one."""
    cudnn = KERNELS["cudnn"]
    if choose_attention(card, find_model("flux.2-klein-4b").architecture) is not cudnn:
        pytest.skip("not taken on this card")
    for length in (4608, 1111):
        q, k, v = torch.randn(3, 1, 24, length, 128, device=card, dtype=torch.bfloat16)
        assert difference(cudnn.call(q, k, v), plain_attention(q, k, v)) < TOLERANCE


def test_the_probe_agrees_with_the_capability(card):
    """fp8 from sm_89 on, and the choice that follows, with a reason."""
    facts = probe_gpu(card)
    chosen = choose_precision("auto", facts, is_small=False)

    assert facts.capability == torch.cuda.get_device_capability(card)
    assert ("fp8" in facts.runs) == (facts.capability >= (8, 9))
    assert chosen.linears.name == next(iter(facts.runs), "fp8w")
    assert chosen.reason


def test_weights_come_to_the_card_as_they_lie_in_the_file(card, tmp_path):
    """Through two pinned places: many pieces, an odd end, nothing at all, one after the other."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(size): torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8)
        for size in (5 * 2**24 + 123, 0, 7, 2**24)
    }
    save_file(tensors, tmp_path / "some.safetensors")
    with SafetensorsFile(tmp_path / "some.safetensors") as file:
        for name, tensor in file.tensors.items():
            assert torch.equal(tensor.read(card).cpu(), tensors[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_klein(tmp_path_factory.mktemp("tiny") / "model")


@torch.no_grad()
def test_streamed_layers_give_what_resident_ones_do(card, folder):
    """With real streams: the copies neither come late nor overwrite what still computes."""
    wanted = {"device": card, "dtype": torch.bfloat16}
    resident, streamed = build(folder, **wanted), build(folder, plan=Plan.STREAMED, **wanted)
    for prompt in ["a", "b", "long " * 200] * 10:
        tokens = resident.tokenizer(prompt)
        made = [components.encoder(tokens, card).clone() for components in (resident, streamed)]
        assert torch.equal(*made)


@torch.no_grad()
@pytest.mark.parametrize("linears", ["fp8", "int8"])
def test_networks_over_our_kernels_with_graphs_give_what_plain_ones_do(
    card, folder, tmp_path, linears
):
    """Several sizes, each often enough to be recorded and replayed."""
    kernels = choose_kernels(card, tmp_path)
    if not kernels.is_on:
        pytest.skip(kernels.reason)
    wanted = {"device": card, "dtype": torch.bfloat16, "linears": linears}
    plain, own = build(folder, **wanted), build(folder, kernels=kernels, **wanted)
    for side in (128, 192, 256, 128, 192, 256, 128):
        made = [latents_of(components, side, f"a {side}") for components in (plain, own)]
        assert difference(*reversed(made)) < 0.05
        pixels = [decode(components, made[0], (side // 16,) * 2) for components in (plain, own)]
        assert difference(*reversed(pixels)) < 0.05


def test_pictures_over_our_kernels_import_neither_compiler_nor_networks(card, folder, tmp_path):
    """Eager, as graphs, and with references; nothing imports them late either."""
    if not (kernels := choose_kernels(card, tmp_path)).is_on:
        pytest.skip(kernels.reason)
    assert not unwanted(folder, str(card), tmp_path)


@torch.no_grad()
def test_tiles_on_the_card_are_tiles_on_the_host(card, folder):
    """The same mixture of overlaps, whichever device adds it up."""
    components = build(folder, device=card)
    host = build(folder)
    plane = torch.randn(1, 8, 40, 96, generator=torch.Generator().manual_seed(0))

    made = decode_tiled(components.decode, plane.to(card), 8)
    assert difference(made, decode_tiled(host.decode, plane, 8)) < TOLERANCE
