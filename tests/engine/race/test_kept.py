"""A race is held once for a card, a driver and a set of versions."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from app.engine.race.kept import race_once, recall
from app.engine.race.results import wrong
from tests.engine.race.test_results import H100, RTX_3060

KEY = {"card": "00000000-1111", "driver": "580.65.06", "torch": "2.13.0+cu130"}


def never():
    raise AssertionError("a race was held")


def test_what_was_kept_is_read_again(tmp_path):
    """Whole, from a file that is nobody else's business."""
    assert race_once(tmp_path, KEY, lambda: RTX_3060) is RTX_3060
    assert race_once(tmp_path, KEY, never) == RTX_3060
    (kept,) = (tmp_path / "race").glob("*.json")
    assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_what_computes_nonsense_does_so_at_the_next_start_too(tmp_path, error):
    """An error that is no number stays one in the file, and keeps its kernel out."""
    lap = replace(H100.linears[0], error=error)
    race_once(tmp_path, KEY, lambda: replace(H100, linears=(lap, *H100.linears[1:])))

    assert wrong(race_once(tmp_path, KEY, never).linears[0]) == wrong(lap) != ""


@pytest.mark.parametrize("changed", ["card", "driver", "torch"])
def test_another_card_driver_or_version_races_anew(tmp_path, changed):
    """And what it finds takes the other's place, unless that is another card's."""
    race_once(tmp_path, KEY, lambda: RTX_3060)
    other = KEY | {changed: "another"}

    assert recall(tmp_path, other) is None
    assert race_once(tmp_path, other, lambda: H100) is H100
    assert race_once(tmp_path, other, never) == H100
    assert (recall(tmp_path, KEY) is None) == (changed != "card")


def test_of_those_that_start_together_one_races(tmp_path):
    """The others wait for what it finds; each race is held in a thread that has come to it."""
    barrier, held = threading.Barrier(3), []

    def run():
        held.append(1)
        time.sleep(0.2)
        return H100

    def start(_):
        barrier.wait()
        return race_once(tmp_path, KEY, run)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(start, range(3))) == [H100] * 3
    assert len(held) == 1
    assert race_once(tmp_path, KEY, never) == H100


def test_a_name_is_a_file_in_its_folder(tmp_path):
    """Whatever a driver calls a card."""
    race_once(tmp_path, KEY | {"card": "../a card (80 GB) / 132"}, lambda: H100)

    names = {each.name for each in (tmp_path / "race").iterdir()}
    assert names == {"-a-card-80-GB-132.json", "-a-card-80-GB-132.lock"}


def test_an_outdated_race_is_held_by_one_only(tmp_path):
    """Of those that find it so together."""
    race_once(tmp_path, KEY, lambda: RTX_3060)
    held = []

    def run():
        held.append(1)
        time.sleep(0.1)
        return H100

    def start(_):
        return race_once(tmp_path, KEY, run, is_outdated=lambda results: results == RTX_3060)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(start, range(3))) == [H100] * 3
    assert len(held) == 1


def test_it_is_repeated_when_asked(tmp_path):
    """And the new result is kept."""
    race_once(tmp_path, KEY, lambda: RTX_3060)

    assert race_once(tmp_path, KEY, lambda: H100, again=True) is H100
    assert recall(tmp_path, KEY) == H100


def test_a_disturbed_race_is_not_kept(tmp_path):
    """The next start tries anew."""
    race_once(tmp_path, KEY, lambda: replace(H100, disturbed="others used 87% of it"))

    assert recall(tmp_path, KEY) is None


@pytest.mark.parametrize("text", [b"", b"{}", b'{"key": {}, "results": 3}', b"\xff"])
def test_a_damaged_file_is_none(tmp_path, text):
    """It is written anew."""
    race_once(tmp_path, KEY, lambda: H100)
    (kept,) = (tmp_path / "race").glob("*.json")
    kept.write_bytes(text)

    assert race_once(tmp_path, KEY, lambda: RTX_3060) is RTX_3060
    assert recall(tmp_path, KEY) == RTX_3060


def test_what_others_may_have_written_is_none(tmp_path):
    """They could have a wrong kernel taken."""
    race_once(tmp_path, KEY, lambda: H100)
    (kept,) = (tmp_path / "race").glob("*.json")
    kept.chmod(0o666)

    assert recall(tmp_path, KEY) is None


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path):
    """The race decides this start all the same."""
    (tmp_path / "race").write_text("in the way")

    assert race_once(tmp_path, KEY, lambda: H100) is H100
