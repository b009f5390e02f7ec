"""Single kernels at klein's sizes: what the denoiser, the encoder and the decoder could cost."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch.nn import functional

from app.engine.modules.attention import WideHeadProcessor
from app.engine.modules.fused_vae import fuse_vae
from benchmarks.rows import Bench
from tools.random_weights import FULL, TINY


def measure(bench: Bench) -> None:
    """Print a line for each; nothing is written down."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    for part in (_ceilings, _attention, _products, _decoders):
        try:
            with torch.no_grad():
                part(bench, device, dtype)
        except Exception:
            traceback.print_exc()


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median-like seconds of *run*: events around many calls, the best of three rounds."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    best = float("inf")
    for _ in range(3):
        start, end = _event(), _event()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / repeats)
    return best


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _say(name: str, taken: float, flops: float = 0.0) -> None:
    rate = f" {flops / taken / 1e12:7.0f} TFLOP/s" if flops else ""
    print(f"  {name:64s} {taken * 1000:9.3f} ms{rate}", flush=True)


def _ceilings(bench: Bench, device: str, dtype: torch.dtype) -> None:
    size = 256 if bench.is_tiny else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    _say(f"bf16 product {size}", seconds(lambda: a @ b), 2 * size**3)
    big = torch.randn(1 << (20 if bench.is_tiny else 29), device=device)
    taken = seconds(lambda: big.clone())
    print(f"  copy {big.nbytes * 2 / taken / 1e9:.0f} GB/s", flush=True)


def _attention(bench: Bench, device: str, dtype: torch.dtype) -> None:
    heads, size = (2, 32) if bench.is_tiny else (24, 128)
    kernels: dict[str, Callable[..., object]] = {
        "torch's choice": functional.scaled_dot_product_attention
    }
    if device == "cuda":
        aten = torch.ops.aten
        kernels["flash"] = aten._scaled_dot_product_flash_attention
        kernels["cudnn"] = lambda *qkv: aten._scaled_dot_product_cudnn_attention(*qkv, None, False)
        kernels["efficient"] = lambda *qkv: aten._scaled_dot_product_efficient_attention(
            *qkv, None, False
        )
    for length in (96,) if bench.is_tiny else (1536, 4608, 16896):
        q, k, v = (
            torch.randn(1, length, heads, size, device=device, dtype=dtype).transpose(1, 2)
            for _ in range(3)
        )
        for name, kernel in kernels.items():
            try:
                taken = seconds(partial(kernel, q, k, v), 5)
                _say(f"attention {length} {name}", taken, 4 * heads * size * length**2)
            except Exception as error:
                print(f"  attention {length} {name}: {str(error)[:150]}", flush=True)


def _products(bench: Bench, device: str, dtype: torch.dtype) -> None:
    if device == "cpu":
        return
    one = torch.ones((), device=device)
    for length, width, out in (
        (4608, 3072, 27648),
        (4608, 12288, 3072),
        (4096, 3072, 18432),
        (4096, 9216, 3072),
        (4096, 3072, 9216),
        (4096, 3072, 3072),
        (512, 3072, 18432),
        (1536, 3072, 27648),
    ):
        flops = 2 * length * width * out
        x = torch.randn(length, width, device=device, dtype=dtype)
        w = torch.randn(out, width, device=device, dtype=dtype)
        taken = seconds(partial(functional.linear, x, w))
        _say(f"bf16 {length}x{width}x{out}", taken, flops)
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        right = x8.float() @ w8.float().t()
        for fast in (True, False):

            def multiply(x8: Any = x8, w8: Any = w8, fast: bool = fast) -> torch.Tensor:
                return torch._scaled_mm(x8, w8.t(), one, one, out_dtype=dtype, use_fast_accum=fast)

            error = float((multiply().float() - right).norm() / right.norm())
            name = f"fp8 {length}x{width}x{out} fast_accum={fast} error {error:.4f}"
            _say(name, seconds(multiply), flops)


def _decoders(bench: Bench, device: str, dtype: torch.dtype) -> None:
    shape = TINY if bench.is_tiny else FULL
    side = bench.side // 8
    with torch.device(device):
        vae = AutoencoderKLFlux2(**shape.vae).to(dtype).eval()
        latents = torch.randn(1, vae.config.latent_channels, side, side, dtype=dtype)
    _say("decode, eager", seconds(lambda: vae.decoder(latents), 3))
    for attention in vae.decoder.mid_block.attentions:
        attention.set_processor(WideHeadProcessor())
    _say("decode, eager, plain attention", seconds(lambda: vae.decoder(latents), 3))
    fuse_vae(vae)
    _say("decode, our passes", seconds(lambda: vae.decoder(latents)))
