"""Write requirements.lock, requirements-test.lock and requirements.hashes.lock.

    python tools/lock.py [--hashes]

The first two are what pip installs for pyproject.toml, and for that and tests/requirements.in, into
an empty environment: every package with its version, no hashes, because the CPU and the CUDA build
of torch carry the same version and differ in bytes; no `+cpu` in torch's version, so that the same
line takes the CUDA build where one is offered.

The third has the first's versions, those of the CUDA libraries that torch's published build for
Linux on x86-64 wants, and the SHA-256 of every file that may be installed for them: what the image
is built from. It is made by uv, which reads only what the index says of each file, so that no
library of CUDA is downloaded for it. `--hashes` writes this one alone, from requirements.lock as it
stands.
"""

import argparse
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Made by `make lock`; do not edit.\n"
PLATFORM = ("--python-platform", "x86_64-manylinux_2_28", "--python-version", "3.12")
"""Of the image. A release's hashes are all of its files', for other Pythons too."""


def freeze(requirements: list[str], constraint: Path | None) -> list[str]:
    """Install *requirements* into an empty environment and say what lies there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["python3", "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        extra = ["-c", str(constraint)] if constraint else []
        # torch first and alone: its exact pin decides the build before a looser one is asked for.
        torch = [r for r in requirements if r.startswith("torch==")]
        subprocess.run([*pip, "install", "--quiet", *torch], check=True)
        subprocess.run([*pip, "install", "--quiet", *extra, *requirements], check=True)
        lines = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    found = (line.split("+cpu")[0] for line in lines.splitlines() if "==" in line)
    # A dependency of some machines only stays one.
    tails = {r.partition("==")[0]: r[r.index(";") :] for r in requirements if ";" in r}
    return sorted(line + tails.get(line.partition("==")[0], "") for line in found)


def hash_lock(lock: Path) -> str:
    """Return the lock with hashes for *lock*, of the files that the index offers by default.

    The machine's own further indexes and folders are left out: they may offer another build of
    torch.
    """
    ours = ("UV_", "PIP_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["python3", "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        wanted = next(line for line in test_requirements() if line.split("=")[0] == "uv")
        subprocess.run([*pip, "install", "--quiet", wanted], check=True)
        command = [f"{folder}/bin/uv", "pip", "compile", "--no-config", "--no-cache", "--quiet"]
        command += ["--no-header", "--no-annotate", "--generate-hashes", *PLATFORM, str(lock)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return HEAD + done.stdout


def test_requirements() -> list[str]:
    """Return what tests/requirements.in lists."""
    lines = (ROOT / "tests" / "requirements.in").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def main() -> None:
    """Make the locks; the second holds only what the first does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hashes", action="store_true", help="only requirements.hashes.lock")
    lock = ROOT / "requirements.lock"
    if not parser.parse_args().hashes:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        run = list(project["dependencies"])
        lock.write_text(HEAD + "\n".join(locked := freeze(run, None)) + "\n")
        extra = [line for line in freeze([*run, *test_requirements()], lock) if line not in locked]
        (ROOT / "requirements-test.lock").write_text(HEAD + "\n".join(extra) + "\n")
        print(f"{len(locked)} packages to run, {len(extra)} more to test")
    (ROOT / "requirements.hashes.lock").write_text(hash_lock(lock))


if __name__ == "__main__":
    main()
