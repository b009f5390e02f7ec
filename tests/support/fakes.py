"""Stand-ins for what lies below a room: scripted, and tested themselves in
`tests/api/test_fakes.py`.

`FakeService` has the interface of `app.service.service.ImageService` and behaves like it towards
`app.api`, without a worker: pictures are flat colours made of the seed, every ending can be
scripted, and what became of each ticket can be asked.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image

from app.domain import (
    ImageSpec,
    ModelInfo,
    ModelSpec,
    PeakMemory,
    Progress,
    RawImage,
    Stage,
    Status,
)
from app.engine.models.flux2_klein import TOKENIZER
from app.engine.models.registry import find_spec
from app.errors import InvalidRequest, Kind, KleinError, Unavailable
from app.images import OutputFormat, encode
from app.images.preparing import Edit, Upload, prepare
from app.limits import Limits
from app.service.adapters import Adapters
from app.service.previews import Previews
from app.service.prompt_tokens import PromptTokens
from app.service.results import Advance, Picture, Preview, Queued, TicketEvent, warnings_of

SECONDS: Mapping[str, float] = {
    "queue": 0.001,
    "text": 0.02,
    "reference": 0.0,
    "denoise": 0.4,
    "decode": 0.1,
    "encode": 0.01,
    "total": 0.531,
}
PEAK = PeakMemory(allocated=7_000_000_000, reserved=8_000_000_000)
INFO = ModelInfo(
    model="flux.2-klein-4b",
    revision="e7b7dc27",
    device="NVIDIA GeForce RTX 3060",
    precision="int8",
    precision_reason="the card has int8 cores",
    plan="resident",
    plan_reasons=("everything fits",),
    max_pixels=(4_194_304, 4_194_304, 3_000_000, 2_500_000, 2_000_000),
    torch="2.13.0",
    cuda="12.9",
)


@dataclass
class Script:
    """What the fake does with the next tickets."""

    error: KleinError | None = None
    """Raised instead of a picture."""
    previews_before_error: int = 0
    release: asyncio.Event | None = None
    """Where set, a ticket waits for it before it ends."""
    warnings: tuple[str, ...] = ()
    peak: PeakMemory | None = PEAK


@dataclass
class FakeService:
    """Takes what the real service takes; *tickets* are all that it ever accepted."""

    model: ModelSpec = field(default_factory=lambda: find_spec("flux.2-klein-4b"))
    capacity: int = 32
    script: Script = field(default_factory=Script)
    plan_pixels: tuple[int, ...] = INFO.max_pixels
    adapters: Adapters = field(default_factory=Adapters)
    """What the memory plan can hold beside 0, 1, ... references."""
    closed_by: Kind | None = None
    """Where set, nothing is taken, for this reason."""
    max_pixels: int = 2**62
    """The operator's limit."""
    scaled: Limits | None = None
    """Of the sizes that may be asked for beyond the model's."""
    has_failed: bool = False
    """Whether the service has given up."""
    tickets: list[FakeTicket] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a ticket has been accepted."""
    reserved: int = 0
    """Places that are held for requests whose pictures are being decoded."""
    _seeds: int = 1000

    @property
    def limits(self) -> Limits:
        """Those of the model and of the operator."""
        return Limits.of(self.model, self.max_pixels, scaled=self.scaled)

    @property
    def waiting(self) -> int:
        """How many images have been accepted and have not ended."""
        return sum(len(ticket.specs) for ticket in self.tickets if not ticket.has_ended)

    @property
    def specs(self) -> list[ImageSpec]:
        """Everything that was ever accepted."""
        return [spec for ticket in self.tickets for spec in ticket.specs]

    def status(self) -> Status:
        """Say what the script wants said."""
        stages = {
            Kind.LOADING: "loading",
            Kind.DRAINING: "draining",
            Kind.WORKER_DOWN: "restarting",
        }
        is_ready = self.closed_by in {None, Kind.QUEUE_FULL} and not self.has_failed
        stage = "ready" if is_ready else stages[self.closed_by or Kind.LOADING]
        return Status(
            stage="failed" if self.has_failed else stage,
            is_ready=is_ready,
            progress=0.5 if self.closed_by is Kind.LOADING else None,
            reason="" if is_ready else "The script says so.",
            info=None if self.closed_by is Kind.LOADING else INFO,
            queue_size=self.waiting,
            queue_capacity=self.capacity,
            running=0,
            estimated_wait_s=2.4,
            worker_restarts=0,
        )

    def admit(
        self, *, client: str, deadline_s: float | None = None, is_large: bool = False
    ) -> FakeAdmission:
        """Refuse as the real one does."""
        self.check_open(1)
        admission = FakeAdmission(self, client, deadline_s)
        if is_large:
            admission.reserve(1)
        return admission

    def check_open(self, images: int, held: int = 0) -> None:
        """Refuse what does not fit, or what the script wants refused."""
        if images > self.capacity:
            raise InvalidRequest(
                f"images is {images}, but {self.capacity} may wait.", param="images"
            )
        full = self.waiting + self.reserved + images - held > self.capacity
        kind = Kind.QUEUE_FULL if full else self.closed_by
        if kind is not None:
            raise Unavailable("It cannot be taken now.", kind=kind, retry_after_s=7)

    def check(self, spec: ImageSpec) -> None:
        """Refuse what the plan cannot hold."""
        limit = self.plan_pixels[len(spec.references)]
        if spec.pixels > limit:
            raise InvalidRequest(f"The most is {limit} pixels.", param="width")

    def start(
        self, specs: Sequence[ImageSpec], admission: FakeAdmission, output: OutputFormat
    ) -> FakeTicket:
        """Accept all or none."""
        for spec in specs:
            self.check(spec)
        if not admission.images:
            self.check_open(len(specs))
        ticket = FakeTicket(
            list(specs), output, self.script, admission.client, warnings=admission.warnings
        )
        self.tickets.append(ticket)
        self.deadlines.append(admission.deadline_s)
        self.clients.append(admission.client)
        self.asked.set()
        return ticket

    def submit(
        self, specs: Sequence[ImageSpec], *, client: str, output: OutputFormat
    ) -> FakeTicket:
        """Accept at once, all or none."""
        with self.admit(client=client) as admission:
            return admission.submit(specs, output)

    def own_tickets(self, client: str) -> dict[FakeTicket, int | None]:
        """Those of one client; none waits here."""
        return {each: None for each in self.tickets if each.client == client and not each.has_ended}

    def find_ticket(self, client: str, id: str) -> FakeTicket | None:
        """One of them."""
        return next((each for each in self.own_tickets(client) if each.id == id), None)

    def random_seed(self) -> int:
        """Count, so that no two are equal."""
        self._seeds += 100
        return self._seeds


@dataclass(eq=False)
class FakeAdmission:
    """One request until it is accepted; it takes places where the real one does."""

    service: FakeService
    client: str
    deadline_s: float | None
    images: int = 0
    seconds_left: float = 120.0
    warnings: tuple[str, ...] = ()

    def __enter__(self) -> FakeAdmission:
        return self

    def __exit__(self, *error: object) -> None:
        self.service.reserved -= self.images
        self.images = 0

    def reserve(self, images: int) -> None:
        """Hold places until the end of the block."""
        self.service.check_open(images, self.images)
        self.service.reserved += images - self.images
        self.images = images

    def submit(self, specs: Sequence[ImageSpec], output: OutputFormat) -> FakeTicket:
        """Accept all or none."""
        if self.images and len(specs) > self.images:
            self.reserve(len(specs))
        ticket = self.service.start(specs, self, output)
        self.__exit__()
        return ticket


@dataclass(eq=False)
class FakeTicket:
    """One accepted request; `has_ended` and `was_cancelled` say what became of it."""

    specs: list[ImageSpec]
    output: OutputFormat
    script: Script
    client: str = ""
    request_id: str = ""
    created: float = 0.0
    warnings: tuple[str, ...] = ()
    has_ended: bool = False
    was_cancelled: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    on_ended: list[Callable[[], None]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Nobody asks for it here."""
        return f"{id(self):x}"

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back once nobody waits any more."""
        self.on_ended.append(callback)

    def advance(self) -> Advance:
        """Say that all of it is still to be done, or none."""
        images = len(self.specs)
        steps = self.specs[0].num_inference_steps
        return Advance(images, images if self.has_ended else 0, 0, steps)

    def cancel(self) -> None:
        """Note that nobody waits; a ticket that has ended stays as it is."""
        if not self.has_ended:
            self.was_cancelled = True
        self._end()

    async def pictures(self) -> list[Picture]:
        """Make all, or raise what the script says; cancelling the call cancels the ticket."""
        try:
            await self._wait()
            if self.script.error is not None:
                self._end()
                raise self.script.error
            pictures = [self._picture(spec) for spec in self.specs]
            self._end()
            return pictures
        finally:
            self.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, TicketEvent], None]:
        """Tell the life of the images, one after another; closing the iterator cancels them."""
        try:
            for index in range(len(self.specs)):
                yield index, Queued(index)
            await self._wait()
            for index, spec in enumerate(self.specs):
                steps = spec.num_inference_steps
                for step in range(1, steps + 1):
                    yield index, Progress(Stage.DENOISE, step, steps)
                    if self.script.error is not None and step > self.script.previews_before_error:
                        self._end()
                        raise self.script.error
                    if step <= spec.previews:
                        yield index, Preview(step - 1, paint(spec, self.output))
                if index == len(self.specs) - 1:
                    self._end()
                yield index, self._picture(spec)
        finally:
            self.cancel()

    async def _wait(self) -> None:
        if self.script.release is not None:
            await self.script.release.wait()

    def _end(self) -> None:
        self.has_ended = True
        self.ended.set()
        for callback in self.on_ended:
            callback()

    def _picture(self, spec: ImageSpec) -> Picture:
        return Picture(
            data=paint(spec, self.output),
            format=self.output.format,
            media_type=self.output.media_type,
            width=spec.output_size[0],
            height=spec.output_size[1],
            seed=spec.seed,
            seconds=SECONDS,
            peak=self.script.peak,
            prompt_tokens=12,
            warnings=(*self.warnings, *warnings_of(spec), *self.script.warnings),
            loras=spec.loras,
        )


@dataclass
class FakeMetrics:
    """Keeps what it was told."""

    finished: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)

    def request_finished(self, route: str, outcome: str, seconds: float) -> None:
        """Note route and outcome."""
        assert seconds >= 0
        self.finished.append((route, outcome))

    def request_rejected(self, reason: str) -> None:
        """Note the reason."""
        self.rejected.append(reason)

    def scrape(self) -> FakeScrape:
        """Read what there is."""
        return FakeScrape()


class FakeScrape:
    """One scrape; waits until it may be written."""

    is_begun = threading.Event()
    may_write = threading.Event()
    may_write.set()

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Write one line."""
        self.is_begun.set()
        assert self.may_write.wait(3)
        return b"klein_fake 1\n", "text/plain; version=1.0.0; charset=utf-8"


class FakeDecoders:
    """Decodes as a decoder's process does, in this one and without limits."""

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: tuple[int, int] | None,
        nearest: Callable[[int, int], tuple[int, int]],
        *,
        client: str,
    ) -> Edit:
        """Prepare at once."""
        return prepare(images, mask, size, nearest)


class FakeWorkers:
    """Notes who is asked to sleep or wake."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def sleep(self, cause: str) -> None:
        """Note it."""
        self.asked.append(("sleep", cause))

    def wake(self, cause: str) -> None:
        """Note it."""
        self.asked.append(("wake", cause))


@dataclass
class FakeRuntime:
    """What the app's lifespan needs of a runtime."""

    service: FakeService = field(default_factory=FakeService)
    metrics: FakeMetrics = field(default_factory=FakeMetrics)
    decoders: FakeDecoders = field(default_factory=FakeDecoders)
    previews: Previews = field(default_factory=lambda: Previews(FakeDecoders()))
    workers: FakeWorkers = field(default_factory=FakeWorkers)
    tokens: PromptTokens = field(default_factory=lambda: PromptTokens(TOKENIZER, 512))
    calls: list[str] = field(default_factory=list)
    on_start: Callable[[], None] = lambda: None

    async def __aenter__(self) -> FakeRuntime:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Note it."""
        self.calls.append("start")
        self.on_start()

    async def close(self) -> None:
        """Note it."""
        self.calls.append("close")


def paint(spec: ImageSpec, output: OutputFormat) -> bytes:
    """Make a picture whose colours tell seed and mask, with enough detail for JPEG to differ."""
    base = (spec.seed * 37 + len(spec.references) * 11) % 251
    return _paint(base, spec.output_size, output)


@lru_cache(64)
def _paint(base: int, size: tuple[int, int], output: OutputFormat) -> bytes:
    tile = Image.new("RGB", (16, 16))
    tile.putdata([((base + 5 * i) % 256, (base * 3 + i) % 256, (i * 7) % 256) for i in range(256)])
    picture = tile.resize(size, Image.Resampling.NEAREST)
    if output.format != "png":
        return encode(RawImage(*size, picture.tobytes()), output)
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)  # smaller than ours for such a pattern
    return buffer.getvalue()
