"""Everything that knows torch. This package's head does not: the HTTP process may import it for its
names.

`create_engine` is what the worker process calls; only then is torch imported.
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
