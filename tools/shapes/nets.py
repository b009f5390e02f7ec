"""The three networks at their small sizes, and what surrounds them: positions, patches, latents.

The networks are diffusers' and transformers' own classes, so that the checkpoint loads as klein's
does. All sizes were chosen to fit in 10 MB at 16 bits (see docs/shapes.md).
"""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from tools.shapes.linear_start import start_linear
from tools.shapes.vocabulary import SEQUENCE_LENGTH, SPECIAL_TOKENS, VOCABULARY_SIZE

# klein reads the hidden states after layers 9, 18 and 27; with a 28th layer above them the last of
# the three is not yet normalised, as in the full model.
READ_LAYERS = (9, 18, 27)
TEXT_LAYERS = 28
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
TOKEN_PIXELS = 16
REFERENCE_TIME = 10


class Rotary(NamedTuple):
    """Cosines and sines of rotary positions, [tokens, head width]."""

    cos: Tensor
    sin: Tensor


def build_codec() -> AutoencoderKLFlux2:
    """The autoencoder: klein's layout with narrow blocks and half of its latent channels.

    Its groups are wide: with two channels to a group, as eight groups would have in the last block,
    normalisation takes away every flat colour.
    """
    codec = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=512,
    )
    start_linear(codec)
    return codec


def build_text_encoder() -> Qwen3ForCausalLM:
    """Qwen3 with one layer more than klein reads, all of them narrow."""
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=96,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY_SIZE - len(SPECIAL_TOKENS) + 2,
        pad_token_id=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
    )
    model = Qwen3ForCausalLM(config)
    # Residual branches start small: 27 layers deep, the sum should begin near the embeddings.
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(linear.weight, std=0.02 / (2 * TEXT_LAYERS) ** 0.5 * 4)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(linear.weight, std=TEXT_WIDTH**-0.5)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            nn.init.normal_(linear.weight, std=TEXT_WIDTH**-0.5)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def build_transformer() -> Flux2Transformer2DModel:
    """klein's transformer: two double blocks and six single ones instead of five and twenty."""
    model = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=len(READ_LAYERS) * TEXT_WIDTH,
        timestep_guidance_channels=64,
        mlp_ratio=2.0,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        if "modulation" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(parameter)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """klein's scheduler, number for number."""
    return FlowMatchEulerDiscreteScheduler(**FLUX2_KLEIN_4B.scheduler)


def text_rotary(model: Qwen3ForCausalLM) -> Rotary:
    """A prompt's positions; taken before the model is cast, since they need full precision."""
    positions = torch.arange(SEQUENCE_LENGTH)[None]
    return Rotary(*model.model.rotary_emb(torch.zeros(1), positions))


def rotary_for(
    model: Flux2Transformer2DModel, rows: int, columns: int, *, references: int = 0
) -> Rotary:
    """Positions of the text, the image tokens and as many references of the same size."""
    words = torch.arange(SEQUENCE_LENGTH)
    ids = [torch.cartesian_prod(torch.zeros(1).long(), *[torch.zeros(1).long()] * 2, words)]
    for index in range(references + 1):
        time = torch.tensor([REFERENCE_TIME * index])
        grid = (torch.arange(rows), torch.arange(columns), torch.zeros(1).long())
        ids.append(torch.cartesian_prod(time, *grid))
    parts = [model.pos_embed(part) for part in ids]
    return Rotary(torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts]))


def patchify(latents: Tensor) -> Tensor:
    """Latents [n, c, h, w] as patches of 2 x 2, [n, 4c, h/2, w/2], in klein's order."""
    n, c, h, w = latents.shape
    folded = latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return folded.reshape(n, 4 * c, h // 2, w // 2)


def unpatchify(patches: Tensor) -> Tensor:
    """The reverse of `patchify`."""
    n, c, h, w = patches.shape
    unfolded = patches.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return unfolded.reshape(n, c // 4, 2 * h, 2 * w)


def encode_tokens(codec: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """Images in 0..1 as normalised latent tokens [n, rows x columns, 64]."""
    # On a processor convolutions run several times faster with channels last.
    pictures = (images * 2 - 1).to(codec.dtype, memory_format=torch.channels_last)
    patches = patchify(codec.encode(pictures).latent_dist.mode().float())
    mean, deviation = _statistics(codec)
    return ((patches - mean) / deviation).flatten(2).transpose(1, 2)


def decode_tokens(codec: AutoencoderKLFlux2, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Normalised latent tokens as images in 0..1."""
    mean, deviation = _statistics(codec)
    patches = torch.unflatten(tokens.transpose(1, 2), 2, (rows, columns)) * deviation + mean
    images: Tensor = codec.decode(unpatchify(patches)).sample
    return (images / 2 + 0.5).clamp(0, 1)


def _statistics(codec: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    mean = codec.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(codec.bn.running_var.view(1, -1, 1, 1) + codec.config.batch_norm_eps)
    return mean, deviation
