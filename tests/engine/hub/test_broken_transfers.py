"""Whatever breaks on the way, a file is taken up where it broke, and is right or not there."""

from __future__ import annotations

import pytest

from app.engine.hub.cache import HubCache
from app.engine.hub.download import missing_bytes
from tests.engine.hub import CONFIG, ENCODER, FP8_BYTES, VARIANT, content


class TestBrokenTransfers:
    def test_cut_connection(self, downloads):
        """A connection that breaks is taken up where it broke, at once."""
        downloads.hub.spoil(ENCODER, "cut", "cut")

        folder = downloads.run()

        assert (folder / ENCODER).read_bytes() == content(ENCODER)
        first, second, third = downloads.ranges(ENCODER)
        assert first is None
        assert 0 < int(second[6:-1]) < int(third[6:-1]) < 3_000_000
        assert downloads.waits == []

    def test_short_answer(self, downloads):
        """An answer that declares too little is not taken for the whole."""
        downloads.hub.spoil(ENCODER, "short")

        assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)
        assert downloads.ranges(ENCODER) == [None, "bytes=1500000-"]

    def test_never_more_than_the_whole_beginning(self, downloads):
        """A hub that answers, and never with what is missing, is asked five times."""
        downloads.hub.spoil(ENCODER, *["empty"] * 99)

        downloads.fails("sends less than the whole file")
        assert len(downloads.ranges(ENCODER)) == 5

    def test_range_not_honoured(self, downloads):
        """A hub that answers a range with the whole file does not double the beginning."""
        downloads.hub.spoil(ENCODER, "cut", "no_range")

        assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)

    def test_passing_trouble(self, downloads):
        """A hub that fails for a while is asked again, less and less often."""
        downloads.hub.spoil(CONFIG, 503, 500, 502)

        downloads.run()

        assert downloads.waits == [1.0, 2.0, 4.0]

    def test_resumed_by_the_next_start(self, downloads):
        """What a failed start has brought is kept; the next one asks for the rest only."""
        downloads.hub.spoil(ENCODER, "cut", *[503] * 99)

        message = downloads.fails("answers 503")
        left = missing_bytes(VARIANT, downloads.cache, "fp8")
        downloads.hub.seen.clear()
        downloads.hub._faults.clear()
        downloads.run()

        assert f"{3_000_000 + 400_000 - left:,} of 3,000,000 bytes" in message
        assert downloads.ranges(ENCODER) == [f"bytes={3_400_000 - left}-"]
        assert left < FP8_BYTES - 446

    def test_too_long_left_over(self, downloads):
        """A leftover that is longer than the file is thrown away, not handed on."""
        part = HubCache(downloads.cache).path(VARIANT.shared[0])
        part = part.with_name(part.name + ".part")
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(500))

        downloads.fails(f"{CONFIG} is damaged")

        assert (downloads.run() / CONFIG).read_bytes() == content(CONFIG)

    @pytest.mark.parametrize("fault", ["flip", "long"])
    def test_wrong_content(self, downloads, fault):
        """One wrong bit, or a byte too many: the file is deleted, named, and fetched anew."""
        downloads.hub.spoil(ENCODER, fault)

        downloads.fails(f"{ENCODER} is damaged.*deleted")

        assert [p for p in downloads.cache.rglob("model.safetensors*") if p.is_file()] == []
        assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)
