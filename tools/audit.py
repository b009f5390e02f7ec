"""Hold the locks against known holes: `python tools/audit.py`, part of `make check`.

First against `FLOORS`, which needs no network. Then by pip-audit against the advisories that the
package index publishes, where it answers; where it does not, that is said, and the floors have the
last word. pip-audit passes over a package that the index knows nothing of as if it had no holes, so
one is asked for first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / "requirements-test.lock")
LIMIT_S = 180

FLOORS = {
    "starlette": (1, 0, 1),
    "python-multipart": (0, 0, 22),
    "transformers": (5, 3, 0),
    "torch": (2, 6),
    "pillow": (13,),
    "fastapi": (0, 165),
    "uvicorn": (0, 54),
    "h11": (0, 16),
    "urllib3": (2, 6),
    "requests": (2, 32, 4),
    "jinja2": (3, 1, 6),
}
"""The oldest versions without a known hole that reaches this service."""
PROBE = "starlette"


class Unreachable(Exception):
    """The advisories cannot be had; the message says why."""


def pins(lock: Path) -> dict[str, str]:
    """Return the version of each package in *lock*, by its name in small letters."""
    lines = (line.lower().partition(";")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def below_floors(locked: dict[str, str]) -> list[str]:
    """Return a sentence for each of `FLOORS` that *locked* misses or goes below."""
    found = []
    for name, floor in FLOORS.items():
        wanted = ".".join(map(str, floor))
        if name not in locked:
            found.append(f"{name} is not locked; {wanted} or newer is needed.")
        elif tuple(int(part) for part in locked[name].split(".")) < floor:
            found.append(f"{name} {locked[name]} has known holes; {wanted} or newer is needed.")
    return found


def advisories(locked: dict[str, str]) -> list[str]:
    """Return a line for each advisory on what is *locked*.

    Raises:
        Unreachable: pip-audit got no answer, or none on a package.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in locked.items()))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(listed), "--no-deps"]
        command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
        try:
            done = subprocess.run(
                [*command, "--timeout", "10"],
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(f"no answer within {LIMIT_S} s") from None
    try:
        return read(json.loads(done.stdout))
    except json.JSONDecodeError:
        words = done.stderr.strip().splitlines() or ["pip-audit said nothing"]
        raise Unreachable(words[-1]) from None


def read(report: dict[str, Any]) -> list[str]:
    """Return a line for each advisory of pip-audit's *report*.

    Raises:
        Unreachable: it passed over a package.
    """
    passed_over = [each for each in report["dependencies"] if "skip_reason" in each]
    if passed_over:
        raise Unreachable(passed_over[0]["skip_reason"])
    return [
        f"{each['name']} {each['version']}: {hole['id']}, mended in "
        f"{' or '.join(hole['fix_versions']) or 'no version yet'}"
        for each in report["dependencies"]
        for hole in each["vulns"]
    ]


def main() -> int:
    """Print what was found; 1 where a lock has a known hole."""
    run, test = map(pins, LOCKS)
    holes = below_floors(run)
    try:
        advisories({PROBE: run[PROBE]})
        holes += advisories(run | test)
        basis = "pip-audit's advisories"
    except Unreachable as reason:
        basis = f"the floors alone; no advisories could be had ({reason})"
    print("\n".join(holes) or f"No known holes in the locks, by {basis}.")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
