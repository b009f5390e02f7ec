"""Services with scripted faults, each in a process of its own."""

from tests.e2e.conftest import scripted as scripted
