"""Maps exceptions of PyTorch to the errors of `app.errors`.

Out of memory (`torch.OutOfMemoryError`, or `torch.AcceleratorError` with CUDA's code 2) fails the
job, and the worker stays. Any other `AcceleratorError` leaves a CUDA context that cannot be used
further, so the worker has to end. Every other exception fails this job alone. Messages for the
caller are fixed; the exception itself is logged.
"""

from __future__ import annotations

import gc
import logging
import traceback

import torch

from app.errors import GenerationFailed, KleinError, OutOfMemory, WorkerLost

_log = logging.getLogger(__name__)

_CUDA_OUT_OF_MEMORY = 2
_MEMORY_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether *error* means that GPU or host memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def translate(error: Exception) -> KleinError:
    """Log *error*, release the tensors that its traceback holds, and return the mapped error."""
    if isinstance(error, KleinError):
        return error
    _log.error("A job failed in the engine.", exc_info=error)
    is_memory = is_out_of_memory(error)
    release(error)
    if is_memory:
        return OutOfMemory(
            "The card had no room for this picture; ask for a smaller size or fewer references."
        )
    if isinstance(error, torch.AcceleratorError) or not _gpu_answers():
        return WorkerLost("The card failed while the picture was made; the worker starts anew.")
    return GenerationFailed("The picture could not be made; the service's log says why.")


def release(error: BaseException) -> None:
    """Clear the frames of *error* and its causes, which hold tensors, and empty the CUDA cache."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    give_back()


def give_back() -> None:
    """Collect garbage and empty PyTorch's CUDA cache, where the context still works."""
    gc.collect()
    if _has_gpu():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            _log.warning("The card did not take its memory back.")


def _has_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch has no type there


def _gpu_answers() -> bool:
    """Return whether a kernel still runs: CUDA reports errors of earlier kernels asynchronously."""
    if not _has_gpu():
        return True
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
