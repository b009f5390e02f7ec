"""What is missing on this machine, what that costs on its card, and the command that mends it.

Nothing here imports torch: the engine and `klein doctor` say the same. Seconds are computed from
the card's datasheet (`app.engine.roofline`), and said to be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.engine import roofline
from app.engine.models.entry import ModelEntry
from app.engine.quantization.formats import AUTO, FORMATS, WeightFormat
from app.engine.runtime.toolchain import WITHOUT_KERNELS


@dataclass(frozen=True, slots=True)
class Advice:
    """A sentence on what is missing and what it costs, and one on what to do."""

    what: str
    remedy: str

    def __str__(self) -> str:
        """Return both sentences."""
        return f"{self.what} {self.remedy}"


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as far as its datasheet is known."""

    capability: tuple[int, int]
    spec: roofline.GpuDatasheet | None

    @property
    def nearest(self) -> roofline.GpuDatasheet | None:
        """Its datasheet, or one of the same kind, whose precisions compare alike."""
        alike = (gpu for gpu in roofline.GPUS if gpu.capability == self.capability)
        return self.spec or next(alike, None)


def on_kernels(reason: str, remedy: str) -> Advice:
    """Say what it costs that our own kernels do not run for *reason*."""
    return Advice(
        f"Our own kernels do not run ({reason}), so each picture takes about {WITHOUT_KERNELS} "
        "times as long (others' figures of an RTX 3090 for torch.compile's, not measured here).",
        remedy,
    )


def to_run(command: str) -> str:
    """Return the sentence that names *command*."""
    return f"To mend it: {command}"


def on_formats(
    asked: str, lacking: Mapping[str, str], taken: WeightFormat, card: Card, entry: ModelEntry
) -> Iterator[Advice]:
    """Say what it costs that the libraries of the formats *lacking* (name to reason) are missing.

    *asked* is KLEIN_PRECISION, and *taken* the format that the transformer's layers got. What
    would not be faster by the datasheet is no loss.
    """
    for name, why in lacking.items():
        if name == taken.name:
            cost: str | None = (
                f"{name} runs by PyTorch's own kernels, since {why}; how much longer that takes "
                "was not measured."
            )
        else:
            cost = _cost(name, why, taken, card, entry) if asked == AUTO else None
        if cost is not None:
            package = FORMATS[name].package
            yield Advice(cost, to_run(_pip(f"install --force-reinstall {package}")))


def _pip(command: str) -> str:
    """Return how to call pip for this Python; `/health` shows it, so no folder but `.venv`."""
    path, here = Path(sys.executable), Path.cwd()
    if path.is_relative_to(here / ".venv"):
        return f"{path.relative_to(here)} -m pip {command}"
    return f"pip {command} (in klein's environment)"


def _cost(name: str, why: str, taken: WeightFormat, card: Card, entry: ModelEntry) -> str | None:
    """Say what *name* would gain over *taken*; None where the datasheet says nothing."""
    text = f"{name} cannot be chosen, since {why}"
    if (gpu := card.nearest) is None:
        return f"{text}; what that costs on this card is not known."
    model = entry.spec
    width, height = model.default_width, model.default_height
    now, then = (
        roofline.roofline(entry.architecture, gpu, each, width, height, model.default_steps)
        for each in (taken.name, name)
    )
    if now is None or then is None or then.total_s >= now.total_s:
        return None
    if card.spec is None:
        return (
            f"{text}: a picture takes up to {now.total_s / then.total_s:.1f} times as long "
            "(computed from the datasheet of a card of its kind)."
        )
    return (
        f"{text}: {width}x{height} takes this card at least {now.total_s:.2f} s as it is, and "
        f"{then.total_s:.2f} s in {name} (computed from its datasheet, attention in bf16)."
    )
