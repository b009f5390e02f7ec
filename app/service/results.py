"""What the service returns: images, and events of a running job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from app.domain import ImageSpec, Lora, PeakMemory, Progress


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished image, encoded. The keys of *seconds* are the stages of the metrics."""

    data: bytes = field(repr=False)
    format: str
    media_type: str
    width: int
    height: int
    seed: int
    seconds: Mapping[str, float]
    peak: PeakMemory | None
    prompt_tokens: int
    warnings: tuple[str, ...]
    latents: bytes | None = field(default=None, repr=False)
    loras: tuple[Lora, ...] = ()
    device: str = "cpu"
    """The product name of the GPU that made it."""


@dataclass(frozen=True, slots=True)
class Advance:
    """Of *images*, *done* have ended; the one on the GPU has made *step* of *steps*."""

    images: int
    done: int
    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """How much of it is done, in 0..1."""
        return min(1.0, (self.done + self.step / self.steps) / self.images)


@dataclass(frozen=True, slots=True)
class Queued:
    """*position* jobs start before this one."""

    position: int


@dataclass(frozen=True, slots=True)
class Waking:
    """Every worker sleeps or is waking; the first is predicted to be ready in *seconds*."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Preview:
    """An image decoded from the running latents, perhaps smaller than the final one."""

    index: int
    picture: bytes = field(repr=False)


TicketEvent = Queued | Waking | Progress | Preview | Picture
"""`Progress` is never of the stage `GPU_FREE`; the finished image is the last."""


def write_loras(loras: Iterable[Lora]) -> str:
    """Write the recipe of an image's adapters in one line: names, scales, hashes of the files."""
    return ", ".join(
        f"{each.name}:{str(each.scale).removesuffix('.0')}@{each.sha256}" for each in loras
    )


def describe_loras(loras: Iterable[Lora]) -> list[dict[str, object]]:
    """Describe an image's adapters for JSON: names, scales, hashes of the files."""
    return [{"name": each.name, "scale": each.scale, "sha256": each.sha256} for each in loras]


def warnings_of(spec: ImageSpec) -> tuple[str, ...]:
    """Return what is known before the image is made."""
    if spec.scaled_to is None:
        return ()
    width, height = spec.scaled_to
    return (
        f"made at {spec.width}x{spec.height} and scaled to {width}x{height}, which the demo model "
        "cannot make",
    )
