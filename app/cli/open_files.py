"""The limit of open files: as many as the process's connections need, where it may raise it."""

from __future__ import annotations

import resource

WANTED = 2048


def raise_limit(wanted: int = WANTED) -> int:
    """Raise the soft limit to *wanted*, within the hard limit; return the resulting limit.

    Shells and containers often start with 1,024 or 256, far below what they would allow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    except (OSError, ValueError):  # macOS has a limit of its own below the hard one
        return soft
    return possible
