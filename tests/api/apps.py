"""Apps on fakes. Making one takes longer than most tests, so those with equal settings share it."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI

from app.api.app import create_app
from app.settings import Settings
from tests.support.fakes import FakeRuntime

_PARAMETERS = ("heartbeat_s", "link_lifetime_s", "clock")

_next: list[FakeRuntime] = []


def app_on(runtime: FakeRuntime, **given: Any) -> FastAPI:
    """Make the app with these settings, or take one made before; it serves *runtime* from the start
    of its lifespan on.
    """
    _next[:] = [runtime]
    return _app(**given)


@cache
def _app(**given: Any) -> FastAPI:
    parameters = {name: given.pop(name) for name in _PARAMETERS if name in given}
    return create_app(Settings.read({}, **given), lambda _: _next[0], **parameters)
