"""The cluster that the system tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ray_cluster import PYTHON, Cluster, own_network


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Nothing but loopback."""
    if not PYTHON.is_file():
        pytest.fail("Ray is missing; run `make test-system`, which installs it")
    with own_network():
        yield


@pytest.fixture(scope="module")
def cluster(network: None, tmp_path_factory) -> Iterator[Cluster]:
    """One node, on which nothing is deployed."""
    with Cluster(tmp_path_factory.mktemp("cluster"), KLEIN_QUEUE_IMAGES="4") as started:
        started.start()
        yield started
