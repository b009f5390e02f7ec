"""The library's fused int8 product computes what our layer says it computes.

Its kernels want a card (tests/gpu has them); its own reference runs on the processor by the same
call.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from app.engine.kernels.int8_linear import (  # noqa: E402 - after the check for torch
    Addition,
    Modulation,
    Operands,
    Weights,
    emulate,
    rotate,
)
from app.engine.quantization import int8_kernel  # noqa: E402
from app.engine.quantization.linear import (  # noqa: E402
    Int8Linear,
    int8_linear,
    quantize_rotated,
)

pytestmark = [pytest.mark.system, pytest.mark.torch]


@pytest.fixture(scope="module")
def product():
    found = int8_kernel.library_product()
    assert found is not None, "comfy-kitchen is not installed; requirements.lock has it"
    return found


def weights_of(layer: Int8Linear) -> Weights:
    return Weights(layer.weight, layer.scale, len(layer.rotation))


def layer_and_input(width: int) -> tuple[Int8Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(48, width, generator=generator)
    return int8_linear(*quantize_rotated(weight)), torch.randn(2, 20, width, generator=generator)


@pytest.mark.parametrize("width", [256, 3072, 192, 80])
def test_the_product_is_our_own_emulation(product, width):
    """In groups of 256, 64 and 16: same rotation, same rounding, same scales."""
    layer, x = layer_and_input(width)
    made = product(weights_of(layer), Operands(x))

    assert made.shape == (2, 20, 48)
    torch.testing.assert_close(made, layer(x), rtol=1e-3, atol=0.02 * float(made.std()))


@pytest.mark.parametrize("width", [512, 80])
@pytest.mark.parametrize("kind", ["modulated", "swiglu", "joined", "residual"])
def test_what_stands_around_the_layer_is_the_emulations(product, kind, width):
    """SwiGLU, gate and residual are the library's own, LayerNorm and the rest torch's."""
    layer, x = layer_and_input(width)
    x = x[:1]
    feed = torch.randn(1, 20, 2 * width, generator=torch.Generator().manual_seed(2))
    addition = Addition(torch.randn(1, 20, 48), torch.randn(1, 48))
    operands = {
        "modulated": Operands(x, modulation=Modulation(x[:, 1], x[:, 2], 1e-6)),
        "swiglu": Operands(None, feed),
        "joined": Operands(x[..., :16], feed[..., : 2 * (width - 16)], addition=addition),
        "residual": Operands(x, addition=addition),
    }[kind]

    right = emulate(weights_of(layer), layer.rotation, operands)
    made = product(weights_of(layer), operands)
    torch.testing.assert_close(made, right, rtol=1e-3, atol=0.02 * float(right.std()))


def test_the_weights_are_the_librarys_own(product):
    """So a file that either wrote means the same to both."""
    import comfy_kitchen.backends.eager.quantization as reference

    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
    theirs, scales = reference.quantize_int8_convrot_weight(weight, 256)
    ours = int8_linear(*quantize_rotated(weight))

    assert (ours.weight - theirs).abs().max() <= 1
    torch.testing.assert_close(ours.scale, scales.reshape(-1))
    turned_back = rotate(ours.weight.float() * ours.scale[:, None], ours.rotation)
    assert float((turned_back - weight).norm() / weight.norm()) < 0.02
