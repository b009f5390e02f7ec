"""Promises that hold for one worker and for three."""

from __future__ import annotations

import json

import pytest

from tests.support.long_form import one_of
from tests.support.server import Server

WITH_SEVERAL = pytest.mark.parametrize("device", one_of("cpu", "cpu:3"))
"""Run a test with one worker, and with three where the long forms run."""


def devices(server: Server) -> list[dict]:
    """What /health says of each."""
    return json.loads(server.get("/health")[2])["devices"]


def count_of(device: str) -> int:
    """How many workers a setting makes."""
    return 3 if device == "cpu:3" else 1
