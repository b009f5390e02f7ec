"""Which failure was it: this job's, the card's memory, or the card itself?

The rule (the two classes are separate children of RuntimeError, and an AcceleratorError carries
CUDA's code): out of memory fails the job and the worker lives on; any other error of the
accelerator leaves a context that cannot be trusted, so the worker has to go; everything else is
this job's alone. Texts for the caller are fixed; what really happened goes to the log.
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
    """Whether *error* says that memory, the card's or the host's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if _is_accelerator_error(error):
        return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def translate(error: Exception) -> KleinError:
    """Log *error*, free what its traceback keeps alive, and return what the caller may be told."""
    if isinstance(error, KleinError):
        return error
    _log.error("A job failed in the engine.", exc_info=error)
    is_memory = is_out_of_memory(error)
    release(error)
    if is_memory:
        return OutOfMemory(
            "The card had no room for this picture; ask for a smaller size or fewer references."
        )
    if _is_accelerator_error(error) or not _gpu_answers():
        return WorkerLost("The card failed while the picture was made; the worker starts anew.")
    return GenerationFailed("The picture could not be made; the service's log says why.")


def release(error: BaseException) -> None:
    """Drop the frames of *error*, which hold tensors, and give cached memory back to the card."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    give_back()


def give_back() -> None:
    """Collect garbage and return cached memory to the card, where that is still possible."""
    gc.collect()
    if _has_gpu():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            _log.warning("The card did not take its memory back.")


def _is_accelerator_error(error: BaseException) -> bool:
    kind = getattr(torch, "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)


def _has_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch has no type there


def _gpu_answers() -> bool:
    """Ask the card for one addition: an error may be the late news of an earlier kernel."""
    if not _has_gpu():
        return True
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
