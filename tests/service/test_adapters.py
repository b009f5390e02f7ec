"""What is listed follows the folder while the service runs, and nobody waits for the folder."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from app.engine.adapters import directory
from app.engine.adapters.directory import Adapter, Directory, Listing, RefusedFile
from app.service import adapters as module
from app.service.adapters import Adapters, AdapterWatch, UnknownAdapter
from tests.support.adapter_files import LONG_AGO, SHAPES, content, write
from tests.support.fakes import INFO

READY = replace(INFO, linear_shapes=SHAPES)


def adapter(name: str, rank: int = 16) -> Adapter:
    """An adapter whose file nobody reads."""
    return Adapter(name, "ab" * 32, 1000, rank, LONG_AGO, False, f"/loras/{name}.safetensors")


def listed(*found: Adapter, **more: object) -> Adapters:
    """Those adapters."""
    adapters = Adapters(**more)  # type: ignore[arg-type]
    adapters.replace(Listing(found))
    return adapters


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a thread of the code under test does it
            await asyncio.sleep(0.005)


@pytest.fixture
async def watched(tmp_path):
    """Begin to watch tmp_path; returns what is listed, and the watch."""
    watches = []

    def watch(folder: Directory | None = None, **more) -> tuple[Adapters, AdapterWatch]:
        adapters = Adapters(**more)
        first = [name for name, _ in more.get("wanted", ())]
        watch = AdapterWatch(folder or Directory([tmp_path]), adapters, first, every_s=0.01)
        watch.start()
        watches.append(watch)
        return adapters, watch

    yield watch
    for each in watches:
        each.close()


def names(adapters: Adapters) -> list[str]:
    """What is listed."""
    return [each.name for each in adapters.listed()]


async def test_nothing_is_listed_before_the_model_is_loaded(tmp_path, watched) -> None:
    """Whether a file fits, only the loaded model says."""
    write(tmp_path / "a.safetensors")
    adapters, watch = watched()
    await asyncio.sleep(0.05)
    assert names(adapters) == []

    watch.on_ready(READY)
    await until(lambda: names(adapters) == ["a"])


async def test_a_model_that_takes_none_lists_none(tmp_path, watched) -> None:
    """It has told no shapes."""
    write(tmp_path / "a.safetensors")
    adapters, watch = watched()
    watch.on_ready(INFO)
    await asyncio.sleep(0.05)

    assert names(adapters) == []
    assert adapters.refused == ()


async def test_the_list_follows_the_folder(tmp_path, watched) -> None:
    """Without a restart: new, replaced and deleted files; what a job has named stays."""
    adapters, watch = watched()
    watch.on_ready(READY)
    path = write(tmp_path / "a.safetensors")
    await until(lambda: names(adapters) == ["a"])
    named = adapters.use("a", 0.5)

    write(path, content(fill=1), at=LONG_AGO + 1)
    await until(lambda: adapters.use("a", 0.5).sha256 != named.sha256)
    assert (named.name, named.scale, named.rank, named.path) == ("a", 0.5, 4, str(path))

    path.unlink()
    await until(lambda: not names(adapters))


async def test_a_folder_that_does_not_answer_holds_up_nobody(watched) -> None:
    """Not the event loop, and not the end."""
    begun, answers, steps = asyncio.Event(), Event(), []
    loop = asyncio.get_running_loop()

    class Stuck(Directory):
        def look(self, *_):
            loop.call_soon_threadsafe(begun.set)
            answers.wait(5)
            steps.append("answered")
            yield Listing()

    _, watch = watched(Stuck([Path("/none")]))
    watch.on_ready(READY)
    await begun.wait()
    watch.close()
    steps.append("closed")
    answers.set()
    await until(lambda: len(steps) == 2)

    assert steps == ["closed", "answered"]


async def test_a_look_that_fails_is_not_the_last(tmp_path, watched, caplog) -> None:
    """Whatever the folder holds."""
    write(tmp_path / "a.safetensors")

    class Flaky(Directory):
        is_first = True

        def walk(self):
            if self.is_first:
                self.is_first = False
                raise RuntimeError("a loop of links")
            return super().walk()

    adapters, watch = watched(Flaky([tmp_path]))
    watch.on_ready(READY)

    await until(lambda: names(adapters) == ["a"])
    assert "The folder of adapters could not be read." in caplog.text


async def test_an_adapter_that_is_always_on_is_hashed_while_the_model_loads(
    tmp_path, watched, monkeypatch
) -> None:
    """So that hardly a picture is made without it."""
    write(tmp_path / "a.safetensors")
    hashed: list[str] = []
    true = directory.hash_file

    def hash_file(path, on_bytes):
        hashed.append(path.name)
        return true(path, on_bytes)

    monkeypatch.setattr(directory, "hash_file", hash_file)
    adapters, watch = watched(wanted=[("a", 0.8)])
    await until(lambda: hashed)
    watch.on_ready(READY)
    await until(lambda: adapters.default)

    assert hashed == ["a.safetensors"]
    assert [(lora.name, lora.scale) for lora in adapters.default] == [("a", 0.8)]
    assert adapters.default_scale("a") == 0.8
    assert adapters.default_scale("b") is None


def test_an_adapter_that_is_missing_is_a_sentence(caplog) -> None:
    """Not the end of the service, and only once the folder was read whole."""
    adapters = Adapters([("a", 1.0), ("b", 0.5)])
    adapters.replace(Listing((adapter("a"),), is_whole=False))
    assert adapters.problems == ()
    for is_whole in (True, False, True):
        adapters.replace(Listing((adapter("a"),), is_whole=is_whole))

    assert [lora.name for lora in adapters.default] == ["a"]
    assert adapters.problems == (
        "KLEIN_LORAS names b, but no such adapter is listed; images are made without it.",
    )
    assert caplog.text.count("KLEIN_LORAS names b") == 1
    adapters.replace(Listing((adapter("a"), adapter("b"))))
    assert adapters.problems == ()


def test_adapters_above_the_rank_are_not_used() -> None:
    """Else each picture would be refused; the sentence has both numbers."""
    adapters = listed(
        adapter("a", 96), adapter("b", 64), wanted=[("a", 1.0), ("b", 1.0)], max_rank=128
    )

    assert adapters.default == ()
    assert "rank 160 together, above the 128 of KLEIN_LORA_RANK" in adapters.problems[0]


def test_an_unknown_name_has_near_ones() -> None:
    """At most three, the most like it first."""
    adapters = listed(*map(adapter, ("ink", "inky", "ink-wash", "inks", "oil")))

    assert adapters.near("ink")[0] == "ink"
    assert set(adapters.near("ink")) == {"ink", "inks", "inky"}
    assert adapters.near("x" * 100_000) == ()
    assert adapters.find("ink ") is None
    with pytest.raises(UnknownAdapter):
        adapters.use("../ink", 1.0)


def test_near_names_are_found_without_holding_up_the_loop(monkeypatch) -> None:
    """A third of a second, if each of a thousand long names were compared in full."""
    compared = []
    true = module.get_close_matches

    def get_close_matches(word: str, names: list[str], n: int) -> list[str]:
        compared.append((len(word), len(names)))
        return true(word, names, n)

    monkeypatch.setattr(module, "get_close_matches", get_close_matches)
    drawn = random.Random(1)
    word = [drawn.choice("abcdefgh-") for _ in range(100)]
    made = ("".join(drawn.sample(word, 30) + word[30:]) for _ in range(1000))
    adapters = listed(*map(adapter, made))

    assert len(adapters.near("".join(word) * 10)) == 3
    assert compared == [(100, 16)]


def test_refused_files_are_told_once(caplog) -> None:
    """A folder full of another model's adapters fills no log."""
    caplog.set_level(logging.WARNING)
    refused = tuple(RefusedFile(f"{n}", f"{n} is for another model.") for n in range(30))
    adapters = Adapters()
    for _ in range(3):
        adapters.replace(Listing((), refused))

    assert adapters.refused == refused
    assert len(caplog.records) == 11
    assert "20 more are not" in caplog.records[-1].getMessage()


def test_a_folder_of_refused_files_does_not_hold_up_the_loop() -> None:
    """Twenty thousand may be refused, and each is compared a few times, not with all others."""
    hashed = 0

    class Word(str):
        __slots__ = ()

        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return super().__hash__()

    refused = tuple(RefusedFile(Word(n), "It may run code.") for n in range(300))
    adapters = Adapters()
    for _ in range(2):
        adapters.replace(Listing((), refused))

    assert hashed <= 4 * len(refused)
