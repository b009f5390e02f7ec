"""What the operator has to settle is said in one sentence with the way out."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.engine.models.entry import ModelEntry
from tests.engine.hub import BF16, CONFIG, KLEIN, VARIANT, content


class TestRefusals:
    def test_no_network(self, downloads):
        """Without network and cache, the sentence says what is missing and whom it cannot reach."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            downloads.endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
            downloads.fails(rf"{CONFIG} is not in the cache and 127\.0\.0\.1 cannot be reached")

        assert downloads.waits[:6] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]

    @pytest.mark.parametrize(
        ("status", "token", "reason"),
        [
            (401, None, "wants a token for black-forest-labs.*set HF_TOKEN"),
            (401, "hf_old", "does not know the token.*set HF_TOKEN"),
            (403, "hf_new", "accept its terms"),
            (404, None, "at the pinned revision; check HF_ENDPOINT"),
            (429, None, "wait 17 seconds or set HF_TOKEN"),
            (418, None, "answers 418"),
        ],
    )
    def test_refused(self, downloads, monkeypatch, status, token, reason):
        """What the operator has to settle is said at once, once, and without the token."""
        monkeypatch.delenv("HF_TOKEN", raising=False)
        downloads.hub.spoil(CONFIG, status)

        message = downloads.fails(reason, token=token)

        assert "hf_" not in message
        assert downloads.waits == []
        assert len(downloads.hub.seen) == 1

    def test_disk_too_small(self, downloads, monkeypatch):
        """The room is judged before the first request, and both numbers are named."""
        huge = replace(VARIANT.shared[0], size_bytes=12_300_000_000)
        variant = replace(VARIANT, shared=(huge,))
        monkeypatch.setattr(
            shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_100_000_000)
        )

        downloads.fails(
            r"12\.3 GB are needed and 3\.1 GB are free",
            variant=variant,
        )

        assert downloads.hub.seen == []

    def test_what_lies_there_needs_no_room(self, downloads, monkeypatch):
        """Only what is still to come counts against the free space."""
        downloads.run("fp8")

        free = len(content(BF16))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

        downloads.run("bf16")

    def test_folder_that_cannot_be_written(self, downloads):
        """A cache that may not be written to is named as what it is."""
        downloads.cache = Path("/sys/klein")

        downloads.fails("KLEIN_CACHE_DIR may not be used")

    def test_other_repositories(self, downloads):
        """Only the catalogue's repositories are ever asked, even if an entry says otherwise."""
        stray = replace(VARIANT.shared[0], repository="somebody/else")

        downloads.fails(
            "not a repository of the catalogue",
            variant=ModelEntry(KLEIN.spec, KLEIN.architecture, transformers={"fp8": stray}),
        )

        assert downloads.hub.seen == []
