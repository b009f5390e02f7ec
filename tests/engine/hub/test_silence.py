"""A download may take as long as it likes, but not stand still."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from app.engine.config import EngineConfig
from app.engine.hub import fetch
from app.engine.hub.fetch import Hub as Source
from app.engine.load import _find
from app.engine.models import registry
from app.engine.quantization.select import choose_precision
from app.worker import supervisor
from tests.engine.hub import CONFIG, ENCODER, SINGLE, VARIANT, content


def test_a_line_that_falls_silent_ends_the_download_with_what_came_kept(downloads) -> None:
    """One sentence, and the next start asks for the rest only."""
    downloads.silence_s = 0.2
    downloads.hub.spoil(ENCODER, *["stall"] * 9)

    message = downloads.fails(r"sent nothing for 0\.2 s")
    assert "bytes have come and are kept; start again to go on from there" in message
    assert len(downloads.ranges(ENCODER)) == 1

    downloads.hub._faults.clear()
    assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)
    last = downloads.ranges(ENCODER)[-1]
    assert last is not None
    assert int(last[6:-1]) > 1_000_000


def test_a_hub_that_never_answers_is_not_waited_for_longer(downloads, monkeypatch) -> None:
    """Tries that time out without a byte add up to the same limit, however long each may wait."""
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.06)
    downloads.clock = time.monotonic
    downloads.silence_s = 0.2

    downloads.hub.spoil(ENCODER, *["hush"] * 50)
    downloads.fails(r"sent nothing for 0\.2 s")

    assert 1 < len(downloads.ranges(ENCODER)) <= 4


def test_slow_is_not_silent(downloads) -> None:
    """Bytes that keep coming never add up to a limit: the clock starts anew with each."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 20.0
        return now

    downloads.clock = clock
    assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)
    assert now > fetch.SILENCE_S


def test_hashing_what_came_is_reported(downloads, monkeypatch) -> None:
    """A large file takes a minute to hash; who watches the worker hears of it all the while."""
    monkeypatch.setattr(fetch, "_HASH_BLOCK_BYTES", 100_000)
    monkeypatch.setattr("app.engine.hub.download._REPORT_EVERY_S", 0.0)
    downloads.run()

    wholes = [progress for progress in downloads.progress if progress.detail.endswith(ENCODER)]
    assert len([each for each in wholes if each.fraction == wholes[-1].fraction]) > 10


def test_reports_of_what_has_not_changed_are_few(downloads, monkeypatch) -> None:
    """One for the whole file, not one for each block that is hashed."""
    monkeypatch.setattr(fetch, "_HASH_BLOCK_BYTES", 1_000)
    monkeypatch.setattr("app.engine.hub.download._REPORT_EVERY_S", 1000.0)
    downloads.run()

    assert len(downloads.progress) <= 2 * len({each.detail for each in downloads.progress})
    assert downloads.progress[-1].detail.endswith(SINGLE)


def test_the_setting_reaches_the_download(monkeypatch) -> None:
    """From the service's settings into the worker's config, and from there to the hub."""
    seen: list[Source] = []

    def ensure(entry, cache, precision, on_progress, *, hub):
        seen.append(hub)
        return cache

    monkeypatch.setattr("app.engine.hub.download.ensure", ensure)

    config = EngineConfig("flux.2-klein-4b", None, "/x", None, download_silence_s=7.0)
    _find(config, choose_precision("fp32", None, is_small=True), lambda progress: None)
    assert [hub.silence_s for hub in seen] == [7.0]


@pytest.mark.parametrize("is_there", [False, True])
def test_after_the_download_the_limit_of_loading_holds(downloads, monkeypatch, is_there) -> None:
    """Else what comes next is taken for a download that has fallen silent."""
    monkeypatch.setattr(registry, "MODELS", {VARIANT.spec.id: VARIANT})
    monkeypatch.setattr(fetch, "Hub", lambda silence_s: Source(downloads.endpoint))
    if is_there:
        (downloads.run() / CONFIG).resolve().touch()
    config = EngineConfig(VARIANT.spec.id, None, str(downloads.cache), None)
    precision = replace(choose_precision("fp32", None, is_small=True), name="fp8")
    seen: list[str] = []

    _find(config, precision, lambda progress: seen.append(progress.stage))
    assert {"verify" if is_there else "download"} <= set(seen) & supervisor._FETCHING
    assert seen[-1] not in supervisor._FETCHING


@pytest.mark.parametrize("silence_s", [3.0, 120.0, 20_000.0])
def test_the_setting_and_not_the_number_of_tries_ends_a_download(downloads, silence_s) -> None:
    """A line that is refused at once is asked for again until the silence is over."""
    downloads.silence_s = silence_s
    tries = 0

    def refuse(*_) -> None:
        nonlocal tries
        tries += 1
        raise fetch._Interrupted("cannot be reached")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_append", refuse)
        downloads.clock = lambda: sum(downloads.waits)
        message = downloads.fails("cannot be reached")

    assert f"{silence_s:g} s (KLEIN_DOWNLOAD_SILENCE_S)" in message
    assert sum(downloads.waits) == silence_s
    assert max(downloads.waits) <= 10.0
    assert tries >= silence_s / 10
