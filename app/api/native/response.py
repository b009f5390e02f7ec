"""`POST /generate`, out: headers beside the picture's bytes."""

from __future__ import annotations

import math

from app.service.results import Picture


def response_headers(picture: Picture, request_id: str) -> dict[str, str]:
    """Say beside the bytes what was made and where the time went."""
    found = {
        "X-Request-Id": request_id,
        "X-Klein-Seed": str(picture.seed),
        "Server-Timing": server_timing(picture),
    }
    if picture.peak is not None:
        found["X-Klein-Peak-Vram-Bytes"] = str(picture.peak.reserved)
    if picture.warnings:
        found["X-Klein-Warnings"] = "; ".join(picture.warnings)
    return found


def server_timing(picture: Picture) -> str:
    """Write the stages in milliseconds, as browsers show them."""
    return ", ".join(
        f"{stage};dur={seconds * 1000:.3f}"
        for stage, seconds in picture.seconds.items()
        if math.isfinite(seconds)
    )
