"""What is one promise in several forms: the first is in every run, all are in `.ci/run`."""

from __future__ import annotations

from typing import Any

import pytest

FULL = pytest.mark.full


def one_of(first: object, *others: object) -> list[Any]:
    """The values of a parameter, of which `make test` takes the first alone."""
    return [first, *(pytest.param(each, marks=FULL) for each in others)]
