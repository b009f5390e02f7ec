"""The words every room shares: what is asked for, what comes back, who can do it.

Frozen dataclasses and two protocols, nothing of ours imported and no behaviour beyond derived
values. They cross the pipe between the HTTP process and the worker, so every field is plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RawImage:
    """Uncompressed pixels: *pixels* holds height x width x 3 bytes, RGB, 8 bits, rows from the
    top."""

    width: int
    height: int
    pixels: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Mask:
    """Where an edit may paint: *weights* holds height x width bytes; 255 repaints, 0 keeps."""

    width: int
    height: int
    weights: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One picture, fully decided: every default is filled in, so equal specs give equal pixels."""

    prompt: str = field(repr=False)
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    references: tuple[RawImage, ...] = ()
    mask: Mask | None = None
    previews: int = 0
    """How many pictures of the running latents to send with the progress, spread over the steps."""
    wants_latents: bool = False
    """Whether the final latents come back with the picture; no client asks for them."""

    @property
    def pixels(self) -> int:
        """The number of pixels asked for."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Seconds by stage in the worker; *steps* has one entry per denoising step."""

    text: float
    reference: float
    denoise: float
    decode: float
    steps: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """Seconds in the worker, all stages together."""
        return self.text + self.reference + self.denoise + self.decode


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """What torch holds on the card, or the most that it held during one job, in bytes."""

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Generated:
    """A finished picture as it leaves the worker; *peak* is None without a card."""

    image: RawImage
    timings: StageTimings
    peak: PeakMemory | None
    prompt_tokens: int
    is_prompt_cut: bool
    is_prompt_cached: bool | None = None
    """Whether the prompt's embeddings came from the cache; None where no cache is in use."""
    held: PeakMemory | None = None
    """What torch holds on the card once the job is over; None without a card."""
    latents: bytes | None = field(default=None, repr=False)
    """The final latents, tokens x channels in float32, row by row; None unless asked for."""


class Stage(Enum):
    """Where a running job is; CARD_FREE says that the card could take the next job."""

    TEXT = "text"
    REFERENCE = "reference"
    DENOISE = "denoise"
    DECODE = "decode"
    GPU_FREE = "card_free"


@dataclass(frozen=True, slots=True)
class Progress:
    """A sign of life of a running job: *step* of *steps* are done; *preview* may be smaller."""

    stage: Stage
    step: int
    steps: int
    preview: RawImage | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A sign of life while a model is on its way: *fraction* in 0..1, or None where it is
    unknown."""

    stage: str
    fraction: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known of a variant before it is loaded: its names, defaults and limits."""

    id: str
    title: str
    hub_id: str | None
    owned_by: str
    created: int
    licence: str
    default_width: int
    default_height: int
    default_steps: int
    max_steps: int
    default_guidance: float
    max_guidance: float
    """Equal to *default_guidance* for a distilled model: no other value has an effect."""
    min_side: int
    max_side: int
    max_pixels: int
    max_references: int
    max_sequence_length: int
    note: str = ""
    """A sentence for the start-up line and the README, where the model needs one."""

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is baked in, so that a guidance scale other than the default is
        refused."""
        return self.max_guidance == self.default_guidance


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the worker says once the model answers."""

    model: str
    revision: str
    device: str
    """NVML's product name of the card, or `cpu`."""
    precision: str
    precision_reason: str
    plan: str
    plan_reasons: tuple[str, ...]
    max_pixels: tuple[int, ...]
    """Largest output, in pixels, that fits: entry i is the limit with i reference images; 0 is
    none."""
    torch: str
    cuda: str | None
    features: tuple[str, ...] = ()
    """What is switched on besides, for /health: `compiled blocks`, `prompt cache`, ..."""
    weights_bytes: int = 0
    warm_up_s: float = 0.0
    """Seconds in the worker of the warm-up image at the default size, the first estimate of
    speed."""
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One reading of the card: bytes, ratio in 0..1, watts, degrees Celsius; None where NVML says
    nothing."""

    name: str
    uuid: str
    used_bytes: int
    total_bytes: int
    utilization_ratio: float | None
    power_watts: float | None
    temperature_celsius: float | None


class Engine(Protocol):
    """What the worker process drives. One thread calls it; every error it raises is one of
    `app.errors`."""

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Read the weights, make one real picture, and say what came of it."""
        ...

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> Generated:
        """Make one picture; *should_stop* is asked between steps and ends the job with
        `Cancelled`."""
        ...

    def close(self) -> None:
        """Let go of the card."""
        ...


class Backend(Protocol):
    """What the dispatcher needs of the worker's side: one job in, one picture or one error out."""

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        """Make one picture. Cancelling the call stops the job and returns when the card is free."""
        ...

    async def wait_until_ready(self) -> None:
        """Return once a job could start."""
        ...
