"""The engine's configuration: plain data that is sent to the worker process."""

from __future__ import annotations

from dataclasses import dataclass

from app.domain import Device, Lora


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings that the engine needs."""

    model: str
    """A key of `app.engine.models.registry`; it decides names, defaults and limits."""
    path: str | None
    """A local folder or file given by the operator, or None for the registered model's files."""
    cache_dir: str
    """The folder of downloads, quantized weights and compiled code."""
    device: int | None
    """torch's index of the card in the worker, or None for the CPU."""
    precision: str = "auto"
    """`auto`, `fp8`, `int8`, `bf16` or `fp32`."""
    attention: str = "auto"
    """`auto`, or a name of `app.engine.modules.attention.KERNELS`."""
    offload: str = "auto"
    """`auto`, `none`, `model` or `disk`."""
    plan: str = "auto"
    """`auto`, or a name of `app.engine.memory.planner.PLANS`."""
    memory_bytes: int | None = None
    """GPU memory that this process may allocate, or None for what is free."""
    prompt_cache: int = 32
    """Capacity of the prompt cache in host memory, in prompts of 8 MB each; 0 disables it."""
    reference_cache: int = 32
    """Capacity of the reference cache in host memory, in megapixels of 1 MB each; 0 disables it."""
    download_silence_s: float = 120.0
    """Seconds without a received byte after which a download fails."""
    cache_max_bytes: int = 0
    """What the cache may take; above it derived files are deleted after a load. 0: no limit."""
    max_pixels: int = 4_194_304
    """The operator's limit of an output's size, in pixels; the memory plan may set a lower one."""
    lora_rank: int = 0
    """The rank of adapters for which GPU memory is planned; with 0 they take what a plan leaves."""
    lora_fuse: tuple[Lora, ...] = ()
    """Adapters that are added to the weights before these are quantized."""
    vae: str | None = None
    """A file with another VAE, given by the operator, or None for the model's."""
    worker: int = 0
    """The worker's place among those of the service."""
    place: Device | None = None
    """What the worker's process is confined to; None leaves it as it is."""
