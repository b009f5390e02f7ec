"""All files of one load come once, and the next start needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from app.engine.hub.cache import HubCache
from app.engine.hub.download import missing_bytes
from tests.engine.hub import BF16, COMMIT, CONFIG, ENCODER, FP8_BYTES, OWN, SINGLE, VARIANT, content


class TestWhole:
    def test_folder(self, downloads):
        """The folder holds what one load needs, in its layout, and nothing besides."""
        folder = downloads.run()

        found = {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        assert found == {path: content(path) for path in (CONFIG, ENCODER, SINGLE)}

    def test_precisions_share(self, downloads):
        """A second precision fetches its transformer only, and has a folder of its own."""
        downloads.run("fp8")
        downloads.hub.seen.clear()

        folder = downloads.run("bf16")

        assert [seen.path.rpartition(COMMIT)[2] for seen in downloads.hub.seen] == [f"/{BF16}"]
        assert (folder / BF16).read_bytes() == content(BF16)
        assert not (folder / SINGLE).exists()

    def test_second_start_touches_no_network(self, downloads):
        """With everything in place no request is made, whatever has become of the hub."""
        first = downloads.run()
        downloads.hub.seen.clear()
        downloads.endpoint = "http://hub.invalid"

        assert downloads.run() == first
        assert downloads.hub.seen == []

    def test_second_start_reads_no_weights(self, downloads):
        """What was found right once is not hashed again while it is unchanged."""
        downloads.run()
        downloads.progress.clear()

        downloads.run()

        assert downloads.progress == []

    def test_progress(self, downloads):
        """Progress tells stage, share and bytes, never goes back, and ends at the whole."""
        downloads.run()

        fractions = [progress.fraction for progress in downloads.progress]
        assert {progress.stage for progress in downloads.progress} == {"download"}
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert downloads.progress[-1].detail == f"0.00 of 0.00 GB, {SINGLE}"

    def test_missing_bytes(self, downloads):
        """What is still to come is known before, and is nothing afterwards."""
        assert missing_bytes(VARIANT, downloads.cache, "fp8") == FP8_BYTES

        downloads.run()

        assert missing_bytes(VARIANT, downloads.cache, "fp8") == 0
        assert missing_bytes(VARIANT, downloads.cache, "bf16") == len(content(BF16))

    def test_links_of_an_earlier_catalogue_go(self, downloads):
        """A folder never mixes files of two catalogues."""
        folder = downloads.run()
        (folder / "old.safetensors").symlink_to(folder / CONFIG)
        (folder / SINGLE).unlink()
        (folder / SINGLE).symlink_to(folder / CONFIG)

        downloads.run()

        assert not (folder / "old.safetensors").is_symlink()
        assert (folder / SINGLE).read_bytes() == content(SINGLE)

    def test_cache_can_be_moved(self, downloads, tmp_path):
        """A cache that was moved with its links works where it has come to."""
        downloads.run()
        downloads.cache = downloads.cache.rename(tmp_path / "elsewhere")
        downloads.hub.seen.clear()

        assert (downloads.run() / SINGLE).read_bytes() == content(SINGLE)
        assert downloads.hub.seen == []

    def test_large_files_from_the_store(self, downloads):
        """A redirect is followed, and the token stays with the hub."""
        downloads.hub.redirect_from_bytes = 1000

        downloads.run(token="hf_secret")

        hosts = {seen.host.partition(":")[0]: seen.token for seen in downloads.hub.seen}
        assert hosts == {"127.0.0.1": "Bearer hf_secret", "localhost": None}

    def test_one_process_at_a_time(self, downloads):
        """Who comes second waits, says so, and then finds everything in place."""
        store = HubCache(downloads.cache)
        waiting = threading.Thread(target=downloads.run)
        with store.locked(lambda: None):
            waiting.start()
            deadline = time.monotonic() + 10
            while not any("another process" in p.detail for p in downloads.progress):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert downloads.hub.seen == []
        waiting.join(10)

        assert missing_bytes(VARIANT, downloads.cache, "fp8") == 0


PROBE = """
from pathlib import Path
import sys
from app.engine.hub.download import ensure
from app.errors import StartupError
from tests.engine.hub import VARIANT
try:
    print(ensure(VARIANT, Path(sys.argv[1]), "fp8", lambda progress: None))
except StartupError as error:
    print(error.message)
"""


def probe(cache: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(cache)],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_environment_of_the_hub(hub, tmp_path):
    """HF_ENDPOINT and HF_TOKEN are honoured, and HF_HUB_OFFLINE forbids only what is missing."""
    places = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_mine"}

    folder = probe(tmp_path / "cache", **places)
    assert (Path(folder) / SINGLE).read_bytes() == content(SINGLE)
    assert {seen.token for seen in hub.seen} == {"Bearer hf_mine"}

    hub.seen.clear()
    assert probe(tmp_path / "cache", HF_HUB_OFFLINE="1", **places) == folder
    assert "HF_HUB_OFFLINE forbids" in probe(tmp_path / "other", HF_HUB_OFFLINE="1", **places)
    assert hub.seen == []


def test_the_hub_of_the_tests_is_one(hub, tmp_path):
    """huggingface_hub's own download takes our hub for a real one."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        OWN, ENCODER, revision=COMMIT, endpoint=hub.endpoint, local_dir=tmp_path, token=False
    )

    assert Path(path).read_bytes() == content(ENCODER)
    assert [seen.method for seen in hub.seen] == ["HEAD", "GET"]
