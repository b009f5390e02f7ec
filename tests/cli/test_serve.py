"""How `klein serve` ends."""

from __future__ import annotations

import argparse
import signal

import pytest

from app.cli import first_lines, serve
from app.cli.serve import _leave_within
from app.model_choice import Choice
from app.settings import Settings


@pytest.fixture
def timer():
    """The process's timer, which this test may set."""
    handler = signal.getsignal(signal.SIGALRM)
    yield lambda: signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


def test_a_further_signal_does_not_put_the_end_off(timer):
    """Ctrl-C again and again does not keep the process alive; an earlier end is possible."""
    _leave_within(100, 143)
    _leave_within(200, 143)
    assert 0 < timer() <= 100
    _leave_within(50, 143)
    assert 0 < timer() <= 50


@pytest.mark.parametrize(
    ("host", "environ", "told"),
    [
        ("127.0.0.1", {}, "Only programs on this machine reach it"),
        ("::1", {}, "Only programs on this machine reach it"),
        (
            "192.168.1.5",
            {"KLEIN_API_KEYS": "first-key-1234"},
            "http://192.168.1.5:8123, with a key",
        ),
        ("fd00::5", {"KLEIN_TRUST_NETWORK": "true"}, "http://[fd00::5]:8123, WITHOUT a key"),
        ("0.0.0.0", {"KLEIN_API_KEYS": "first-key-1234"}, ":8123, with a key"),
    ],
)
def test_it_says_who_can_reach_it(host, environ, told) -> None:
    """With the address that other devices take, and whether they need a key."""
    said = first_lines.reach(host, 8123, Settings.read(environ))

    assert told in said
    assert "0.0.0.0:" not in said
    assert "first-key" not in said


def test_it_says_what_it_needs(tmp_path) -> None:
    """Memory, a card, and what is downloaded, before anything is."""
    settings = Settings.read({"KLEIN_CACHE_DIR": str(tmp_path)})
    klein, exact = Choice("flux.2-klein-4b", None, ""), {"precision": "bf16"}

    assert "up to 16.0 GB are downloaded" in first_lines.needs(settings, klein)
    assert str(tmp_path) in first_lines.needs(settings.model_copy(update=exact), klein)
    assert "a card of 6 GB" in first_lines.needs(settings, klein)
    assert "KLEIN_MODEL" in first_lines.needs(settings, Choice("flux.2-klein-4b", "/a/b", ""))
    assert "no download" in first_lines.needs(settings, Choice("shapes", None, ""))


def test_programs_get_its_log_as_json(monkeypatch) -> None:
    """`--json` is KLEIN_LOG_FORMAT, one document for each line."""
    served: list[Settings] = []
    monkeypatch.setattr(serve, "serve", lambda settings: served.append(settings) or 0)
    for as_json in (True, False):
        assert serve.run(argparse.Namespace(json=as_json), Settings.read({})) == 0

    assert [each.log_format for each in served] == ["json", "text"]
