"""What a file says of its quantization is told in figures."""

from __future__ import annotations

import pytest

from app.engine.checkpoint.notes import read_notes
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (0.05, "with an input_scale, 0.05 to 0.05, 0 with the placeholder"),
        (1.0, "fp8 layers, 0 with an input_scale, "),
        (None, "fp8 layers, 0 with an input_scale, 0 with the placeholder"),
    ],
)
def test_the_scales_of_an_fp8_file(tiny_klein, tmp_path, scale, said) -> None:
    """Their range, and how many are placeholders; the header's own words go with them."""
    note = {"full_precision_matrix_mult": True}
    notes = read_notes(
        write_fp8(tiny_klein, tmp_path / "one.safetensors", input_scale=scale, notes=note)
    )

    assert said in notes.summary
    assert notes.fp8_layers == notes.full_precision_layers > 0
    assert len(notes.input_scales) == (notes.fp8_layers if scale else 0)
    assert "full_precision_matrix_mult" in notes.metadata


def test_a_folder_without_fp8_has_none(tiny_klein) -> None:
    """It is read too."""
    assert read_notes(tiny_klein).summary == "no fp8 layers in the file"
