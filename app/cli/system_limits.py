"""The system's limits: raised where they may be, else one sentence each, with what to do.

Errors of the system (no file descriptors, no processes, no space, no permission) are the operator's
to resolve and are reported without a traceback, which `KLEIN_LOG_LEVEL=debug` brings back. Any
other exception is a bug of this program and keeps its traceback. `malloc` is given limits too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

from app.errors import StartupError

_SPARE_FILES = 32
"""File descriptors that any command needs besides those open: pipes, sockets, libraries."""
_SPARE_THREADS = 8
"""Threads and processes that a command which computes needs besides one for each core."""
WANTED_FILES = 2048
"""File descriptors that the service's connections need."""
_HEAP_OPTIONS = {
    -3: 2 * 1024 * 1024,  # M_MMAP_THRESHOLD
    -1: 8 * 1024 * 1024,  # M_TRIM_THRESHOLD
    -8: 4,  # M_ARENA_MAX
}
"""By their numbers in glibc's malloc.h."""


def check_surroundings(*, is_computing: bool) -> None:
    """Check that the current folder exists, and that files can be opened and threads started.

    Threads are checked for commands that compute. Libraries take all of this for granted, and end
    the process in their own ways where it fails.

    Raises:
        StartupError: one of the checks failed.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StartupError(
            "The current folder has been deleted; change into one that exists and start again."
        ) from None
    try:
        with ExitStack() as opened:
            for _ in range(_SPARE_FILES):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        if is_computing:
            _try_threads()
    except (OSError, RuntimeError) as error:
        raise StartupError(explain(error)) from None


def _try_threads() -> None:
    release = Event()
    with ExitStack() as started, ExitStack() as held:
        held.callback(release.set)
        for _ in range(_SPARE_THREADS + len(os.sched_getaffinity(0))):
            thread = Thread(target=release.wait)
            thread.start()
            started.callback(thread.join)


def explain(error: BaseException) -> str:
    """Return one sentence on what the system denied and what to do.

    It is empty where *error* is a bug of the program.
    """
    if isinstance(error, MemoryError):
        return "This machine has too little free memory; close other programs and start again."
    is_about_threads = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    if is_about_threads or isinstance(error, BlockingIOError):
        most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        number = "" if most == resource.RLIM_INFINITY else f", which is {most}"
        return (
            f"This user may start no more processes and threads; raise the limit (ulimit -u{number}"
            ", or the container's limit of pids) and start again."
        )
    if not isinstance(error, OSError):
        return ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"No more files can be opened, {most} are allowed; raise the limit (ulimit -n 1024, or "
            "LimitNOFILE=1024 of a systemd unit) and start again."
        )
    place = f" ({error.filename})" if error.filename else ""
    reason = error.strerror or type(error).__name__
    return (
        f"The system refused what was needed: {reason}{place}; fix that and start again, or set "
        "KLEIN_LOG_LEVEL=debug to see where it happened."
    )


def raise_file_limit(wanted: int = WANTED_FILES) -> int:
    """Raise the soft limit of open files to *wanted*, or to the hard limit; return the result.

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


def bound_heap() -> bool:
    """Make glibc's `malloc` return the memory of freed images to the system.

    A freed block of some megabytes raises glibc's mmap threshold up to 32 MB; from then on images
    are allocated in the arenas, of which each thread may have one and none shrinks. So the
    threshold is fixed below the smallest image that matters, and the number of arenas is limited.

    Return whether this process's C library supports it; others, such as musl and macOS's, are left
    as they are.
    """
    try:
        library = ctypes.CDLL(None)
        set_option, _ = library.mallopt, library.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):
        return False
    return all(set_option(option, value) == 1 for option, value in _HEAP_OPTIONS.items())
