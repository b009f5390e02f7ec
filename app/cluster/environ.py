"""What Ray's processes must find in their environment: what `ray start` is given on every node.

Serve reads these when its processes start, so they cannot stand in its YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.settings import Settings

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
HTTP_PORTS = (30_000, 31_000)
"""Where replicas listen in HAProxy mode: Ray's own defaults, which `docs/scale.md` tells."""
_LAST_ANSWERS_S = 60


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable, and why it has this value."""

    name: str
    value: str
    reason: str


def variables(settings: Settings) -> tuple[Variable, ...]:
    """List what to export before `ray start`, the same on every node."""
    longest_s = math.ceil(settings.deadline_s) + _LAST_ANSWERS_S
    return (
        Variable(
            "RAY_AUTH_MODE", "token", "else whoever reaches a port of Ray's runs programs here"
        ),
        Variable("RAY_USAGE_STATS_ENABLED", "0", "Ray reports its usage to its makers otherwise"),
        Variable(HAPROXY, "1", "HAProxy in front of the replicas instead of a proxy in Python"),
        Variable(
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
            "0",
            "the service blocks no event loop, and a thread of its own costs each answer two hops",
        ),
        Variable(
            "RAY_SERVE_HAPROXY_RETRY_ON",
            "conn-failure 503",
            "a replica that takes nothing now, its worker being restarted, says so with 503",
        ),
        Variable(
            "RAY_SERVE_HAPROXY_RETRIES", "2", "two more replicas are asked, then the 503 goes out"
        ),
        Variable(
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
            str(longest_s),
            "HAProxy is reloaded when replicas come and go, and cuts older streams after this",
        ),
    )


def has_haproxy(environ: Mapping[str, str]) -> bool:
    """Whether Serve runs in HAProxy mode, in which every replica listens on every address."""
    return environ.get(HAPROXY) == "1"


def exports(found: tuple[Variable, ...]) -> list[str]:
    """Return lines for a shell's `eval`; each has its reason as a comment before it."""
    return [
        line
        for each in found
        for line in (f"# {each.reason}", f"export {each.name}={_quoted(each.value)}")
    ]


def _quoted(value: str) -> str:
    return f"'{value}'" if " " in value else value
