"""What changes on disk is noticed before a loader reads it."""

from __future__ import annotations

import os

import pytest

from app.engine.hub.download import verify
from tests.engine.hub import CONFIG, ENCODER, SINGLE, VARIANT, content


class TestAtRest:
    @pytest.mark.parametrize("damage", ["truncated", "flipped"])
    def test_damaged_file_is_refused_by_name(self, downloads, damage):
        """A shard that has changed on disk never reaches a loader."""
        path = (downloads.run() / ENCODER).resolve()
        data = bytearray(path.read_bytes())
        data[1_000_000] ^= 1
        path.write_bytes(data[:-1] if damage == "truncated" else data)
        downloads.hub.seen.clear()

        downloads.fails(f"{ENCODER} is damaged")

        assert downloads.hub.seen == []
        assert not path.exists()
        assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)

    def test_touched_file_is_hashed_once(self, downloads):
        """A file whose time of change is new is hashed again, and trusted again if it is right."""
        path = (downloads.run() / ENCODER).resolve()
        os.utime(path)
        downloads.progress.clear()

        downloads.run()
        seen = len(downloads.progress)
        downloads.run()

        assert {progress.stage for progress in downloads.progress} == {"verify"}
        assert seen == len(downloads.progress) > 0

    def test_verify_finds_what_time_hides(self, downloads):
        """A bit that flipped under an unchanged time of change is found by hashing everything."""
        path = (downloads.run() / ENCODER).resolve()
        before = path.stat()
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        found = verify(VARIANT, downloads.cache, "fp8", downloads.progress.append)

        assert {file.path: right for file, right in found.items()} == {
            CONFIG: True,
            ENCODER: False,
            SINGLE: True,
        }
        assert not path.exists()

    def test_verify_of_nothing(self, downloads):
        """An empty cache has nothing right and nothing wrong in it."""
        found = verify(VARIANT, downloads.cache, "fp8", downloads.progress.append)

        assert set(found.values()) == {None}
