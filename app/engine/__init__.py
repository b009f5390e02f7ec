"""The inference engine: everything that imports torch; it knows no queue, process or HTTP.

This module itself does not import torch, so the HTTP process may import its names. The worker
process calls `create_engine`, and only then is torch imported.
"""

from __future__ import annotations

from app.domain import Engine
from app.engine.config import EngineConfig

_ENGINE = "app.engine.engine"
_LIBRARIES = (
    "transformers.models.qwen3.modeling_qwen3",
    "diffusers.models.autoencoders.autoencoder_kl_flux2",
    "diffusers.models.transformers.transformer_flux2",
)
"""The libraries' own networks, which run on the CPU; ours replace them on a card."""


def imports(device: int | None) -> tuple[str, ...]:
    """Return the modules that an engine on *device*, as in `EngineConfig`, will import."""
    return (_ENGINE,) if device is not None else (_ENGINE, *_LIBRARIES)


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine for *config* inside the worker process."""
    from app.engine.engine import KleinEngine
    from app.engine.hub.trust import close_umask

    close_umask()
    return KleinEngine(config)
