"""What the engine is told: plain data that crosses into the worker process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that the engine may know of the settings."""

    model: str
    """A key of `app.engine.models.registry`; it decides names, defaults and limits."""
    path: str | None
    """A local folder or file given by the operator, or None for the catalogue's own files."""
    cache_dir: str
    """Where downloads and converted weights lie."""
    device: int | None
    """Index of the CUDA card, or None for the CPU."""
    precision: str = "auto"
    """`auto`, `fp8`, `int8`, `bf16` or `fp32`."""
    offload: str = "auto"
    """`auto`, `none`, `model` or `disk`."""
    plan: str = "auto"
    """`auto`, or a name of `app.engine.memory.planner.PLANS`."""
    memory_bytes: int | None = None
    """The most that this process may take of the card, or None for what is free."""
    prompt_cache: int = 32
    """How many prompts' embeddings are kept in host memory, 8 MB each; 0 keeps none."""
    download_silence_s: float = 120.0
    """Seconds without a byte after which a download is given up."""
    max_pixels: int = 4_194_304
    """The operator's limit of one output, in pixels; the memory plan may set a lower one."""
