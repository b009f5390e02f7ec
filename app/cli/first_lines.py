"""What `klein serve` says before the model is loaded: what it needs, and who can reach it."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing, suppress

from app.engine.hub.download import missing_bytes
from app.engine.models.registry import find_model
from app.engine.quantization.formats import AUTO, FORMATS
from app.model_choice import Choice
from app.settings import Settings

_ELSEWHERE = ("192.0.2.1", 9)
"""An address that is nobody's (RFC 5737); nothing is sent there."""


def needs(settings: Settings, choice: Choice) -> str:
    """Say what the start takes: memory, a card, a download."""
    if choice.is_demo:
        return "Needs 1 GB of host memory and no download; the demo model comes with the package."
    room = "4.5 GB of host memory while it loads, and a card of 6 GB or more"
    if choice.path is not None:
        return f"Needs {room}; the model's files are those that KLEIN_MODEL names."
    missing = _missing_bytes(settings, choice)
    if not missing:
        return f"Needs {room}; the model's files are in {settings.cache_dir}."
    return f"Needs {room}; up to {missing / 1e9:.1f} GB are downloaded to {settings.cache_dir}."


def _missing_bytes(settings: Settings, choice: Choice) -> int:
    """Return the bytes to download; the most that they may be where the precision is not known."""
    entry = find_model(choice.key)
    kinds = set(entry.transformers)
    if settings.engine_precision != AUTO:
        kinds &= {FORMATS[settings.engine_precision].file}
    return max((missing_bytes(entry, settings.cache_dir, kind) for kind in kinds), default=0)


def reach(host: str, port: int, settings: Settings) -> str:
    """Say who can reach the address that the service listens at, and how."""
    if ipaddress.ip_address(host).is_loopback:
        return (
            "Only programs on this machine reach it; for other devices there is --host 0.0.0.0 "
            "with a key (docs/network.md)."
        )
    own = _own_address(host) if ipaddress.ip_address(host).is_unspecified else host
    where = f"[{own}]" if ":" in own else own
    who = "with a key" if settings.api_keys else "WITHOUT a key"
    return f"Other devices reach it at http://{where}:{port}, {who}."


def _own_address(host: str) -> str:
    """Return this machine's address in its network; *host* where there is none."""
    with suppress(OSError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect(_ELSEWHERE)
        return str(probe.getsockname()[0])
    return host
