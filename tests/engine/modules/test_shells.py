"""Our networks without passes have the names, shapes and numbers of the libraries' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from app.domain import RawImage
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.modules import flux2_shell, vae_shell
from app.engine.modules.qwen3_layers import Rotary, layer_shapes
from app.engine.pipeline import image_tensors
from app.engine.pipeline.schedule import make_schedule
from tests.support.imported_modules import unwanted

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
SMALL = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


def shapes(network) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in network.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embeds": False, "mlp_ratio": 2.5},
        {"out_channels": 4, "patch_size": 2},
    ],
)
def test_the_transformer_has_diffusers_weights(changes) -> None:
    """Every name and shape, those of the blocks included."""
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(**SMALL | changes)
        ours = flux2_shell.Flux2Transformer2DModel(**SMALL | changes)

    assert shapes(ours) | dict(ours.block_shapes()) == shapes(theirs)
    assert (ours.eps, ours.inner_dim) == (1e-6, theirs.inner_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"decoder_block_out_channels": (8, 8, 16, 24), "layers_per_block": 1},
    ],
)
def test_the_vae_has_diffusers_weights(changes) -> None:
    """Every name and shape, and what a fused pass reads of a module besides."""
    sizes = {"block_out_channels": (8, 16, 16, 24), "latent_channels": 4, "norm_num_groups": 4}
    with torch.device("meta"):
        theirs = AutoencoderKLFlux2(**sizes | changes)
        ours = vae_shell.AutoencoderKLFlux2(**sizes | changes)

    assert shapes(ours) == shapes(theirs)
    for mine, right in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        kept = {name: each for name, each in right.named_modules() if hasattr(each, "num_groups")}
        norms = {name: each for name, each in mine.named_modules() if hasattr(each, "num_groups")}
        assert {name: (each.num_groups, each.eps) for name, each in norms.items()} == {
            name: (each.num_groups, each.eps) for name, each in kept.items()
        }
        assert mine.mid_block.attentions[0].scale == right.mid_block.attentions[0].scale


@pytest.mark.parametrize(
    "changes", [{"act_fn": "relu"}, {"mid_block_add_attention": False}, {"down_block_types": ["A"]}]
)
def test_another_kind_of_vae_is_refused(changes) -> None:
    """Our passes are not its."""
    with pytest.raises(ValueError, match="another kind"):
        vae_shell.AutoencoderKLFlux2(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_surrounds_the_blocks_computes_what_diffusers_does(dtype) -> None:
    """Bit by bit, so that only the blocks decide what differs."""
    torch.manual_seed(0)
    theirs = Flux2Transformer2DModel(**SMALL).to(dtype)
    ours = flux2_shell.Flux2Transformer2DModel(**SMALL).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    ids = torch.randint(0, 90, (40, 4))
    x = torch.randn(1, 5, 32).to(dtype)
    for made, right in zip(ours.pos_embed(ids), theirs.pos_embed(ids), strict=True):
        assert torch.equal(made, right)
    for time in (1000.0, 737.5, 0.0):
        timestep = torch.tensor([time]).to(dtype)
        right = theirs.time_guidance_embed(timestep, None)
        assert torch.equal(ours.time_guidance_embed(timestep, None), right)
        for name in ("double_stream_modulation_img", "single_stream_modulation"):
            assert torch.equal(getattr(ours, name)(right), getattr(theirs, name)(right))
        assert torch.equal(ours.norm_out(x, right), theirs.norm_out(x, right))


def test_the_text_encoder_has_transformers_weights_and_angles() -> None:
    """Names and shapes of a layer; cos and sin bit by bit."""
    config = Qwen3Config(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    positions, like = torch.arange(50)[None], torch.ones(1, dtype=torch.bfloat16)
    rotary = Rotary(config.head_dim, config.rope_parameters["rope_theta"])
    with torch.device("meta"):
        layer = Qwen3DecoderLayer(config, 0)

    assert layer_shapes(config) == shapes(layer)
    right = Qwen3RotaryEmbedding(config)(like, positions)
    assert all(map(torch.equal, rotary(like, positions), right))


@pytest.mark.parametrize(
    "changes", [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False}]
)
def test_the_steps_are_those_of_diffusers_scheduler(changes) -> None:
    """Bit by bit; of a config that klein does not have diffusers itself is asked."""
    config = {**FLUX2_KLEIN_4B.scheduler, **changes}
    schedule = make_schedule(config, CPU)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    for steps, tokens in ((1, 256), (4, 4096), (50, 4300), (28, 16384)):
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        sigmas, timesteps = schedule(steps, tokens)
        assert torch.equal(sigmas, scheduler.sigmas)
        assert torch.equal(timesteps, scheduler.timesteps)


@pytest.mark.parametrize("size", [(65, 200), (1500, 900)])
def test_references_are_read_as_diffusers_reads_them(size) -> None:
    """Scaled, cut and normed: bit by bit."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture, processor = Image.fromarray(noise), Flux2ImageProcessor(vae_scale_factor=16)
    raw = RawImage(*size, noise.tobytes())
    scaled = processor._resize_if_exceeds_area(picture, 1024 * 1024)
    width, height = (side // 16 * 16 for side in scaled.size)
    right = processor.preprocess(scaled, height=height, width=width, resize_mode="crop")

    made = image_tensors.reference_tensor(raw, FLUX2_KLEIN_4B)
    assert torch.equal(made, right)
    # Convolutions round by the layout.
    assert made.stride() == right.stride()
    cut = RawImage(64, 48, noise[:48, :64].tobytes())
    right = processor.preprocess(Image.fromarray(noise[:48, :64]), height=48, width=64)
    assert torch.equal(image_tensors.source_tensor(cut), right)


@pytest.mark.full
def test_a_start_over_our_kernels_imports_neither_compiler_nor_networks(
    tiny_klein: Path, tmp_path: Path
) -> None:
    """They take ten seconds of a start, and nothing of them would run."""
    assert not unwanted(tiny_klein, "cpu", tmp_path)
