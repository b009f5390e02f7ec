"""The response of `POST /generate`: the headers that come with the image's bytes."""

from __future__ import annotations

import math

from app.api.schema import loras
from app.service.results import Picture


def response_headers(picture: Picture, request_id: str) -> dict[str, str]:
    """Return the headers that describe the image and its timing."""
    found = {
        "X-Request-Id": request_id,
        "X-Klein-Seed": str(picture.seed),
        "X-Klein-Device": picture.device,
        "Server-Timing": server_timing(picture),
    }
    if picture.peak is not None:
        found["X-Klein-Peak-Vram-Bytes"] = str(picture.peak.reserved)
    found |= loras.headers(picture.loras)
    if picture.warnings:
        found["X-Klein-Warnings"] = "; ".join(picture.warnings)
    return found


def server_timing(picture: Picture) -> str:
    """Format the stages' durations in milliseconds as Server-Timing, which browsers show."""
    return ", ".join(
        f"{stage};dur={seconds * 1000:.3f}"
        for stage, seconds in picture.seconds.items()
        if math.isfinite(seconds)
    )
