"""The lock with hashes is the other lock, file by file."""

from __future__ import annotations

import re

from packaging.utils import canonicalize_name

from tests.support.server import ROOT
from tools import audit

_ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ;[^\\\n]*)?((?: \\\n    --hash=\S+)*)$", re.MULTILINE
)
OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton|setuptools")


def entries() -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package of the lock with hashes."""
    text = (ROOT / "requirements.hashes.lock").read_text()
    assert not re.search(r"https?://|file:", text)
    found = {
        canonicalize_name(name): (version, hashes.count("--hash=sha256:"))
        for name, version, hashes in _ENTRY.findall(text)
    }
    assert len(found) == sum(1 for line in text.splitlines() if "==" in line)
    return {str(name): entry for name, entry in found.items()}


def test_every_package_has_the_hashes_of_its_files() -> None:
    """One that had none would make pip refuse the whole lock."""
    assert [name for name, (_, hashes) in entries().items() if hashes == 0] == []


def test_both_locks_have_the_same_versions() -> None:
    """What the one has besides are the libraries that torch's build for CUDA wants."""
    plain = {
        str(canonicalize_name(name)): version
        for name, version in audit.pins(ROOT / "requirements.lock").items()
    }
    hashed = {name: version for name, (version, _) in entries().items()}

    assert {name: hashed.get(name) for name in plain} == plain
    besides = hashed.keys() - plain.keys()
    assert "triton" in besides
    assert [name for name in besides if not OF_CUDA.fullmatch(name)] == []
