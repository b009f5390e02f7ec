"""The hub on loopback and an empty cache."""

from __future__ import annotations

import pytest

from tests.engine.hub import COMMIT, VARIANT, Downloads, content
from tests.support.hub import Hub


@pytest.fixture
def hub():
    files = {(file.repository, COMMIT, file.path): content(file.path) for file in VARIANT.files}
    with Hub(files) as running:
        yield running


@pytest.fixture
def downloads(hub, tmp_path):
    return Downloads(hub, tmp_path / "cache")
