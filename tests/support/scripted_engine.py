"""An engine with scripted faults, and an entry point that gives it to the composition root.

    python -m tests.support.scripted_engine slow=0.2 oom@3 exit@5

`fault@n` strikes at the n-th picture of a worker process, `fault%n` at every n-th, `slow=s` makes
every picture take *s* seconds (split over its steps). Faults: `oom`, `sticky` (the GPU is lost),
`hang` (a step never returns), `exit` (the process dies), `fail`, `invalid` (the caller's fault),
`leak` (an error of no kind of ours, with the prompt in its message), `unreadable` (a sign of life
that the other process cannot read), `unsendable` (a picture that cannot be sent). `load=s` makes
loading take *s* seconds, `startfail` makes it fail, `startexit` makes the process die of it,
`stay=s` makes the process take *s* seconds to leave, `once=PATH` lets faults strike only while PATH
does not exist and creates it. `gate=PATH` holds every picture between its steps until PATH exists.
`noise=1` draws what no file format can compress. `trace=PATH` gets a line for each end of a
picture. `room=pixels` is the largest size that fits. `1:slow=2` is meant for the second worker
alone, after the words for all. `previews=1` sends previews after the first steps. No setting of the
service selects this engine.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.domain import (
    Generated,
    ImageSpec,
    LoadProgress,
    ModelInfo,
    PeakMemory,
    Progress,
    RawImage,
    Stage,
    StageTimings,
)
from app.engine.config import EngineConfig
from app.errors import (
    Cancelled,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    StartupError,
    WorkerLost,
)


@dataclass(frozen=True)
class Script:
    """What goes wrong, and when."""

    faults: dict[int, str] = field(default_factory=dict)
    slow_s: float = 0.0
    load_s: float = 0.0
    stay_s: float = 0.0
    noise: float = 0.0
    room: float = 0.0
    previews: float = 0.0
    start_fails: bool = False
    start_exits: bool = False
    once: str | None = None
    trace: str | None = None
    gate: str | None = None
    recurring: dict[int, str] = field(default_factory=dict)
    own: dict[int, Script] = field(default_factory=dict)
    """Other scripts, by the worker's place."""

    def of(self, worker: int) -> Script:
        """The script of one worker."""
        return self.own.get(worker, self)

    @classmethod
    def parse(cls, words: list[str]) -> Script:
        """Read the command line's words."""
        own = {int(word[0]) for word in words if word[1:2] == ":"}
        common = [word for word in words if word[1:2] != ":"]
        return replace(
            cls._parse(common),
            own={
                place: cls._parse([*common, *(w[2:] for w in words if w.startswith(f"{place}:"))])
                for place in own
            },
        )

    @classmethod
    def _parse(cls, words: list[str]) -> Script:
        script = cls()
        for word in words:
            if "@" in word:
                fault, _, count = word.partition("@")
                script = replace(script, faults={**script.faults, int(count): fault})
            elif "%" in word:
                fault, _, count = word.partition("%")
                recurring = {**script.recurring, int(count): fault}
                script = replace(script, recurring=recurring)
            elif word == "startfail":
                script = replace(script, start_fails=True)
            elif word == "startexit":
                script = replace(script, start_exits=True)
            else:
                key, _, value = word.partition("=")
                name = f"{key}_s" if key in {"slow", "load", "stay"} else key
                script = replace(
                    script, **{name: value if key in {"once", "trace", "gate"} else float(value)}
                )
        return script


class ScriptedEngine:
    """Make pictures whose pixels depend on the spec alone, and fail as scripted."""

    def __init__(self, config: EngineConfig, script: Script) -> None:
        self._config = config
        self._script = script
        self._count = 0

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Take the scripted time, then be ready."""
        if self._script.stay_s:
            stay(self._script.stay_s)
        if self._script.start_exits and self._is_due():
            os._exit(3)
        if self._script.start_fails:
            raise StartupError("The scripted engine does not start; this is what was asked for.")
        on_progress(LoadProgress("loading", 0.5, "Reading the weights."))
        time.sleep(self._script.load_s)
        return ModelInfo(
            model=self._config.model,
            revision="scripted",
            device="cpu",
            precision="fp32",
            precision_reason="scripted",
            plan="resident",
            plan_reasons=("scripted",),
            max_pixels=(int(self._script.room),) if self._script.room else (),
            torch="none",
            cuda=None,
            warm_up_s=max(self._script.slow_s, 0.001),
        )

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Step through the spec; strike where the script says so."""
        self._count += 1
        fault = self._fault()
        if fault and not self._is_due():
            fault = None
        started = time.monotonic()
        steps = []
        for step in range(spec.num_inference_steps):
            if is_cancelled():
                self._trace(f"stopped {step}")
                raise Cancelled
            if step == spec.num_inference_steps // 2 and fault:
                self._trace(f"struck {fault}")
                _strike(fault, spec, on_progress)
            self._wait_at_gate(is_cancelled)
            begun = time.monotonic()
            time.sleep(self._script.slow_s / spec.num_inference_steps)
            steps.append(time.monotonic() - begun)
            has_preview = self._script.previews and step < spec.previews
            small = draw(replace(spec, width=64, height=64)) if has_preview else None
            on_progress(Progress(Stage.DENOISE, step + 1, spec.num_inference_steps, small))
        self._trace("finished")
        return Generated(
            image=draw(spec) if not self._script.noise else draw_noise(spec),
            timings=StageTimings(0.0, 0.0, time.monotonic() - started, 0.0, tuple(steps)),
            peak=PeakMemory(1, 2),
            prompt_tokens=512,
            is_prompt_cut=False,
            is_prompt_cached=False,
            latents=threading.Lock() if fault == "unsendable" else None,
        )

    def close(self) -> None:
        """Release nothing."""

    def _fault(self) -> str | None:
        for every, fault in self._script.recurring.items():
            if self._count % every == 0:
                return fault
        return self._script.faults.get(self._count)

    def _is_due(self) -> bool:
        """Whether a fault may strike: always, or once."""
        if self._script.once is None:
            return True
        if Path(self._script.once).exists():
            return False
        Path(self._script.once).touch()
        return True

    def _wait_at_gate(self, is_cancelled: Callable[[], bool]) -> None:
        while self._script.gate and not Path(self._script.gate).exists() and not is_cancelled():
            time.sleep(0.005)

    def _trace(self, line: str) -> None:
        if self._script.trace:
            with Path(self._script.trace).open("a") as file:
                file.write(line + "\n")


def draw(spec: ImageSpec) -> RawImage:
    """One colour, decided by prompt and seed."""
    colour = hashlib.sha256(f"{spec.prompt}|{spec.seed}".encode()).digest()[:3]
    return RawImage(spec.width, spec.height, colour * (spec.width * spec.height))


class Unreadable:
    """Can be written down, and not be read again."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return int, ("no number",)


def stay(seconds: float) -> None:
    """Make this process take so long to leave."""
    leave = os._exit

    def leave_late(code: int) -> None:
        time.sleep(seconds)
        leave(code)

    os._exit = leave_late


def draw_noise(spec: ImageSpec) -> RawImage:
    """As many bytes as there can be, in every file format."""
    pixels = random.Random(f"{spec.prompt}|{spec.seed}").randbytes(spec.width * spec.height * 3)
    return RawImage(spec.width, spec.height, pixels)


def _strike(fault: str, spec: ImageSpec, on_progress: Callable[[Progress], None]) -> None:
    if fault == "oom":
        raise OutOfMemory("The card has no room for this picture; ask for a smaller one.")
    if fault == "sticky":
        raise WorkerLost("The card reported an error that only a new worker process can mend.")
    if fault == "fail":
        raise GenerationFailed("The picture could not be made.")
    if fault == "leak":
        raise RuntimeError(f"a library could not make sense of {spec.prompt!r}: {spec.prompt}")
    if fault == "invalid":
        raise InvalidRequest("The picture to edit is too narrow.", param="image", code="too_narrow")
    if fault == "unreadable":
        on_progress(Progress(Stage.DENOISE, 1, 1, Unreadable()))
    if fault in {"unreadable", "unsendable"}:
        return
    if fault == "exit":
        os._exit(3)
    if fault == "hang":
        time.sleep(3600)
    raise AssertionError(fault)


class MakeScriptedEngine:
    """Builds the engine inside the worker process; it pickles with its script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def __call__(self, config: EngineConfig) -> ScriptedEngine:
        """Build it."""
        return ScriptedEngine(config, self.script.of(config.worker))


if __name__ == "__main__":
    from app.cli.serve import serve
    from app.errors import KleinError
    from app.settings import Settings
    from tests.support import scripted_engine

    # Through the module's own name, so that the worker process finds the class under it.
    make_engine = scripted_engine.MakeScriptedEngine(scripted_engine.Script.parse(sys.argv[1:]))
    try:
        sys.exit(serve(Settings.read(os.environ), make_engine=make_engine))
    except KleinError as error:
        sys.exit(f"klein: {error.message}")
