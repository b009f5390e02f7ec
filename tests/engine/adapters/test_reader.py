"""Every layout of an adapter gives the same branches; what cannot be used is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from app.engine.adapters import layout
from app.engine.adapters.layout import AdapterRefused, read_layout
from app.engine.adapters.names import targets
from app.engine.adapters.reader import Kronecker, LowRank, read_adapter
from tests.engine.adapters import forge

ALPHA, RANK = 2.0, 4
NAMES = targets(forge.DOUBLES, forge.SINGLES)
SHAPES = forge.model_shapes()
PAIRS = forge.draw(SHAPES, RANK)
LAYOUTS = forge.layouts(PAIRS, ALPHA)


def read(path):
    """Read the adapter at *path* completely."""
    return read_adapter(path, NAMES, SHAPES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_branches(layout, tmp_path) -> None:
    """All modules, with the very factors and scale of the adapter that was written."""
    branches = read(forge.write(tmp_path / "a.safetensors", *LAYOUTS[layout]))

    assert branches.keys() == PAIRS.keys()
    for name, (down, up) in PAIRS.items():
        branch = branches[name]
        assert isinstance(branch, LowRank)
        assert branch.scale == ALPHA / RANK, name
        assert torch.equal(branch.down, down), name
        assert torch.equal(branch.up, up), name


def test_without_alpha_the_scale_is_one(tmp_path) -> None:
    """As PEFT and the trainers that store none mean it."""
    tensors, _ = LAYOUTS["bare diffusers names"]

    branches = read(forge.write(tmp_path / "a.safetensors", tensors, {}))

    assert {branch.scale for branch in branches.values()} == {1.0}


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("kinds", ["w1 w2", "w1 w2_a w2_b", "w1_a w1_b w2_a w2_b"])
def test_a_kronecker_product_changes_the_layer_as_its_matrix_would(
    kinds, is_swapped, tmp_path
) -> None:
    """Of a fused layer each module gets its third, of the last modulation the halves swapped."""
    layer = "final_layer.adaLN_modulation.1" if is_swapped else "double_blocks.0.img_attn.qkv"
    outputs = 48 if is_swapped else 72
    generator = torch.Generator().manual_seed(1)
    sides = {"w1": (4, 6), "w2": (outputs // 4, 4)}
    tensors, factors = {}, []
    for word, (rows, columns) in sides.items():
        if f"{word}_a" in kinds:
            pair = [torch.randn(s, generator=generator) for s in ((rows, 2), (2, columns))]
            tensors |= {f"{word}_a": pair[0], f"{word}_b": pair[1]}
            factors.append(pair[0] @ pair[1])
        else:
            tensors[word] = torch.randn(rows, columns, generator=generator)
            factors.append(tensors[word])
    keys = {f"diffusion_model.{layer}.lokr_{word}": each for word, each in tensors.items()}
    keys[f"diffusion_model.{layer}.alpha"] = torch.tensor(1.0)
    whole = torch.kron(*factors) * (1.0 if kinds == "w1 w2" else 0.5)
    wanted = torch.cat(whole.chunk(2)[::-1]) if is_swapped else whole

    branches = read(forge.write(tmp_path / "a.safetensors", keys, {}))

    parts = []
    for branch in branches.values():
        assert isinstance(branch, Kronecker)
        matrix = torch.kron(branch.left, branch.right) * branch.scale
        parts += [matrix[rows] for rows in branch.rows]
    torch.testing.assert_close(torch.cat(parts), wanted)


REFUSED = {
    "DoRA": {"transformer.proj_out.lora_magnitude_vector": torch.ones(12)},
    "LoHa": {"lora_unet_img_in.hada_w1_a": torch.ones(2, 2)},
    "OFT": {"lora_unet_img_in.oft_blocks": torch.ones(2, 2)},
    "whole differences": {"diffusion_model.img_in.diff": torch.ones(24, 12)},
    "text encoder": {"text_encoder.layers.0.lora_A.weight": torch.ones(2, 2)},
    "the key img_in.weight": {"img_in.weight": torch.ones(24, 12)},
    "for Stable Diffusion": {
        "lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(2, 2)
    },
    "for another model": {
        "transformer.proj_out.lora_A.weight": torch.ones(4, 32),
        "transformer.proj_out.lora_B.weight": torch.ones(12, 4),
    },
    "incomplete": {"transformer.proj_out.lora_A.weight": torch.ones(4, 24)},
    "two branches": {
        f"{stem}.{word}.weight": tensor
        for stem in ("transformer.transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv")
        for word, tensor in (
            ("lora_A", torch.ones(4, 24)),
            ("lora_B", torch.ones(72 if "qkv" in stem else 24, 4)),
        )
    },
    "not finite": {
        "transformer.proj_out.lora_A.weight": torch.full((4, 24), torch.nan),
        "transformer.proj_out.lora_B.weight": torch.ones(12, 4),
    },
    "of the type I8": {
        "transformer.proj_out.lora_A.weight": torch.ones(4, 24, dtype=torch.int8),
        "transformer.proj_out.lora_B.weight": torch.ones(12, 4, dtype=torch.int8),
    },
    "no tensors|header cannot be read": {},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_used_is_refused_by_its_name(words, tmp_path) -> None:
    """One sentence that begins with the file and says what is wrong."""
    path = forge.write(tmp_path / "mine.safetensors", REFUSED[words], {})

    with pytest.raises(AdapterRefused, match=words) as refused:
        read(path)

    assert str(refused.value).startswith("mine.safetensors ")


def test_an_extra_key_refuses_the_file(tmp_path) -> None:
    """Nothing of a file is dropped silently."""
    tensors, note = LAYOUTS["ai-toolkit"]
    path = forge.write(
        tmp_path / "a.safetensors", tensors | {"diffusion_model.vector_in.x": torch.ones(1)}, note
    )

    with pytest.raises(AdapterRefused, match="vector_in"):
        read(path)


@pytest.mark.parametrize(
    ("layout", "rank"), [("bare diffusers names", 3 * RANK), ("bare BFL names", RANK)]
)
def test_the_rank_is_that_of_the_widest_joined_layer(layout, rank, tmp_path) -> None:
    """Separate queries, keys and values count together, fused ones once."""
    path = forge.write(tmp_path / "a.safetensors", *LAYOUTS[layout])

    assert read_layout(path, NAMES, SHAPES).rank == rank


@pytest.mark.parametrize("alpha", ["1" + 400 * "0", '"much"', "[2]"])
def test_an_alpha_that_is_no_number_refuses_the_file(alpha, tmp_path) -> None:
    """By a sentence: any other error would end the look at the whole folder, and the start."""
    note = {"lora_adapter_metadata": f'{{"transformer.lora_alpha": {alpha}}}'}
    path = forge.write(tmp_path / "a.safetensors", LAYOUTS["bare diffusers names"][0], note)

    with pytest.raises(AdapterRefused, match=r"alpha .* is no number"):
        read_layout(path, NAMES, SHAPES)


def test_a_pattern_of_alpha_matches_the_files_own_names(tmp_path) -> None:
    """PEFT's config names the layers of the model that was trained, whoever's names it has."""
    tensors, _ = LAYOUTS["bare BFL names"]
    tensors = {name: each for name, each in tensors.items() if "alpha" not in name}
    config = {"lora_alpha": RANK, "alpha_pattern": {"double_blocks.0.img_attn.qkv": 2 * RANK}}
    note = {"lora_adapter_metadata": json.dumps(config)}

    branches = read(forge.write(tmp_path / "a.safetensors", tensors, note))

    assert {name for name, each in branches.items() if each.scale == 2} == {
        f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"
    }


@pytest.mark.parametrize("pattern", [r".*attn.*", r"single_transformer_blocks\.\d+\.attn\.to_out"])
def test_a_pattern_of_alpha_that_is_an_expression_refuses_the_file(pattern, tmp_path) -> None:
    """PEFT would match it; to take no notice of it would draw at another scale."""
    note = {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 8}})}
    path = forge.write(tmp_path / "a.safetensors", LAYOUTS["bare diffusers names"][0], note)

    with pytest.raises(AdapterRefused, match="regular expression"):
        read_layout(path, NAMES, SHAPES)


@pytest.mark.parametrize("is_product", [False, True])
def test_kronecker_factors_as_large_as_the_weight_are_refused(
    is_product, tmp_path, monkeypatch
) -> None:
    """No rank bounds them, and a file of some megabytes may hold those of all weights."""
    monkeypatch.setattr(layout, "MAX_KRONECKER_RANK", 4)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lokr_w1": torch.ones(1, 1)}
    if is_product:
        tensors |= {f"{stem}.lokr_w2_a": torch.ones(72, 1), f"{stem}.lokr_w2_b": torch.ones(1, 24)}
    else:
        tensors[f"{stem}.lokr_w2"] = torch.ones(72, 24)

    with pytest.raises(AdapterRefused, match="larger than those of a LoRA of rank 4"):
        read_layout(forge.write(tmp_path / "a.safetensors", tensors, {}), NAMES, SHAPES)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_alpha_may_be_a_whole_number(dtype, tmp_path) -> None:
    """As `torch.tensor(16)` is."""
    tensors, note = LAYOUTS["kohya"]
    tensors = {
        name: each.to(dtype) if name.endswith(".alpha") else each for name, each in tensors.items()
    }

    branches = read(forge.write(tmp_path / "a.safetensors", tensors, note))

    assert {each.scale for each in branches.values()} == {ALPHA / RANK}
