"""Which failure was it? Out of memory costs one picture, any other error of the accelerator costs
the worker, the rest costs one picture."""

from __future__ import annotations

import gc
import weakref

import pytest

from app.errors import Cancelled, GenerationFailed, KleinError, OutOfMemory, WorkerLost

pytestmark = pytest.mark.torch


def accelerator_error(code: int | None) -> Exception:
    """What CUDA raises, with its number."""
    import torch

    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if code is not None:
        error.error_code = code
    return error


def out_of_memory() -> Exception:
    """What torch raises when its allocator finds no room."""
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (out_of_memory, OutOfMemory),
        (lambda: accelerator_error(2), OutOfMemory),
        (lambda: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemory),
        (MemoryError, OutOfMemory),
        (lambda: accelerator_error(700), WorkerLost),
        (lambda: accelerator_error(710), WorkerLost),
        (lambda: accelerator_error(None), WorkerLost),
        (lambda: RuntimeError("The size of tensor a must match"), GenerationFailed),
        (lambda: ValueError("odd"), GenerationFailed),
        (Cancelled, Cancelled),
    ],
)
def test_every_error_is_of_one_kind(make, kind) -> None:
    """By class and number, not by what the text says of itself."""
    from app.engine import error_mapping

    found = error_mapping.translate(make())

    assert type(found) is kind
    assert isinstance(found, KleinError)
    assert "CUDA" not in found.message
    assert "GiB" not in found.message


def test_the_failed_pictures_tensors_are_let_go() -> None:
    """What the error's frames held is gone before the next picture starts, also that of the
    error it came from."""
    import torch

    from app.engine import error_mapping

    kept: list[weakref.ref] = []

    def inner() -> None:
        tensor = torch.zeros(1000)
        kept.append(weakref.ref(tensor))
        raise out_of_memory()

    def outer() -> None:
        tensor = torch.zeros(1000)
        kept.append(weakref.ref(tensor))
        try:
            inner()
        except RuntimeError as error:
            raise out_of_memory() from error

    try:
        outer()
    except RuntimeError as error:
        held = error
    gc.disable()
    try:
        found = error_mapping.translate(held)
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
    assert isinstance(found, OutOfMemory)
