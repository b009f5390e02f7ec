"""The Dockerfile says what the image must hold; the image itself is built by the system test."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its words, lines joined and comments gone."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name.upper(), words) for name, words in pairs]


def last_stage() -> dict[str, list[str]]:
    """The instructions of the stage that becomes the image, by name."""
    everything = instructions()
    start = max(i for i, (name, _) in enumerate(everything) if name == "FROM")
    stage: dict[str, list[str]] = {}
    for name, words in everything[start:]:
        stage.setdefault(name, []).append(words)
    return stage


def environment() -> dict[str, str]:
    """What the image sets."""
    words = shlex.split(" ".join(last_stage()["ENV"]))
    return dict(word.split("=", 1) for word in words)


def test_hadolint_finds_nothing() -> None:
    """What it is told to ignore stands in the file, with the reason beside it."""
    hadolint = Path(sys.executable).with_name("hadolint")

    done = subprocess.run(
        [str(hadolint), str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_runs_as_nobody_special() -> None:
    """By number, so that a cluster can see that it is not root, and with a passwd entry."""
    assert last_stage()["USER"] == ["10001:10001"]
    assert "useradd --uid 10001 --gid 10001" in " ".join(last_stage()["RUN"])


def test_signals_reach_the_service() -> None:
    """Exec form: no shell stands between the engine and Python."""
    stage = last_stage()

    assert [json.loads(words) for words in stage["ENTRYPOINT"]] == [["klein"]]
    assert [json.loads(words) for words in stage["CMD"]] == [["serve"]]
    assert stage["STOPSIGNAL"] == ["SIGTERM"]


def test_the_health_check_waits_for_a_slow_first_start() -> None:
    """Half an hour for download and compiling; the question itself is python's, to /health/live."""
    (words,) = last_stage()["HEALTHCHECK"]
    options, command = words.split("CMD", 1)
    script = json.loads(command)[-1]

    assert "--start-period=30m" in options.split()
    assert json.loads(command)[0] == "python3"
    assert f"COPY docker/healthcheck.py {script}" in TEXT
    assert "/health/live" in (ROOT / "docker" / "healthcheck.py").read_text()


def test_everything_written_lies_in_the_volume() -> None:
    """So the root can be read-only, and what was compiled and fetched is there the next time."""
    assert [json.loads(words) for words in last_stage()["VOLUME"]] == [["/models"]]
    for name in ("HOME", "HF_HOME", "KLEIN_CACHE_DIR"):
        assert f"{environment()[name]}/".startswith("/models/"), name
    # The service itself sets where compiled code lies, after it has asked who may write there.
    assert "TRITON_CACHE_DIR" not in environment()


def test_the_image_can_compile() -> None:
    """Triton wants a compiler, libc's headers and Python's when it runs."""
    commands = " ".join(last_stage()["RUN"])

    assert {"gcc", "libc6-dev"} <= set(commands.split())
    assert "/Python.h" in commands


def test_logs_are_not_held_back() -> None:
    """A line is seen when it is written."""
    assert environment()["PYTHONUNBUFFERED"] == "1"


def test_the_base_is_pinned_and_can_be_another() -> None:
    """One argument for both stages, with a version in its default."""
    assert instructions()[0] == ("ARG", "BASE=python:3.12-slim-bookworm")
    bases = [words.split()[0] for name, words in instructions() if name == "FROM"]
    assert set(bases) == {"${BASE}"}
    assert len(bases) == 2


def test_what_is_installed_is_the_locks() -> None:
    """From the lock, which has the int8 kernels, and with pip's cache outside the image."""
    installs = [words for name, words in instructions() if name == "RUN" and "pip install" in words]

    assert all("--mount=type=cache,target=/root/.cache/pip" in words for words in installs)
    assert all("requirements.lock" in words for words in installs)
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (kernels,) = (each for each in project["dependencies"] if each.startswith("comfy-kitchen=="))
    assert kernels in locked
    assert kernels.endswith("; sys_platform == 'linux' and platform_machine == 'x86_64'")
    # Commands of before name the extra.
    assert project["optional-dependencies"]["int8"] == []


def test_the_hashes_hold_unless_another_index_is_named() -> None:
    """Another build of torch has the same version and other bytes; a lock can be named too."""
    assert ("ARG", 'LOCK=""') in instructions()
    (command,) = re.findall(r'other="[^"]*" \\\n +&& pip install .*', TEXT)
    words = command.replace("\\\n", "").replace("pip install", "echo")
    for given, lock in (
        ({}, "requirements.hashes.lock"),
        ({"PIP_EXTRA_INDEX_URL": "https://index.example"}, "requirements.lock"),
        ({"LOCK": "requirements.lock"}, "requirements.lock"),
    ):
        said = subprocess.run(
            ["sh", "-c", words], env=given, capture_output=True, text=True, check=True
        ).stdout
        assert said.split()[-2:] == ["--requirement", lock]


def test_extras_are_installed_where_they_are_asked_for() -> None:
    """None by default; what they need has a version in the tests' lock."""
    assert ("ARG", 'EXTRAS=""') in instructions()
    assert '".${EXTRAS:+[${EXTRAS}]}"' in TEXT
    (otel,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["otel"]
    assert otel == "fastapi[opentelemetry]"
    assert "opentelemetry-sdk==" in (ROOT / "requirements-test.lock").read_text()


def test_no_token_and_no_weights_go_in() -> None:
    """Neither by name nor by a copy of the whole checkout."""
    copied = [words for name, words in instructions() if name in ("COPY", "ADD")]

    assert not re.search(r"HF_TOKEN|HUGGING_FACE|safetensors", TEXT)
    assert not any(words.split()[0] in (".", "./") for words in copied)


def test_every_builder_can_read_it() -> None:
    """No heredoc and no --start-interval, which buildah does not have."""
    assert "<<" not in TEXT
    assert "--start-interval" not in TEXT


def test_only_what_is_copied_goes_to_the_builder() -> None:
    """.dockerignore shuts everything out but what the Dockerfile names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    let_in = {line[1:] for line in rules if line.startswith("!")}
    from_here = [
        words for name, words in instructions() if name == "COPY" and "--from" not in words
    ]
    copied = {word for words in from_here for word in words.split()[:-1]}

    assert rules[0] == "*"
    assert let_in == copied | {"Dockerfile"}
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("ignored", ["**/__pycache__", "**/*.pyc"])
def test_no_compiled_leftovers_go_to_the_builder(ignored: str) -> None:
    """They would change the image without a change of the code."""
    assert ignored in (ROOT / ".dockerignore").read_text().splitlines()
