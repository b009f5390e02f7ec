"""diffusers' own pipeline with the same architecture, in the same run: what there is to beat."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from benchmarks.rows import Bench, used_bytes
from tools.random_weights import FULL, TINY


def measure(bench: Bench) -> None:
    """On the card, then offloaded as the model card says."""
    pipeline = _build(bench)
    before = used_bytes()
    if torch.cuda.is_available():
        pipeline.to("cuda")
    for side, repeats in ((bench.side, 8), (bench.side // 2, 5), (bench.side * 2, 2)):
        _series(bench, pipeline, side, repeats, "diffusers.bf16", before)
    if torch.cuda.is_available():
        pipeline.to("cpu")
        torch.cuda.empty_cache()
        pipeline.enable_model_cpu_offload()
        _series(bench, pipeline, bench.side, 2, "diffusers.offload", before)


def _series(
    bench: Bench,
    pipeline: Flux2KleinPipeline,
    side: int,
    repeats: int,
    name: str,
    before: int | None,
) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(repeats + 1):
        begun = time.perf_counter()
        pipeline(
            prompt=f"picture {number}",
            width=side,
            height=side,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(1),
        )
        seconds.append(time.perf_counter() - begun)
    is_gpu = torch.cuda.is_available()
    bench.write(
        name,
        seconds[1:],
        width=side,
        height=side,
        precision="bf16",
        plan="offload" if name.endswith("offload") else "resident",
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if is_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if is_gpu else None,
        nvml_bytes=used_bytes(),
        nvml_bytes_before=before,
        seed=1,
    )


def _build(bench: Bench) -> Flux2KleinPipeline:
    """Random weights need no file: they are drawn where they will be used."""
    shape = TINY if bench.is_tiny else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            networks = {
                "transformer": Flux2Transformer2DModel(**shape.transformer),
                "text_encoder": Qwen3ForCausalLM(Qwen3Config(**shape.encoder)),
                "vae": AutoencoderKLFlux2(**shape.vae),
            }
    finally:
        torch.set_default_dtype(default)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX2_KLEIN_4B.scheduler),
        tokenizer=Qwen2Tokenizer.from_pretrained(_tokenizer(bench.folder)),
        is_distilled=True,
        **{name: network.eval() for name, network in networks.items()},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer(folder: Path) -> Path:
    return folder / "tokenizer"
