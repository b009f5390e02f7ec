"""The commands of the README, CONTRIBUTING.md and docs/ do what is said there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.server import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.torch]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, kind, text)
    for page in PAGES
    for kind, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.S | re.M)
]
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for _, kind, text in BLOCKS
        if kind in {"sh", "bash", "console"}
        for line in text.splitlines()
        if line.split("#")[0].strip()
    }
)
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
    pytest.param("klein doctor --card rtx-3060", marks=pytest.mark.full),
    pytest.param("klein selftest", marks=pytest.mark.full),
    pytest.param("klein cache list", marks=pytest.mark.full),
    pytest.param("klein lora list", marks=pytest.mark.full),
    pytest.param("klein cache prune --to-gb 20 --dry-run", marks=pytest.mark.full),
    pytest.param('klein compare "a red circle" --precision bf16,fp32', marks=pytest.mark.full),
)
COLLECTED = (
    ".venv/bin/pytest tests/jobs",
    ".venv/bin/pytest -m slow tests/e2e/test_service.py",
)
NOT_RUN_HERE = {
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
        if (page, kind) == ("cli.md", "sh")
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
    "nvidia-smi -L": "needs NVIDIA's driver",
    **{
        line: "needs Ray, and some of it two machines; tests/cluster runs the same commands"
        for page, kind, text in BLOCKS
        if (page, kind) == ("scale.md", "sh")
        for line in text.splitlines()
    },
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
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")} | {
    "KLEIN_DEVICE": "cpu",
    "KLEIN_MODEL": "shapes",
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # noqa: PTH120
}


def run(command, cwd, timeout_s=120):
    """Run one line of a page."""
    return subprocess.run(
        shlex.split(command), cwd=cwd, env=ENVIRON, capture_output=True, timeout=timeout_s
    )


def test_every_command_is_run_or_says_why_not():
    """One that nobody runs cannot stand on a page, and what stands on no page is not kept here."""
    alone = [getattr(each, "values", (each,))[0] for each in ALONE]
    known = {FIRST_REQUEST, LORA_REQUEST, *alone, *COLLECTED, *NOT_RUN_HERE}

    assert {line for line in COMMANDS if not line.startswith("make ")} == known


def test_every_block_says_what_it_holds():
    """A block without a language may be a drawing, but never commands."""
    drawings = [text for _, kind, text in BLOCKS if not kind]

    assert {kind for _, kind, _ in BLOCKS} <= {"", "sh", "python", "yaml"}
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
    listed = run("make help", ROOT).stdout.decode().splitlines()

    assert told == {line.split()[0] for line in listed} - {"help"}


@pytest.mark.full
@pytest.mark.parametrize("command", COLLECTED)
def test_the_pytest_commands_find_tests(command):
    """Each names what is there; the tests themselves run anyway."""
    command = command.replace(".venv/bin/pytest", f"{sys.executable} -m pytest --collect-only")
    done = run(command, ROOT)

    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("request_line", [FIRST_REQUEST, LORA_REQUEST])
def test_the_requests_give_a_png(shapes, tmp_path, request_line):
    """The curl lines, as they stand but for the port."""
    place = shapes.url.removeprefix("http://")
    done = run(request_line.replace("localhost:8000", place), tmp_path)

    assert done.returncode == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_python_example_runs(shapes, tmp_path):
    """The openai client's example, as it stands but for the port."""
    (code,) = [text for _, kind, text in BLOCKS if kind == "python"]
    script = tmp_path / "example.py"
    script.write_text(code.replace("http://127.0.0.1:8000", shapes.url))
    done = run(f"{sys.executable} {script}", tmp_path)

    assert done.stdout.startswith(b"256x256 [")


@pytest.mark.parametrize("command", ALONE)
def test_commands_without_a_card(command, tmp_path):
    """Each runs here as it stands there."""
    done = run(command, tmp_path, timeout_s=300)

    assert done.returncode == 0, done.stderr.decode()
