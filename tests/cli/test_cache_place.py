"""The cache lies in one place, wherever a command is started, and one in a wrong place is named."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.main import COMMANDS, main
from app.cli.old_cache import find_old_cache
from app.errors import StartupError
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another current one with a space in its name."""
    (tmp_path / "home").mkdir()
    (tmp_path / "some where").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "some where")
    return tmp_path / "home"


def test_the_default_lies_below_the_home_folder(home) -> None:
    """Not in a folder called `~` below the current one."""
    assert Settings.read({}).cache_dir == home / ".cache" / "klein"
    assert Settings().cache_dir == home / ".cache" / "klein"


@pytest.mark.parametrize("name", ["cache_dir", "api_keys_file"])
def test_paths_are_expanded_and_absolute(home, name) -> None:
    """A later change of the current folder, or a worker in another one, changes nothing."""
    Path("near").write_text("long enough a key")
    (home / "far").write_text("long enough a key")

    near, far = (Settings.read({f"KLEIN_{name.upper()}": each}) for each in ("near", "~/far"))
    assert getattr(near, name) == Path.cwd() / "near"
    assert getattr(far, name) == home / "far"


def test_without_a_home_folder_one_sentence_says_what_to_do(monkeypatch) -> None:
    """A user whom the system does not know, without HOME, as in containers."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54_321)

    with pytest.raises(StartupError, match=r"^KLEIN_CACHE_DIR .*home folder.*set HOME") as refused:
        Settings.read({})
    assert "Value error" not in refused.value.message
    assert Settings.read({"KLEIN_CACHE_DIR": "/somewhere"}).cache_dir == Path("/somewhere")


def test_a_model_below_an_unknown_home_is_one_sentence(monkeypatch) -> None:
    """The same for the model's path, which is no path in the settings."""
    from app.model_choice import choose_model

    with pytest.raises(StartupError, match=r"KLEIN_MODEL .* set HOME"):
        choose_model(Settings(model="~no-such-user/model", device="cpu"), None)


def test_a_cache_in_the_wrong_place_is_found_and_the_command_moves_it(home) -> None:
    """Run by a shell, the command brings every byte and every link to where it is looked for."""
    old = Path("~/.cache/klein")
    (old / "hub").mkdir(parents=True)
    (old / "hub" / "file").write_text("16 GB")
    (old / "link").symlink_to("hub/file")
    settings = Settings.read({})

    found = find_old_cache(settings)
    assert found is not None
    assert shlex.quote(str(Path.cwd() / "~" / ".cache" / "klein")) in found.what
    assert found.sentence.startswith(found.what)
    subprocess.run(found.command, shell=True, check=True, cwd="/")

    assert (settings.cache_dir / "link").read_text() == "16 GB"
    assert (settings.cache_dir / "link").is_symlink()
    assert not old.exists()
    assert find_old_cache(settings) is None


def test_a_cache_in_the_wrong_place_joins_one_that_is_in_the_right_place(home) -> None:
    """What lies in the right place stays; what it lacks comes from the old one."""
    old, settings = Path("~/.cache/klein"), Settings.read({})
    for folder, name in ((old, "old"), (old, "both"), (settings.cache_dir, "both")):
        (folder / "hub").mkdir(parents=True, exist_ok=True)
        (folder / "hub" / name).write_text(name)
        (folder / f"link {name}").unlink(missing_ok=True)
        (folder / f"link {name}").symlink_to(f"hub/{name}")

    found = find_old_cache(settings)
    assert found is not None
    subprocess.run(found.command, shell=True, check=True, cwd="/")

    assert {path.name for path in (settings.cache_dir / "hub").iterdir()} == {"old", "both"}
    assert (settings.cache_dir / "link old").read_text() == "old"
    assert not old.exists()


@pytest.mark.slow
def test_the_commands_name_it(home) -> None:
    """`klein download` does; it is on standard error, so that scripts read on."""
    (Path("~/.cache/klein") / "hub").mkdir(parents=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")}
    done = subprocess.run(
        [sys.executable, "-m", "app", "download", "--model", "shapes"],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    (line,) = done.stderr.splitlines()
    assert line.startswith("klein: ")
    assert "mv -T" in line


@pytest.mark.parametrize("command", ["bench", "compare"])
def test_every_command_that_loads_a_model_names_it(home, monkeypatch, capsys, command) -> None:
    """Once, and before a model is looked for where it is not."""
    (Path("~/.cache/klein") / "hub").mkdir(parents=True)
    said = []

    def run(*_) -> int:
        said.append(capsys.readouterr().err)
        return 0

    monkeypatch.setattr(f"{COMMANDS[command].module}.run", run)
    assert main([command, *([] if command == "bench" else ["a red circle"])]) == 0
    (before,) = said
    assert before.count("mv -T") == 1
    assert capsys.readouterr().err == ""


def test_a_model_of_the_commands_own_names_it(home, monkeypatch, capsys) -> None:
    """`klein generate --local`; one that asks a service needs no cache, and says nothing."""
    (Path("~/.cache/klein") / "hub").mkdir(parents=True)
    said = []

    async def draw(*_) -> None:
        said.append(capsys.readouterr().err)

    monkeypatch.setattr("app.cli.local._draw", draw)
    assert main(["generate", "a red circle", "--local"]) == 0
    (before,) = said
    assert before.count("mv -T") == 1
