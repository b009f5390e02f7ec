"""Gives memory back to the system: what glibc's `malloc` would keep of large pictures.

A freed block of some megabytes raises glibc's threshold for blocks of their own up to 32 MB; from
then on pictures lie in the arenas, of which each thread may have one and none shrinks. So the
threshold is fixed, below the smallest picture that matters, and the arenas are few.
"""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_LIMITS = {
    _M_MMAP_THRESHOLD: 2 * 1024 * 1024,
    _M_TRIM_THRESHOLD: 8 * 1024 * 1024,
    _M_ARENA_MAX: 4,
}


def bound_heap() -> bool:
    """Set the limits for this process; whether its C library knows them. Others, such as musl's
    and macOS's, are left as they are."""
    try:
        library = ctypes.CDLL(None)
        set_option, _ = library.mallopt, library.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):
        return False
    return all(set_option(option, value) == 1 for option, value in _LIMITS.items())
