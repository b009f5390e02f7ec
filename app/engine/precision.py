"""Which arithmetic, and why: a pure choice over what is known of the card."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from app.errors import StartupError


@dataclass(frozen=True, slots=True)
class Precision:
    """A choice with its reason; *dtype* is that of everything that is not quantised."""

    name: str
    dtype: torch.dtype
    reason: str


def choose_precision(asked: str, *, has_card: bool, is_small: bool) -> Precision:
    """Choose for a model on a card or on the processor; *is_small* below a gigabyte of weights.

    Raises:
        StartupError: what was asked for needs a card.
    """
    if asked in ("bf16", "fp32"):
        return Precision(asked, _DTYPES[asked], "as asked for")
    if has_card:
        if asked != "auto":
            raise StartupError(f"The precision {asked} is not available; take bf16.")
        return Precision("bf16", torch.bfloat16, "the card's native arithmetic")
    if asked != "auto":
        raise StartupError(
            f"The precision {asked} needs a CUDA card; set KLEIN_PRECISION=bf16 or auto."
        )
    if is_small:
        return Precision("fp32", torch.float32, "a small model, at its fastest on the processor")
    return Precision("bf16", torch.bfloat16, "on the processor, to halve the memory")


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
