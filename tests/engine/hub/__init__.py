"""A small variant, published on our own hub, and what the tests do with it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from app.domain import LoadProgress
from app.engine.hub.download import ensure
from app.engine.hub.fetch import Hub as Source
from app.engine.models.entry import ModelEntry, RemoteFile
from app.engine.models.registry import MODELS
from app.errors import StartupError
from tests.support.hub import Hub, digest

KLEIN = MODELS["flux.2-klein-4b"]
OWN, FP8 = KLEIN.repositories
CONFIG, ENCODER = "model_index.json", "text_encoder/model.safetensors"
SINGLE, BF16 = "flux-2-klein-4b-fp8.safetensors", "transformer/model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def content(path: str) -> bytes:
    sizes = {CONFIG: 446, ENCODER: 3_000_000, SINGLE: 400_000, BF16: 700_000}
    return random.Random(path).randbytes(sizes[path])


def published(repository: str, path: str) -> RemoteFile:
    return RemoteFile(repository, COMMIT, path, len(content(path)), digest(content(path)))


VARIANT = ModelEntry(
    spec=KLEIN.spec,
    architecture=KLEIN.architecture,
    shared=(published(OWN, CONFIG), published(OWN, ENCODER)),
    transformers={
        "fp8": published(FP8, SINGLE),
        "int8": published(OWN, BF16),
        "bf16": published(OWN, BF16),
    },
)
FP8_BYTES = 446 + 3_000_000 + 400_000


class Downloads:
    """Calls `ensure` with the hub of the test, and keeps what was reported."""

    def __init__(self, hub: Hub, cache: Path) -> None:
        self.hub, self.cache = hub, cache
        self.progress: list[LoadProgress] = []
        self.waits: list[float] = []
        self.endpoint = hub.endpoint
        self.silence_s = 120.0
        self.clock = self._now

    def _now(self) -> float:
        """The clock, where waiting takes no time but counts."""
        return time.monotonic() + sum(self.waits)

    def run(self, precision: str = "fp8", *, variant: ModelEntry = VARIANT, token=None, **options):
        source = Source(self.endpoint, token, self.waits.append, self.silence_s, self.clock)
        return ensure(variant, self.cache, precision, self.progress.append, hub=source, **options)

    def fails(self, reason: str, **options) -> str:
        with pytest.raises(StartupError, match=reason) as caught:
            self.run(**options)
        assert "\n" not in caught.value.message
        assert caught.value.message.endswith(".")
        return caught.value.message

    def ranges(self, path: str) -> list[str | None]:
        return [seen.range for seen in self.hub.seen if seen.path.endswith(path)]
