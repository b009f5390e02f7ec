"""The commands of the README, CONTRIBUTING.md and docs/ do what is said there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from app.cli import main
from tests.support.server import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.torch]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, kind, text)
    for page in PAGES
    for kind, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.S | re.M)
]


def commands(blocks):
    """The commands of pages' blocks, without comments."""
    return sorted(
        {
            line.split("#")[0].strip()
            for _, kind, text in blocks
            if kind in {"sh", "bash", "console"}
            for line in text.splitlines()
            if line.split("#")[0].strip()
        }
    )


COMMANDS = commands(BLOCKS)
FIRST_REQUEST = (
    "curl -X POST localhost:8000/generate -H 'content-type: application/json' "
    """-d '{"prompt":"a red circle"}' -o a.png"""
)
LORA_REQUEST = FIRST_REQUEST.replace(
    '"a red circle"', '"a red circle","loras":[{"name":"red-to-blue","scale":0.5}]'
)
ALONE = (
    "klein --version",
    "openssl rand -hex -out klein-keys 24",
    pytest.param("klein doctor", marks=pytest.mark.full),
    pytest.param('klein generate "a red circle" -o out.png', marks=pytest.mark.full),
    pytest.param("klein selftest", marks=pytest.mark.full),
    pytest.param("klein cache list", marks=pytest.mark.full),
    pytest.param("klein lora list", marks=pytest.mark.full),
    pytest.param("klein cache prune --to-gb 20 --dry-run", marks=pytest.mark.full),
    pytest.param('klein compare "a red circle" --precision bf16,fp32', marks=pytest.mark.full),
)
ASKED = (
    "curl http://127.0.0.1:8000/health/ready",
    "curl http://127.0.0.1:8000/metrics",
    "curl http://127.0.0.1:8000/v1/models",
    pytest.param(
        '.venv/bin/klein generate "a small green star in the top left" -o star.png',
        marks=pytest.mark.full,
    ),
)
"""Commands that ask the service."""
COLLECTED = (
    ".venv/bin/pytest tests/jobs",
    ".venv/bin/pytest -m slow tests/e2e/test_service.py",
)
_FETCHES = "fetches packages; each environment of the tests is made so"
_COMPOSE = "needs Docker; tests/container/test_compose.py reads the file"
_INSTALLED = "needs what the step before installs; `klein doctor` is run"
_FOLDER = "tests/docs/test_getting_started.py has such a folder, and its answers"
NOT_RUN_HERE = {
    "sudo apt-get install make gcc python3-venv python3-dev": "changes the machine",
    ".venv/bin/klein doctor": _INSTALLED,
    ".venv/bin/klein doctor --model ~/ComfyUI/models": _FOLDER,
    "KLEIN_MODEL=~/ComfyUI/models make serve": _FOLDER,
    ".venv/bin/klein serve --env-file klein.env": (
        "it would go on; tests/docs/test_getting_started.py reads the file"
    ),
    "python3 -m venv openai-client": _FETCHES,
    "openai-client/bin/pip install openai": _FETCHES,
    "openai-client/bin/python example.py": "the example is run by the tests' own Python",
    **dict.fromkeys(
        (
            "curl https://pictures.example/health/ready",
            "curl https://pictures.example/v1/models -H 'authorization: Bearer KEY'",
        ),
        "a name of nobody's; tests/e2e/test_proxies.py asks through nginx and Caddy",
    ),
    "git pull": "changes the checkout",
    "docker compose build": "`make image-check` builds the image",
    "docker compose stop klein": "tests/reliability/test_lifecycle.py sends what it sends",
    "docker compose logs --since 10m klein": _COMPOSE,
    "klein serve --host 127.0.0.1 --port 8000 --model auto": "each Server of the tests is that",
    "klein download --model flux.2-klein-4b": "8 GB; tests/engine/hub has a hub of its own",
    "klein bench --out report.md": "minutes; tests/cli/test_bench.py measures less",
    "klein cache prune --to-gb 20": "it deletes; tests/cli/test_cache.py has a cache of its own",
    **{
        line: "tests/cli/test_lora.py has files and a hub of its own"
        for page, kind, text in BLOCKS
        if (page, kind) == ("lora.md", "sh")
        for line in text.splitlines()
        if line.startswith("klein lora ") and line != "klein lora list"
    },
    **{
        line: "tests/cli/test_client.py asks a service, tests/cli/test_tmux.py in a terminal"
        for page, kind, text in BLOCKS
        if (page, kind) == ("cli.md", "sh") and "klein queue" in text
        for line in text.splitlines()
    },
    **{
        line: "needs an engine, a card or root; tests/container holds the files that it names"
        for page, kind, text in BLOCKS
        if (page, kind) == ("container.md", "sh")
        for line in text.splitlines()
    },
    "klein doctor --race": "needs a card; tests/gpu/test_race.py holds the race",
    "klein serve --host 0.0.0.0": "it would listen to the network; Server binds a loopback address",
    "KLEIN_SITE=pictures.example caddy run --config docker/caddy/Caddyfile": (
        "tests/e2e/test_proxies.py runs the file"
    ),
    "docker compose up": "needs a card; tests/container/test_compose.py reads the file",
    "docker compose -f compose.yaml -f docker/compose.cpu.yaml up": "`make image-check` does",
    "docker compose -f compose.yaml -f docker/compose.all-cards.yaml up": (
        "needs cards; tests/container/test_compose.py reads the files"
    ),
    "docker compose -f compose.yaml -f docker/compose.home.yaml up": (
        "needs a card; tests/container/test_compose.py reads the file"
    ),
    **{
        line: "tests/cli/test_client_answers.py and tests/reliability/test_sleep.py ask for it"
        for page, kind, text in BLOCKS
        if (page, kind) == ("home.md", "sh")
        for line in text.splitlines()
        if line.startswith(("klein ", "curl "))
    },
    **{
        line: "needs Ray, and some of it two machines; tests/cluster runs the same commands"
        for page, kind, text in BLOCKS
        if (page, kind) == ("scale.md", "sh")
        for line in text.splitlines()
    },
    **dict.fromkeys(("nvidia-smi", "nvidia-smi -L"), "needs NVIDIA's driver"),
    "docker compose -f docker/scale/compose.yaml up": (
        "needs cards; tests/container/test_scale_files.py reads it, test_scale.py runs the proxy"
    ),
    "docker compose -f docker/scale/compose.yaml -f docker/scale/compose.nginx.yaml up": (
        "needs cards; tests/container/test_scale_files.py reads it, test_scale.py runs the proxy"
    ),
    **{
        line: "needs a cluster; tests/container/test_scale_files.py validates the files"
        for _, kind, text in BLOCKS
        if kind == "sh"
        for line in text.splitlines()
        if line.startswith("kubectl ")
    },
    "python -m benchmarks.queueing --seconds 0.188 --wait 0.6": (
        "seconds; tests/benchmarks/test_queueing.py compares what it prints with the page"
    ),
    "docker compose -f compose.yaml -f docker/compose.traces.yaml up": (
        "needs a card; tests/container/test_compose.py reads the file"
    ),
    "docker run --rm -p 127.0.0.1:16686:16686 -p 127.0.0.1:4318:4318 jaegertracing/jaeger:2.13.0": (
        "fetches an image; tests/support/otlp.py is a collector"
    ),
    "pip install -c requirements-test.lock '.[otel]'": "fetches packages; the tests' lock has them",
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 klein serve": (
        "tests/telemetry/test_tracing.py serves with one"
    ),
    "docker compose --profile monitoring up": "tests/monitoring checks what it mounts",
    "docker compose --profile monitoring up -d": "tests/monitoring checks what it mounts",
    **{
        line: "tests/api/test_programs.py runs it"
        for page, kind, text in BLOCKS
        if (page, kind) == ("clients.md", "sh")
        for line in text.splitlines()
    },
}
"""Commands with the reason why no test of this file runs them."""
INLINE = {
    "docker buildx imagetools inspect": "needs a registry",
    "pip install comfy-kitchen==0.2.40": "tests/cli/test_cards_page.py holds the version",
    "sudo apt-get install gcc python3-dev": "tests/cli/test_cards_page.py holds the command",
    "pip install .": "tests/container/test_wheel.py installs the package",
    "python -m app": "what Server runs",
    "pytest -m gpu tests/gpu": "needs a card",
    'pytest -m "" tests/shapes/test_precisions.py': "tests/shapes are run",
    "curl --http2": "of a changelog",
    **dict.fromkeys(
        (
            "python tools/cards_page.py",
            "python tools/settings_page.py",
            "python tools/cli_page.py",
        ),
        "tests/cli compares what it writes",
    ),
    "docker compose run --rm klein bench --out /models/report.md": _COMPOSE,
    "docker compose cp klein:/models/report.md .": _COMPOSE,
    "docker compose ps": _COMPOSE,
    "docker compose up -d": _COMPOSE,
    "systemctl status": "needs systemd",
    "nvidia-smi -q -d PERFORMANCE,TEMPERATURE": "needs NVIDIA's driver",
    "ulimit -n": "the shell's own",
    "kill -9": "the soak does it",
    "make it green": "a prompt",
    "make the circle green": "a prompt",
    "make the background yellow": "a prompt",
}
"""Commands inside of sentences, beside those of blocks, `klein`'s and make's targets."""
PROGRAMS = {
    *("klein", "make", "python", "python3", "pip", "pipx", "uv", "curl", "git", "docker", "podman"),
    *("sudo", "apt-get", "systemctl", "journalctl", "nvidia-smi", "openssl", "caddy", "nginx"),
    *("pytest", "kill", "ulimit", "chmod", "mv", "cp", "rm", "export", "promtool"),
}
"""What a command begins with."""
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")} | {
    "KLEIN_DEVICE": "cpu",
    "KLEIN_MODEL": "shapes",
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # noqa: PTH120
}


def inline(text):
    """The commands in the sentences of a page: code that begins with a program and has words."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    spans = (" ".join(each.split()) for each in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    return {
        each
        for each in spans
        if each.partition(" ")[2] and each.split()[0].rpartition("/")[2] in PROGRAMS
    }


def is_known_inline(command, targets, parsers):
    """Whether it stands on a list, or names what klein or make know."""
    _, word, *_ = words = command.split()
    if command in INLINE or command in COMMANDS:
        return True
    if words[0] == "klein" and word in parsers:
        options = {each.split("=")[0] for each in words if each.startswith("--")}
        return options <= set(parsers[word]._option_string_actions)
    return words[0] == "make" and word in targets


def run(command, cwd, timeout_s=120, **environ):
    """Run one line of a page."""
    return subprocess.run(
        shlex.split(command), cwd=cwd, env=ENVIRON | environ, capture_output=True, timeout=timeout_s
    )


def test_every_command_is_run_or_says_why_not():
    """One that nobody runs cannot stand on a page, and what stands on no page is not kept here."""
    run_here = [getattr(each, "values", (each,))[0] for each in (*ALONE, *ASKED)]
    known = {FIRST_REQUEST, LORA_REQUEST, *run_here, *COLLECTED, *NOT_RUN_HERE}
    known |= {command for command, _ in PRINTED}

    assert {line for line in COMMANDS if not line.startswith("make ")} == known


def test_a_command_of_a_new_guide_is_seen(monkeypatch):
    """Every file of docs/ is read, so a guide with a command that stands nowhere fails."""
    assert {page.name for page in PAGES} >= {each.name for each in (ROOT / "docs").glob("*.md")}

    new = [*BLOCKS, ("new.md", "sh", "klein doctor # known\nklein conjure\n")]
    monkeypatch.setitem(globals(), "COMMANDS", commands(new))
    with pytest.raises(AssertionError, match="klein conjure"):
        test_every_command_is_run_or_says_why_not()


@pytest.fixture(scope="module")
def known():
    """make's targets, and klein's commands with their options."""
    listed = run("make --no-print-directory help", ROOT).stdout.decode().splitlines()
    _, parsers = main.make_parser()
    main.add_all_options(parsers)
    return {line.split()[0] for line in listed}, parsers


def test_every_command_in_a_sentence_is_known(known):
    """A command, with options that it has, a target, or one of the list; and all are in use."""
    found = set().union(*(inline(page.read_text()) for page in PAGES))

    assert [each for each in sorted(found) if not is_known_inline(each, *known)] == []
    assert set(INLINE) - found <= {"curl --http2"}


@pytest.mark.parametrize(
    "command", ["klein conjure --all", "klein doctor --crad", "make tea", "docker compose explode"]
)
def test_what_is_not_known_in_a_sentence_is_seen(known, command):
    """In code, among words."""
    (found,) = inline(f"Then `{command}` does it, and `KLEIN_PLAN` too.")

    assert not is_known_inline(found, *known)


def test_every_block_says_what_it_holds():
    """A block without a language may be a drawing, but never commands."""
    drawings = [text for _, kind, text in BLOCKS if not kind]

    assert {kind for _, kind, _ in BLOCKS} <= {"", "sh", "text", "python", "yaml"}
    assert not [text for text in drawings if re.search(r"^(\$ |make |klein |docker )", text, re.M)]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_the_make_commands_are_targets(command):
    """`make` knows them."""
    assert run(f"{command} --dry-run", ROOT).returncode == 0


def test_contributing_tells_every_target():
    """Those that `make` lists, and no other."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    told = {
        target
        for line in page.splitlines()
        if line.startswith("| `make ")
        for target in re.findall(r"`make ([\w-]+)`", line.split("|")[1])
    }
    listed = run("make --no-print-directory help", ROOT).stdout.decode().splitlines()

    assert told == {line.split()[0] for line in listed} - {"help"}


@pytest.mark.full
@pytest.mark.parametrize("command", COLLECTED)
def test_the_pytest_commands_find_tests(command):
    """Each names what is there; the tests themselves run anyway."""
    command = command.replace(".venv/bin/pytest", f"{sys.executable} -m pytest --collect-only")
    done = run(command, ROOT)

    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize(
    "request_line", [FIRST_REQUEST, pytest.param(LORA_REQUEST, marks=pytest.mark.full)]
)
def test_the_requests_give_a_png(shapes, tmp_path, request_line):
    """The curl lines, as they stand but for the port."""
    place = shapes.url.removeprefix("http://")
    done = run(request_line.replace("localhost:8000", place), tmp_path)

    assert done.returncode == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ASKED)
def test_commands_that_ask_are_answered(shapes, tmp_path, command):
    """As they stand but for the port, and for where klein is installed."""
    command = command.replace("http://127.0.0.1:8000", shapes.url).removeprefix(".venv/bin/")
    done = run(command.replace("curl ", "curl --fail "), tmp_path, KLEIN_URL=shapes.url)

    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout or [each.suffix for each in tmp_path.iterdir()] == [".png"]


@pytest.mark.full
@pytest.mark.parametrize("code", sorted({text for _, kind, text in BLOCKS if kind == "python"}))
def test_the_python_example_runs(shapes, tmp_path, code):
    """The openai client's example, as it stands but for the port."""
    script = tmp_path / "example.py"
    script.write_text(code.replace("http://127.0.0.1:8000", shapes.url))
    done = run(f"{sys.executable} {script}", tmp_path)

    assert done.stdout.startswith(b"256x256 [")


PRINTED = [
    found.groups()
    for page in PAGES
    for found in re.finditer(r"```sh\n([^\n]+)\n```\n\n```text\n(.*?)```", page.read_text(), re.S)
]


@pytest.mark.full
@pytest.mark.parametrize(("command", "said"), PRINTED)
def test_what_a_command_prints_is_what_the_page_shows(tmp_path, command, said):
    """Word for word: a block of text stands behind the command that printed it."""
    assert run(command, tmp_path).stdout.decode() == said


def test_every_block_of_text_stands_behind_its_command():
    """And is compared."""
    assert len(PRINTED) == sum(kind == "text" for _, kind, _ in BLOCKS)


@pytest.mark.parametrize("command", ALONE)
def test_commands_without_a_card(command, tmp_path):
    """Each runs here as it stands there."""
    done = run(command, tmp_path, timeout_s=300)

    assert done.returncode == 0, done.stderr.decode()
