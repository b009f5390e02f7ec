"""What the settings of adapters mean: which names, what is fused, whether memory is planned."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from app import model_choice
from app.engine.models.registry import find_model
from app.errors import StartupError
from app.model_choice import DEMO, KLEIN, Choice, choose_loras, lora_directory
from app.settings import Settings
from tests.support.adapter_files import content, write

STYLE = content(shape=(3072, 128))
CHOICE = Choice(KLEIN, None, "")


def read(folder: Path, **values: str) -> Settings:
    """Settings with a cache in *folder*."""
    environ = {f"KLEIN_{name.upper()}": value for name, value in values.items()}
    return Settings.read({"KLEIN_CACHE_DIR": str(folder), **environ})


def test_adapters_are_names_with_scales(tmp_path) -> None:
    """A scale that is left out is 1; spaces do not count."""
    settings = read(tmp_path, loras="a:0.8, b : -2,c", lora_fuse="d:0.5")

    assert settings.loras == (("a", 0.8), ("b", -2.0), ("c", 1.0))
    assert settings.lora_fuse == (("d", 0.5),)
    assert read(tmp_path).loras == ()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("loras", "a:b", "no name with a scale, such as style:0.8"),
        ("loras", ":1", "no name with a scale"),
        ("loras", "a:nan", "no name with a scale"),
        ("loras", "a:2.5", "a scale is not between -2 and 2"),
        ("loras", "a,a:1", "names an adapter twice"),
        ("loras", "a,b,c,d,e", "names 5 adapters, the most is 4"),
        ("lora_fuse", "a:-3", "a scale is not between -2 and 2"),
        ("lora_rank", "100", "none of 32, 64, 128 and 256"),
        ("lora_rank", "x", "integer"),
    ],
)
def test_a_value_that_does_not_fit_ends_the_start(tmp_path, name, value, why) -> None:
    """In one sentence that names the setting."""
    with pytest.raises(StartupError, match=rf"KLEIN_{name.upper()} has a value.*{why}"):
        read(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("file", "values", "rank"),
    [
        (None, {}, 0),
        (content(shape=(640, 640)), {}, 0),
        (STYLE, {}, 128),
        (STYLE, {"lora_rank": "64"}, 64),
        (None, {"lora_rank": "128"}, 128),
        (None, {"loras": "a"}, 128),
        (None, {"lora_dir": "{}/comfy"}, 0),
    ],
)
def test_memory_is_planned_for_who_uses_adapters(tmp_path, file, values, rank) -> None:
    """For all others the plan stays as it was, a folder of another model's adapters too."""
    if file is not None:
        write(tmp_path / "loras" / "a.safetensors", file)
    values = {name: value.format(tmp_path) for name, value in values.items()}

    assert choose_loras(read(tmp_path, **values), CHOICE).planned_rank == rank


def test_a_folder_that_is_missing_is_told(tmp_path, caplog) -> None:
    """It may come; that of the cache need not."""
    choose_loras(read(tmp_path), CHOICE)
    assert not caplog.text
    choose_loras(read(tmp_path, lora_dir=str(tmp_path / "none")), CHOICE)

    assert "KLEIN_LORA_DIR names no folder" in caplog.text


def test_fused_adapters_are_found_at_the_start(tmp_path) -> None:
    """By name, with their hash; they need no memory of their own."""
    path = write(tmp_path / "comfy" / "sub" / "My ink.safetensors", STYLE)
    settings = read(tmp_path, lora_dir=str(tmp_path / "comfy"), lora_fuse="My-ink:0.5")

    (lora,) = choose_loras(settings, CHOICE).fused
    assert (lora.name, lora.scale, lora.path) == ("My-ink", 0.5, str(path))
    assert lora.sha256 == sha256(STYLE).hexdigest()


@pytest.mark.parametrize("name", ["inc", "../loras/ink", "x"])
def test_a_fused_adapter_that_is_missing_ends_the_start(tmp_path, name) -> None:
    """With names like it."""
    write(tmp_path / "loras" / "ink.safetensors", STYLE)

    with pytest.raises(StartupError, match="there is no such adapter") as refused:
        choose_loras(read(tmp_path, lora_fuse=name), CHOICE)
    assert ("names like it are ink" in refused.value.message) == (name == "inc")


def test_a_model_in_the_package_brings_its_own(tmp_path, monkeypatch) -> None:
    """Beside those of the folder, and not where the operator names a path."""
    entry = replace(find_model(DEMO), folder=tmp_path / "package")
    monkeypatch.setattr(model_choice, "find_model", lambda key: entry)
    write(tmp_path / "package" / "loras" / "outline.safetensors")
    write(tmp_path / "loras" / "mine.safetensors")

    for path, names in ((None, ["mine", "outline"]), ("/x", ["mine"])):
        files, _ = lora_directory(read(tmp_path), Choice(DEMO, path, "")).walk()
        assert [file.name for file in files] == names
