"""The same tiny weights, laid out as others distribute them, and what is made from them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from app.domain import ImageSpec
from app.engine.checkpoint.bfl import rules
from app.engine.checkpoint.detect import open_checkpoint
from app.engine.config import EngineConfig
from app.engine.load import LoadedModel, load
from app.engine.memory.planner import Plan
from app.engine.models.registry import find_model, find_spec
from app.engine.modules.attention import plain_attention
from app.engine.pipeline import build as pipeline_build
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.denoise import denoise, draw_noise
from app.engine.pipeline.references import References
from app.engine.pipeline.text import encode_text
from app.engine.quantization.formats import FORMATS
from app.engine.runtime.kernels_choice import EXACT
from tests.support.single_files import WEIGHTS, is_block_linear, to_bfl

SPEC = ImageSpec("a red circle", 64, 96, 2, 1.0, 7)
TOKENS = 64
"""An eighth of klein's, where their number matters only for the time that a text takes."""


def load_model(
    path: Path, precision: str = "fp32", cache: Path | None = None, **more
) -> LoadedModel:
    """Load without the warm-up."""
    config = EngineConfig(
        "flux.2-klein-4b", str(path), str(cache or path.parent / "cache"), None, precision, **more
    )
    model = replace(find_spec(config.model), max_sequence_length=TOKENS)
    return load(config, model, lambda _: None)


def latents(loaded: LoadedModel) -> torch.Tensor:
    """Go through text and denoising."""
    return _latents(loaded.components, SPEC).float()


def latents_of(components: PipelineComponents, side: int, prompt: str) -> torch.Tensor:
    """The same for *parts* that were built without a config."""
    return _latents(components, replace(SPEC, width=side, height=side, prompt=prompt))


@torch.no_grad()
def _latents(components: PipelineComponents, spec: ImageSpec) -> torch.Tensor:
    return denoise(
        components,
        spec,
        encode_text(components, spec),
        References(),
        draw_noise(components, spec),
        on_step=lambda *_: None,
        is_cancelled=lambda: False,
    )


def build(path: Path, **changes) -> PipelineComponents:
    """Build the networks as *changes* of `BuildOptions` say, without a config or a plan.

    Formats are given by name.
    """
    values = {
        "architecture": find_model("flux.2-klein-4b").architecture,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "vae_dtype": changes.get("dtype", torch.float32),
        "linears": "fp8",
        "encoder_linears": "int8w",
        "attention": plain_attention,
        "kernels": EXACT,
        "plan": Plan.RESIDENT,
        "is_pinned": True,
        "prompt_cache": 2,
        "reference_cache": 0,
        "quantized_cache": None,
        "max_sequence_length": TOKENS,
        "is_distilled": True,
    } | changes
    for name in ("linears", "encoder_linears"):
        values[name] = FORMATS[values[name]]
    checkpoint = open_checkpoint(path)
    with checkpoint.files:
        return pipeline_build.build(
            checkpoint, pipeline_build.BuildOptions(**values), lambda _: None
        )


def fold_scales(folder: Path, target: Path) -> Path:
    """Copy *folder* with each block weight quantized to fp8 and dequantized again."""
    shutil.copytree(folder, target)
    path = target / "transformer" / WEIGHTS
    tensors = load_file(path)
    theirs = {}
    for name, value in to_bfl(folder).items():
        if is_block_linear(name):
            quantized, scale = quantize(value)
            value = quantized.float() * scale
        theirs[name] = value
    config = json.loads((folder / "transformer" / "config.json").read_text())
    for rule in rules(config["num_layers"], config["num_single_layers"]):
        tensors[rule.our_name] = rule.take(theirs[rule.their_name]).contiguous()
    save_file(tensors, path)
    return target


def quantize(value: torch.Tensor, *, rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to fp8 with one scale, or one for each row."""
    peak = value.abs().amax(dim=1) if rows else value.abs().amax()
    scale = peak.float() / 448
    spread = scale[:, None] if rows else scale
    return (value.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def spell_fp8(folder: Path, path: Path, spelling: str) -> Path:
    """Write the transformer in fp8 with its scales in one of the known spellings."""
    prefix = "model.diffusion_model." if spelling.startswith("prefix") else ""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in to_bfl(folder).items():
        if not is_block_linear(name):
            tensors[prefix + name] = value
            continue
        module = prefix + name.removesuffix(".weight")
        tensors[f"{module}.weight"], scale = quantize(value, rows="rows" in spelling)
        if spelling == "one element":
            scale = scale.reshape(1)
        elif spelling == "rows as a column":
            scale = scale.reshape(-1, 1)
        old = spelling == "old"
        tensors[f"{module}.{'scale_weight' if old else 'weight_scale'}"] = scale
        tensors[f"{module}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(0.05)
        note = {"notes": b'{"format": "float8_e4m3fn"}\0\0', "empty notes": b"\0" * 16}
        if spelling in note:
            tensors[f"{module}.comfy_quant"] = torch.tensor(list(note[spelling]), dtype=torch.uint8)
    if spelling == "old":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    return path


def to_comfy(folder: Path, target: Path, vae: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Lay *folder* out as ComfyUI's models folder."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        (target / name).mkdir(parents=True)
    shutil.copytree(folder / "tokenizer", target / "tokenizer")
    save_file(to_bfl(folder), target / "diffusion_models" / "flux-2-klein-4b.safetensors")
    encoder = folder / "text_encoder" / "model.safetensors"
    shutil.copy(encoder, target / "text_encoders" / "qwen_3_4b.safetensors")
    tensors = dict(vae or load_file(folder / "vae" / WEIGHTS))
    save_file(tensors, target / "vae" / "flux2-vae.safetensors")
    return target


def bfl_vae(folder: Path) -> dict[str, torch.Tensor]:
    """Name a VAE's tensors as `ae.safetensors` does: attention as convolutions of one pixel."""
    tensors = load_file(folder / "vae" / WEIGHTS)
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if "up_blocks" in name)
    return {
        _ldm_name(name, blocks): value[:, :, None, None].contiguous()
        if ".attentions." in name and value.ndim == 2
        else value
        for name, value in tensors.items()
    }


_LDM = (
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def _ldm_name(name: str, blocks: int) -> str:
    for pattern, words in _LDM:
        name = re.sub(pattern, words, name)
    found = re.search(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", name)
    if found is None:
        return name
    word = "block" if found[2] == "resnets" else "upsample"
    return name.replace(found[0], f"up.{blocks - 1 - int(found[1])}.{word}")
