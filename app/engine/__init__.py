"""The inference engine: everything that imports torch; it knows no queue, process or HTTP.

This module itself does not import torch, so the HTTP process may import its names. The worker
process calls `create_engine`, and only then is torch imported.
"""

from __future__ import annotations

from app.domain import Engine
from app.engine.config import EngineConfig


def create_engine(config: EngineConfig) -> Engine:
    """Build the engine for *config* inside the worker process."""
    from app.engine.engine import KleinEngine
    from app.engine.hub.trust import close_umask

    close_umask()
    return KleinEngine(config)
