"""What one byte costs: every linear against the exact product, at klein's own widths."""

from __future__ import annotations

import pytest
import torch

from app.engine.quantization.linear import (
    Fp8Linear,
    Int8Linear,
    WeightOnlyLinear,
    hadamard,
    int8_linear,
    quantize_fp8,
    quantize_int8,
    quantize_rotated,
    rotate,
    rotation_group,
)

pytestmark = pytest.mark.torch

# Inputs that klein multiplies: its width, the MLP's, and the single blocks' joined one. Rows of
# the weight are alike, so 192 of them say what all would.
TRANSFORMER = (3072, 9216, 12288)
ENCODER = (2560, 4096, 9728)
ROWS, TOKENS = 192, 48


def heavy(*shape: int, seed: int) -> torch.Tensor:
    """Student's t with five degrees: outliers as real weights and activations have them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    squares = sum(torch.randn(shape, generator=generator).square() for _ in range(5))
    return normal / (squares / 5).sqrt()


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(layer, weight: torch.Tensor, x: torch.Tensor) -> float:
    right = x @ weight.t()
    return float((layer(x) - right).norm() / right.norm())


@pytest.mark.parametrize("width", TRANSFORMER)
def test_int8_with_rotation_errs_by_two_percent(width):
    """Both sides int8 after the rotation."""
    weight, x = heavy(ROWS, width, seed=0), heavy(TOKENS, width, seed=1)

    assert rotation_group(width) == 256
    assert error(int8_linear(*quantize_rotated(weight)), weight, x) <= 0.02


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("width", TRANSFORMER)
def test_fp8_errs_by_four_percent(width, is_calibrated):
    """Both sides fp8 with one scale each, the input's known or looked up."""
    weight, x = heavy(ROWS, width, seed=0), heavy(TOKENS, width, seed=1)
    scale = x.abs().amax() / 448 if is_calibrated else None

    assert error(Fp8Linear(*quantize_fp8(weight), scale), weight, x) <= 0.04


@pytest.mark.parametrize(("draw", "bound"), [(heavy, 0.03), (gaussian, 0.01)])
@pytest.mark.parametrize("width", ENCODER)
def test_int8_weights_alone_err_by_three_percent(width, draw, bound):
    """The text encoder's: only the weights are rounded."""
    weight, x = draw(ROWS, width, seed=0), draw(TOKENS, width, seed=1)

    assert error(WeightOnlyLinear(*quantize_int8(weight)), weight, x) <= bound


@pytest.mark.parametrize("width", TRANSFORMER)
def test_fp8_weights_alone_err_by_three_percent(width):
    """For cards without fp8 units: the format's own rounding."""
    weight, x = heavy(ROWS, width, seed=0), heavy(TOKENS, width, seed=1)

    assert error(WeightOnlyLinear(*quantize_fp8(weight)), weight, x) <= 0.03


def test_the_rotation_cancels_in_the_product():
    """The matrix is orthonormal and its own transpose, for every group."""
    for size in (4, 16, 64, 256):
        matrix = hadamard(size)
        assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=1e-5)
        assert torch.equal(matrix, matrix.t())
    x, weight = gaussian(5, 512, seed=0), gaussian(7, 512, seed=1)
    turned = rotate(x, hadamard(256)) @ rotate(weight, hadamard(256)).t()
    assert torch.allclose(turned, x @ weight.t(), atol=1e-3)


def test_an_outlier_channel_does_not_spoil_the_rotated_product():
    """One channel three hundred times the others: where plain rows fail, the rotation holds."""
    weight, x = gaussian(ROWS, 3072, seed=0), gaussian(TOKENS, 3072, seed=1)
    x[:, 7] *= 300
    rows, scale = quantize_int8(weight)
    peaks = x.abs().amax(dim=1, keepdim=True) / 127
    plain = (x / peaks).round() * peaks @ (rows.float() * scale[:, None]).t()
    right = x @ weight.t()
    plain_error = float((plain - right).norm() / right.norm())

    assert error(int8_linear(*quantize_rotated(weight)), weight, x) < 0.03 < plain_error


def test_int8_products_are_exact_on_a_processor():
    """As sums of integers, which are longer here than float32 can hold in one go."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(100, 128, (rows, 3072), generator=generator) for rows in (5, 7))
    x[:, 0] = 127
    layer = Int8Linear(weight.to(torch.int8), torch.ones(7), group=1)

    assert torch.equal(layer(x.float()), (x @ weight.t()).float())


@pytest.mark.parametrize("kind", ["fp8", "int8", "weights"])
def test_zeros_stay_zeros(kind):
    """An empty layer or input divides nothing by nothing."""
    weight, x = torch.zeros(16, 64), torch.zeros(3, 64)
    make = {
        "fp8": lambda: Fp8Linear(*quantize_fp8(weight)),
        "int8": lambda: int8_linear(*quantize_rotated(weight)),
        "weights": lambda: WeightOnlyLinear(*quantize_int8(weight)),
    }[kind]

    assert torch.equal(make()(x), torch.zeros(3, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_type_of_the_input_are_kept(dtype):
    """[1, n, k] in, [1, n, m] out, in the same type."""
    x = gaussian(1, 5, 64, seed=0).to(dtype)
    for layer in (
        Fp8Linear(*quantize_fp8(gaussian(32, 64, seed=1))),
        int8_linear(*quantize_rotated(gaussian(32, 64, seed=1))),
        WeightOnlyLinear(*quantize_int8(gaussian(32, 64, seed=1))),
    ):
        assert (layer(x).shape, layer(x).dtype) == ((1, 5, 32), dtype)
