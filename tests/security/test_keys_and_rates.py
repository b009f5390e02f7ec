"""Keys from a file, and how many images a client may ask for in a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import StartupError
from app.jobs.rate_limit import RateLimit
from app.settings import Settings


def test_keys_come_from_a_file_as_well(tmp_path: Path) -> None:
    """One on each line; empty lines and comments do not count."""
    file = tmp_path / "keys"
    file.write_text("# the gateway\nfile-key-1234\n\n  file-key-5678  \n")
    environ = {"KLEIN_API_KEYS": "first-key-1234", "KLEIN_API_KEYS_FILE": str(file)}

    assert Settings.read(environ).api_keys == ("first-key-1234", "file-key-1234", "file-key-5678")


@pytest.mark.parametrize("content", ["", "# nothing\n\n", "short\n", None, b"\xff\xfe\xff"])
def test_a_file_that_gives_no_key_ends_the_start(tmp_path: Path, content) -> None:
    """Otherwise a mistake in the path or the file would leave the service open to everyone."""
    file = tmp_path / "keys"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)

    with pytest.raises(StartupError, match="KLEIN_API_KEYS_FILE") as refused:
        Settings.read({"KLEIN_API_KEYS_FILE": str(file)})
    assert "short" not in refused.value.message


def test_settings_do_not_show_their_keys(tmp_path: Path) -> None:
    """Neither those of the environment nor those of the file, whoever prints them."""
    file = tmp_path / "keys"
    file.write_text("file-key-1234\n")
    settings = Settings.read({"KLEIN_API_KEYS": "first-key-1234", "KLEIN_API_KEYS_FILE": str(file)})

    assert "key-1234" not in f"{settings!r} {settings}"


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_may_come_at_once_and_comes_back_evenly() -> None:
    """Six in a minute: six at once, then one every ten seconds."""
    clock = Clock()
    rates = RateLimit(6, clock=clock)
    rates.take("a", 6)

    assert rates.wait_s("a", 1) == 10
    assert rates.wait_s("b", 6) == 0
    clock.now += 10
    assert rates.wait_s("a", 1) == 0
    assert rates.wait_s("a", 2) == 10


def test_no_limit_counts_nothing() -> None:
    """0 is off, and nothing is remembered of anyone."""
    rates = RateLimit(0)
    rates.take("a", 1000)

    assert rates.wait_s("a", 1000) == 0
    assert repr(rates) == "<RateLimit 0 per minute, 0 clients>"


def test_callers_who_change_their_address_leave_nothing_behind() -> None:
    """A hundred thousand addresses, ten a second: only the recent ones are remembered."""
    clock = Clock()
    rates = RateLimit(60, clock=clock)
    for number in range(100_000):
        rates.take(f"address:{number}", 1)
        clock.now += 0.1

    assert int(repr(rates).split()[4]) < 3000
