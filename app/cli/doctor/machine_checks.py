"""Checks of the machine around the GPU: compiler, cache, disk, host memory. Pure."""

from __future__ import annotations

from app.cli.doctor.facts import CacheFound, CompilerFound, HostFound
from app.cli.doctor.report import Report, gigabytes

_FIRST_LOAD_BYTES = 10_000_000_000


def judge_compiler(found: Report, compiler: CompilerFound, *, has_gpu: bool) -> None:
    """Report whether torch.compile can work; it is a problem only with a GPU."""
    missing = compiler.missing
    if not missing:
        found.tell("compiling", f"works: {compiler.c_compiler}, Triton")
        return
    found.tell("compiling", f"does not work: {', '.join(missing)} missing")
    if has_gpu:
        found.complain(
            f"Nothing can be compiled ({', '.join(missing)} missing), so pictures take about "
            "twice as long.",
            "Install gcc and Python's headers (Debian: gcc libc6-dev python3-dev); Triton comes "
            "with torch's build for CUDA.",
            is_fatal=False,
        )


def judge_cache(found: Report, cache: CacheFound) -> None:
    """Report what is downloaded, what is missing, and whether the disk has room for it."""
    there = cache.total_bytes - cache.missing_bytes
    found.tell(
        "cache",
        f"{cache.folder}: {gigabytes(there)} of {gigabytes(cache.total_bytes)} there, "
        f"{gigabytes(cache.missing_bytes)} missing",
    )
    found.tell("disk", f"{gigabytes(cache.disk_free_bytes)} free")
    if not cache.is_writable:
        found.complain(
            f"{cache.folder} may not be written to by this user.",
            "Make it writable, or set KLEIN_CACHE_DIR to another folder.",
            is_fatal=cache.missing_bytes > 0,
        )
    if cache.open_because:
        found.complain(
            f"The cache's files are hashed at each start and compiled code is not kept there, "
            f"because {cache.open_because}.",
            f"{cache.remedy[0].upper()}{cache.remedy[1:]}",
            is_fatal=False,
        )
    if cache.missing_bytes > cache.disk_free_bytes:
        found.complain(
            f"The disk has {gigabytes(cache.disk_free_bytes)} free, needed are "
            f"{gigabytes(cache.missing_bytes)} for the download.",
            "Make room, or set KLEIN_CACHE_DIR to a folder on another disk.",
            is_fatal=True,
        )
    elif cache.missing_bytes:
        found.complain(
            f"{gigabytes(cache.missing_bytes)} are still to be downloaded.",
            "klein download fetches them ahead of time; else the first start does.",
            is_fatal=False,
        )


def judge_host(found: Report, host: HostFound, *, is_klein: bool) -> None:
    """Report the host's memory; klein's first load needs the most of it."""
    found.tell(
        "host",
        f"{gigabytes(host.total_bytes)}, of which {gigabytes(host.available_bytes)} available",
    )
    if is_klein and 0 < host.available_bytes < _FIRST_LOAD_BYTES:
        found.complain(
            f"{gigabytes(host.available_bytes)} of host memory are available; the first load takes "
            f"up to {gigabytes(_FIRST_LOAD_BYTES)}.",
            "Close other programs for the first start, or add swap space.",
            is_fatal=False,
        )
