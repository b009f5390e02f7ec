"""Make glibc's `malloc` return the memory of freed images to the system.

A freed block of some megabytes raises glibc's mmap threshold up to 32 MB; from then on images are
allocated in the arenas, of which each thread may have one and none shrinks. So the threshold is
fixed below the smallest image that matters, and the number of arenas is limited.
"""

from __future__ import annotations

import ctypes

_LIMITS = {
    -3: 2 * 1024 * 1024,  # M_MMAP_THRESHOLD
    -1: 8 * 1024 * 1024,  # M_TRIM_THRESHOLD
    -8: 4,  # M_ARENA_MAX
}
"""By the options' numbers in glibc's malloc.h."""


def bound_heap() -> bool:
    """Set the limits for this process; return whether its C library supports them.

    Other C libraries, such as musl and macOS's, are left as they are.
    """
    try:
        library = ctypes.CDLL(None)
        set_option, _ = library.mallopt, library.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):
        return False
    return all(set_option(option, value) == 1 for option, value in _LIMITS.items())
