"""Types that every room shares: requests, results, progress, and the engine's protocols.

Frozen dataclasses and two protocols, without imports from `app` and without behaviour beyond
derived values. They cross the pipe between the HTTP process and the worker, so every field is
plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker computes on; plain data, found by the parent."""

    index: int | None
    """The card's number as KLEIN_DEVICE counts; None without a card."""
    name: str
    """NVML's name of the product, or `cpu`."""
    uuid: str
    """NVML's UUID; without a card `cpu`, or `cpu:0`, `cpu:1` and so on where there are several.
    Empty where NVML does not answer."""
    total_bytes: int | None = None
    visible: str = ""
    """What the worker sets CUDA_VISIBLE_DEVICES to; empty leaves it as it is."""
    pci_id: str = ""
    """As the kernel writes it, such as 0000:65:00.0; empty where it is not known."""
    threads: int = 0
    """How many threads a worker without a card computes with; 0 leaves that to torch."""

    @property
    def torch_index(self) -> int | None:
        """The index under which torch has the card in the worker; None without one."""
        return 0 if self.visible else self.index


NO_CARD = Device(None, "cpu", "cpu")
"""The CPU where one worker has it."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """An uncompressed image: *pixels* is uint8 [height, width, 3], RGB, rows from the top."""

    width: int
    height: int
    pixels: bytes | bytearray | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Mask:
    """Where an edit may paint: *weights* is uint8 [height, width]; 255 repaints, 0 keeps."""

    width: int
    height: int
    weights: bytes | bytearray = field(repr=False)


ALIASES = ("gpt-image-", "dall-e-", "chatgpt-image-")
"""Prefixes of model names that clients hard-code; such a name means the served model."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter that an image is made with; *scale* multiplies its change of the weights."""

    name: str
    """Its key in the directory of adapters, never a path."""
    scale: float
    sha256: str
    """Of the file, in hexadecimal: what the engine keeps it under."""
    path: str = field(repr=False)
    """Of the file, as the directory found it; it comes from no client."""
    rank: int = 0
    """The most that it adds to the rank of one joined layer; separate queries, keys and values
    count three times."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image with every default filled in, so that equal specs give equal pixels."""

    prompt: str = field(repr=False)
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    references: tuple[RawImage, ...] = ()
    mask: Mask | None = None
    previews: int = 0
    """How many previews of the latents to send with the progress, spread over the steps."""
    wants_latents: bool = False
    """Whether the final latents come back with the image; only commands ask for them."""
    loras: tuple[Lora, ...] = ()
    """In the order in which they are added; their names differ."""
    scaled_to: tuple[int, int] | None = None
    """The size to which the finished image is scaled; None leaves it as it is made."""

    @property
    def pixels(self) -> int:
        """The number of pixels that are made."""
        return self.width * self.height

    @property
    def output_size(self) -> tuple[int, int]:
        """Width and height of the image that the client gets."""
        return self.scaled_to or (self.width, self.height)


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
    """Bytes that torch holds on the GPU, or their maximum during one job.

    *allocated* and *reserved* as `torch.cuda.memory_allocated` and `memory_reserved` count them.
    """

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class LoraLoad:
    """An adapter that a job had to bring to where the layers read it."""

    name: str
    seconds: float
    source: str
    """`disk`, or `host` where it was in host memory."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A finished image as it leaves the worker; *peak* is None without a GPU."""

    image: RawImage
    timings: StageTimings
    peak: PeakMemory | None
    prompt_tokens: int
    is_prompt_cut: bool
    is_prompt_cached: bool | None = None
    """Whether the prompt embeddings came from the cache; None where no cache is in use."""
    are_references_cached: tuple[bool, ...] = ()
    """For each reference whether its latents came from the cache; empty where none is in use."""
    held: PeakMemory | None = None
    """What torch holds on the GPU after the job; None without a GPU."""
    lora_loads: tuple[LoraLoad, ...] = ()
    lora_bytes: int = 0
    """What adapters take on the GPU, or in host memory without one, after the job."""
    latents: bytes | None = field(default=None, repr=False)
    """The final latents, float32 [tokens, channels], row-major; None unless asked for."""


class Stage(StrEnum):
    """Where a running job is; GPU_FREE says that the GPU can take the next job."""

    TEXT = "text"
    REFERENCE = "reference"
    DENOISE = "denoise"
    DECODE = "decode"
    GPU_FREE = "card_free"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a running job: *step* of *steps* are done; *preview* may be smaller."""

    stage: Stage
    step: int
    steps: int
    preview: RawImage | None = None


class WorkerStage(StrEnum):
    """What a worker is at, from its start on; `/health` shows the value."""

    STARTING = "starting"
    DOWNLOAD = "download"
    VERIFY = "verify"
    LOADING = "loading"
    WEIGHTS = "weights"
    WARM_UP = "warm-up"
    READY = "ready"
    RESTARTING = "restarting"
    ASLEEP = "asleep"
    """It has no process, and starts when a job waits."""
    FAILED = "failed"
    DRAINING = "draining"
    """The service takes nothing new; a worker is never at this."""


class Loss(StrEnum):
    """Why a worker was lost: the values are those of the metric."""

    FATAL_CUDA = "fatal_cuda"
    KILLED = "killed"
    HANG = "hang"
    HEARTBEAT = "heartbeat"
    STARTUP = "startup"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of loading a model: *fraction* in 0..1, or None where it is unknown."""

    stage: WorkerStage
    fraction: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known of a model before it is loaded: names, defaults and limits."""

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
    size_multiple: int = 16
    """Of sides: the VAE halves three times, and the transformer takes patches of 2x2."""
    note: str = ""
    """A sentence for the start-up line and the README, where the model needs one."""

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is distilled into the weights, so no other scale is accepted."""
        return self.max_guidance == self.default_guidance


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the worker reports once the model is loaded and warm."""

    model: str
    revision: str
    device: str
    """NVML's product name of the GPU, or `cpu`."""
    precision: str
    precision_reason: str
    plan: str
    plan_reasons: tuple[str, ...]
    max_pixels: tuple[int, ...]
    """Largest output that fits, in pixels; entry i holds with i reference images, 0: no room."""
    torch: str
    cuda: str | None
    features: tuple[str, ...] = ()
    """Optimizations in use, for /health: `own kernels: ...`, `prompt cache`, ..."""
    weights_bytes: int = 0
    warm_up_s: float = 0.0
    """Seconds of the warm-up image at the default size: the estimator's first sample."""
    load_s: float = 0.0
    advice: tuple[str, ...] = ()
    """What is missing on this machine: what it costs, and the command that mends it."""
    attention: str = ""
    """The kernel of the transformer's attention; empty where the libraries' own modules run."""
    attention_choice: str = ""
    """What `KLEIN_ATTENTION` calls that kernel; empty where *attention* is."""
    linear_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    """[out, in] of each linear layer of the transformer by diffusers' module: what an adapter of
    this model must fit; empty where none is taken."""
    race: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Milliseconds of a step at the default size by `linears` and `attention`, then by format or
    kernel, as timed on this card; empty where nothing was timed."""

    @property
    def facts(self) -> dict[str, object]:
        """Every field by name, but the shapes of a few hundred layers."""
        return {key: value for key, value in asdict(self).items() if key != "linear_shapes"}


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The state of one worker, for /health and the metrics."""

    device: Device
    stage: WorkerStage
    is_ready: bool
    is_up: bool
    """Whether its process exists."""
    progress: float | None
    reason: str
    restarts: int
    info: ModelInfo | None
    is_left_out: bool = False
    """Whether it was given up while others go on."""
    is_yielding: bool = False
    """Whether it sleeps because another program has the card."""


@dataclass(frozen=True, slots=True)
class Status:
    """The service's state, for /health, the metrics and people."""

    stage: WorkerStage
    is_ready: bool
    progress: float | None
    reason: str
    info: ModelInfo | None
    queue_size: int
    """Images that wait."""
    queue_capacity: int
    running: int
    """Images on the GPU or being transferred from it."""
    estimated_wait_s: float
    """How long a new image would wait."""
    worker_restarts: int
    workers: tuple[WorkerStatus, ...] = ()
    """One for each device, in their order."""
    state: str = ""
    """In one word: ready, asleep, waking or yielding, else the stage."""


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One NVML reading of the GPU; the ratio is in 0..1, None is what NVML does not report."""

    name: str
    uuid: str
    used_bytes: int
    total_bytes: int
    utilization_ratio: float | None
    power_watts: float | None
    temperature_celsius: float | None
    throttled: Mapping[str, bool] | None = None
    """For each reason of `telemetry.gpu.THROTTLE_REASONS`, whether it holds the clock down."""


class Engine(Protocol):
    """What the worker process drives, from one thread; raises only errors of `app.errors`."""

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Load the weights, warm up with one image, and return what is served.

        Raises:
            StartupError: the model cannot be loaded.
        """

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Generate one image; *is_cancelled* is polled between denoising steps.

        Raises:
            Cancelled: *is_cancelled* returned True.
            OutOfMemory: the GPU has no room for this job.
        """

    def close(self) -> None:
        """Release the GPU."""


class Backend(Protocol):
    """What the dispatcher needs of a worker: one job in, one image or one error out."""

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        """Generate one image; cancelling stops the job and returns once the GPU is free."""

    async def wait_until_ready(self) -> None:
        """Return once a job can start."""
