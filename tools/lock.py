"""Write requirements.lock and requirements-test.lock: every package with its version, no hashes.

    python tools/lock.py

Each list is what pip installs for pyproject.toml, and for that and tests/requirements.in, into an
empty environment. No hashes, because the CPU and the CUDA build of torch carry the same version and
differ in bytes; no `+cpu` in torch's version, so that the same line takes the CUDA build where one
is offered.
"""

import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Made by `make lock`; do not edit.\n"


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


def main() -> None:
    """Make both locks; the second holds only what the first does not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = list(project["dependencies"])
    lock = ROOT / "requirements.lock"
    lock.write_text(HEAD + "\n".join(locked := freeze(run, None)) + "\n")
    test_in = (ROOT / "tests" / "requirements.in").read_text().splitlines()
    wanted = [line for line in test_in if line and not line.startswith("#")]
    extra = [line for line in freeze([*run, *wanted], lock) if line not in locked]
    (ROOT / "requirements-test.lock").write_text(HEAD + "\n".join(extra) + "\n")
    print(f"{len(locked)} packages to run, {len(extra)} more to test")


if __name__ == "__main__":
    main()
