"""Pictures by a service that runs: several at a time, each as a stream that tells its progress.

The streams are read by threads, and everything else happens in the thread that asked, so that a
Ctrl-C there ends all of them: the service stops what nobody listens to any more.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPResponse
from itertools import count
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from app.cli.client.service import Service, error_of
from app.cli.console import STAGES, plain
from app.cli.drawing import Drawn, Event, OnEvent, Preview, Step, denoised
from app.errors import KleinError

_AT_ONCE = 4
"""Pictures that are asked for together, so that a service with several cards uses them."""
_MOST_LINE = 512 * 1024 * 1024
"""Bytes of one event, a picture as base64."""
_TRIES = 3
"""How often a service that is full is asked again, when it says that one should."""
_LOOK_S = 0.5
_FULL = frozenset({"server_is_overloaded", "rate_limit_exceeded"})
_LOADING = "model_loading"
_CLOSED = "The pictures are not wanted any more."


def draw(
    service: Service, path: str, requests: Sequence[Mapping[str, Any]], on_event: OnEvent
) -> None:
    """Have the picture of each of *requests* made by POST to *path*; *on_event* gets what happens.

    Raises:
        KleinError: one of them failed; the others are taken back.
    """
    drawing = _Drawing(service, path, requests)
    try:
        drawing.start()
        for index, event in drawing.events():
            on_event(index, event)
    finally:
        drawing.close()


@dataclass(slots=True)
class _Drawing:
    service: Service
    path: str
    requests: Sequence[Mapping[str, Any]]
    _happened: SimpleQueue[tuple[int, Event | Exception]] = field(default_factory=SimpleQueue)
    _next: Iterator[int] = field(default_factory=count)
    _lock: Lock = field(default_factory=Lock)
    _open: dict[int, socket.socket] = field(default_factory=dict)
    _is_closed: bool = False

    def start(self) -> None:
        """Start the threads; they do not keep the process alive."""
        for _ in range(min(_AT_ONCE, len(self.requests))):
            Thread(target=self._work, daemon=True).start()

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield what happens until all pictures are there; raise the first error."""
        left = len(self.requests)
        while left:
            index, event = self._happened.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Drawn)
            yield index, event

    def close(self) -> None:
        """End what is not finished."""
        with self._lock:
            self._is_closed = True
            opened = list(self._open.values())
        for each in opened:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _work(self) -> None:
        while not self._is_closed and (index := next(self._next)) < len(self.requests):
            try:
                self._make(index)
            except Exception as error:
                self._happened.put((index, error))
                return
            finally:
                with self._lock:
                    self._open.pop(index, None)

    def _make(self, index: int) -> None:
        full = 0
        while not self._is_closed:
            try:
                self._ask(index)
                return
            except KleinError as error:
                if error.code == _LOADING:
                    self._wait_until_loaded(index)
                elif error.code in _FULL and full < _TRIES:
                    full += 1
                    self._wait_for_room(index, error.retry_after_s or 1)
                else:
                    raise

    def _ask(self, index: int) -> None:
        def hold(opened: socket.socket) -> None:
            with self._lock:
                if self._is_closed:
                    raise KleinError(_CLOSED)
                self._open[index] = opened

        self._tell(index, Step("sending"))
        body = self.requests[index]
        with self.service.ask("POST", self.path, body, on_open=hold) as answer:
            for event in read_events(answer):
                self._tell(index, event)
                if isinstance(event, Drawn):
                    return
        raise KleinError("The service ended the stream before the picture was there.")

    def _wait_until_loaded(self, index: int) -> None:
        while not self._is_closed:
            # First, since one that is ready may refuse for a moment yet.
            time.sleep(_LOOK_S)
            state = self.service.state()
            if state["ready"]:
                return
            stage = str(state["stage"])
            if stage in {"failed", "draining"}:
                raise KleinError(plain(state.get("reason") or "The service is ending."))
            doing = STAGES.get(stage, plain(stage))
            self._tell(index, Step(f"the service is {doing}"))

    def _wait_for_room(self, index: int, seconds: int) -> None:
        self._tell(index, Step(f"the queue is full, asking again in {seconds} s"))
        end = time.monotonic() + seconds
        while not self._is_closed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_S))

    def _tell(self, index: int, event: Event) -> None:
        self._happened.put((index, event))


def read_events(answer: HTTPResponse) -> Iterator[Event]:
    """Yield what the stream *answer* tells: server-sent events, and the comments between them.

    Raises:
        KleinError: it tells of an error.
    """
    seconds: dict[str, float] = {}
    for line in _lines(answer):
        word, _, rest = line.partition(b": ")
        if word == b"data":
            yield _read_data(rest, seconds)
        elif not word:
            kind, _, told = rest.decode(errors="replace").partition(" ")
            if kind == "timing":
                seconds = _timings(told)
            elif (step := _step(kind, told)) is not None:
                yield step


def _lines(answer: HTTPResponse) -> Iterable[bytes]:
    while line := answer.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            raise KleinError("The service sent more than a picture can be.")
        yield line.rstrip(b"\r\n")


def _read_data(data: bytes, seconds: Mapping[str, float]) -> Event:
    try:
        found = json.loads(data)
        if found["type"] == "error":
            raise error_of(found["error"])
        picture = base64.b64decode(found["b64_json"])
        if found["type"].endswith(".partial_image"):
            return Preview(picture)
        width, height = (int(side) for side in found["size"].split("x"))
        warnings = [plain(each) for each in found.get("warnings", [])]
        return Drawn(picture, width, height, int(found["seed"]), seconds, tuple(warnings))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KleinError("The service sent an event that cannot be read.") from None


def _step(kind: str, told: str) -> Step | None:
    """Read `queued 3`, `waking 4.0` (seconds) and `denoise 2/4`; None for other comments."""
    if kind == "queued" and told.isdigit():
        return Step(f"waiting, {told} before it" if told != "0" else "waiting")
    if kind == "waking":
        return Step("waking the model")
    step, slash, steps = told.partition("/")
    if slash and step.isdigit() and steps.isdigit():
        share = denoised(int(step), int(steps))
        return Step(f"{plain(kind)} {step}/{steps}", share)
    return None


def _timings(text: str) -> dict[str, float]:
    """Read seconds by stage, from the milliseconds of a Server-Timing."""
    found = {}
    for each in text.split(", "):
        stage, _, milliseconds = each.partition(";dur=")
        with suppress(ValueError):
            found[plain(stage)] = float(milliseconds) / 1000
    return found
