"""FLUX.2 klein 4B, distilled and base: architecture, files, defaults and limits.

Every repository is pinned to a commit, every file to its size and SHA-256.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from app.domain import ModelSpec
from app.engine.models.entry import Architecture, ModelEntry, Rates, RemoteFile

_REPOSITORY = "black-forest-labs/FLUX.2-klein-4B"
_REVISION = "e7b7dc27f91deacad38e78976d1f2b499d76a294"
TOKENIZER = Path(__file__).parent / "data" / "qwen3-tokenizer"
"""Qwen3's tokenizer, for folders of others that hold none; tools/make_tokenizer.py writes it."""
TOKENIZER_WORDS = 151_669
"""Its ids are below this, so a text encoder needs at least as many embeddings."""


def _klein_file(path: str, size_bytes: int, sha256: str) -> RemoteFile:
    return RemoteFile(_REPOSITORY, _REVISION, path, size_bytes, sha256)


# A list, since the repository also has the transformer a second time, as one file of 7.75 GB.
_SHARED_FILES = """
model_index.json 446
  51a76cb1cf3ed37423a1128c79c22faee8e6fbe7f5aaeb737f0a258930dbaac0
scheduler/scheduler_config.json 486
  067afb012cef64553a763447d1efd93daeffcc0123ca7e25b09f8de20b90762e
text_encoder/config.json 1536
  214b4c29a0d975e9fddf9994a5673f22cb2c4c5750352f9227c2c3251ebeab40
text_encoder/generation_config.json 214
  4347b1aeed2b2b78bc059920a0b7f5fec71482e1344952b76d7665d638d71f13
text_encoder/model.safetensors.index.json 32855
  06b3d5319b6d76d1a4a2433419180016cfd54ed62d086a5e6567a809f8c82634
text_encoder/model-00001-of-00002.safetensors 4967215360
  8c0506e7f4936fa7e26183a4fd8da4e2bdbc5990ba64ae441f965d51228f36ea
text_encoder/model-00002-of-00002.safetensors 3077766632
  82f2bd839378541b0557bfabaf37c7d3d637071fdcb73302dedd7cf61162ce07
tokenizer/added_tokens.json 707
  c0284b582e14987fbd3d5a2cb2bd139084371ed9acbae488829a1c900833c680
tokenizer/chat_template.jinja 4168
  a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8
tokenizer/merges.txt 1671853
  8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5
tokenizer/special_tokens_map.json 613
  76862e765266b85aa9459767e33cbaf13970f327a0e88d1c65846c2ddd3a1ecd
tokenizer/tokenizer.json 11422654
  aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4
tokenizer/tokenizer_config.json 5404
  443bfa629eb16387a12edbf92a76f6a6f10b2af3b53d87ba1550adfcf45f7fa0
tokenizer/vocab.json 2776833
  ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910
transformer/config.json 541
  09733c74a3da6d17dd0a0472a091a8950c7c6935889c32c16cc800ede05029de
vae/config.json 821
  0d6dfb69ae95a5e2ac9836284bbb63d8b38ce67b25ba2dff380752b2a10ab948
vae/diffusion_pytorch_model.safetensors 168120878
  ca70d2202afe6415bdbcb8793ba8cd99fd159cfe6192381504d6c4d3036e0f04
"""

_SHARED = tuple(
    _klein_file(path, int(size_bytes), sha256)
    for path, size_bytes, sha256 in zip(*[iter(_SHARED_FILES.split())] * 3, strict=True)
)

_BF16 = _klein_file(
    "transformer/diffusion_pytorch_model.safetensors",
    7_751_109_744,
    "9f29f9edcfdae452a653ffb51a534ca4decd389952c225724ff3b94042612a6e",
)

_FP8 = RemoteFile(
    "black-forest-labs/FLUX.2-klein-4b-fp8",
    "5b4408e59397a4a37ccb46afe426d8ed86379441",
    "flux-2-klein-4b-fp8.safetensors",
    4_070_624_520,
    "97ed34fe0567e436200f2faee3939b88f2b5d99f8af2a4dc16532c4245c0ccb6",
)

_BASE = RemoteFile(
    "black-forest-labs/FLUX.2-klein-base-4B",
    "a3b4f4849157f664bdbc776fd7453c2783562f4d",
    "flux-2-klein-base-4b.safetensors",
    7_751_105_712,
    "9c5fed22b76baea749d88fc2abe3ad53245e7b21a0d353a762665eea00043b92",
)

FLUX2_KLEIN_4B = Architecture(
    heads=24,
    head_size=128,
    mlp_width=9216,
    double_blocks=5,
    single_blocks=20,
    timestep_channels=256,
    text_layers=(9, 18, 27),
    text_width=2560,
    text_mlp_width=9728,
    text_query_width=32 * 128,
    text_key_width=8 * 128,
    prompt_tokens=512,
    latent_channels=32,
    latent_side=8,
    # The transformer takes 2x2 latents as one token.
    token_side=16,
    decoder_widths=(512, 512, 256, 128),
    decoder_blocks=3,
    # As in `Flux2KleinPipeline`, with its time ids of `_prepare_image_ids`.
    reference_pixels=1024 * 1024,
    reference_time=10,
    scheduler=MappingProxyType(
        {
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "time_shift_type": "exponential",
        }
    ),
    exact_pixels=1_310_720,
    large_tile=104,
    graph_tokens=2560,
    graph_pixels=256 * 256,
    # Measured on an H200 at 1024x1024 with random weights: memory does not depend on their values.
    with_kernels=Rates(
        token=83_000,
        pixel=1_280,
        encoded_pixel=1_500,
        tiles=440_000_000,
        text=300_000_000,
        margin=250_000_000,
    ),
    without_kernels=Rates(
        token=133_000,
        pixel=2_450,
        encoded_pixel=2_000,
        tiles=850_000_000,
        text=300_000_000,
        margin=300_000_000,
    ),
    working_bytes=4_000_000_000,
    small_bytes=1_000_000_000,
)

KLEIN = ModelEntry(
    spec=ModelSpec(
        id="flux.2-klein-4b",
        title="FLUX.2 [klein] 4B",
        hub_id=_REPOSITORY,
        owned_by="black-forest-labs",
        created=1_768_435_200,
        licence="Apache-2.0",
        default_width=1024,
        default_height=1024,
        default_steps=4,
        max_steps=50,
        default_guidance=1.0,
        max_guidance=1.0,
        min_side=64,
        max_side=4096,
        max_pixels=4_194_304,
        max_references=4,
        max_sequence_length=FLUX2_KLEIN_4B.prompt_tokens,
        size_multiple=FLUX2_KLEIN_4B.token_side,
    ),
    architecture=FLUX2_KLEIN_4B,
    shared=_SHARED,
    transformers=MappingProxyType({"fp8": _FP8, "bf16": _BF16}),
)

KLEIN_BASE = ModelEntry(
    spec=replace(
        KLEIN.spec,
        id="flux.2-klein-base-4b",
        title="FLUX.2 [klein] Base 4B",
        hub_id=_BASE.repository,
        default_steps=50,
        max_steps=100,
        default_guidance=4.0,
        max_guidance=20.0,
        note=(
            "Only the transformer is the base variant's own; text encoder, VAE and tokenizer are "
            "those of FLUX.2-klein-4B, whose equality has not been established."
        ),
    ),
    architecture=FLUX2_KLEIN_4B,
    shared=_SHARED,
    transformers=MappingProxyType({"fp8": _BASE, "bf16": _BASE}),
)
