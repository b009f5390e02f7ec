"""Make everything of a release in a folder, from what is committed; nothing is tagged or sent.

    python tools/release.py VERSION [--out FOLDER] [--date YYYY-MM-DD]

In a copy of HEAD, VERSION becomes `app.__version__` and the changelog's "Unreleased" its section.
Where HEAD says both already, it is built as it stands; else `release.patch` is what to commit
first. The folder then holds:

    klein_server-VERSION.tar.gz            the sources, and what is built from them:
    klein_server-VERSION-py3-none-any.whl  the wheel
    klein-server-VERSION.lock              every version and hash that it was tested with
    klein-server-VERSION.cdx.json          the bill of materials (CycloneDX) of that lock
    notes.md, tag.txt                      the changelog's section; the text of the tag
    SHA256SUMS                             of all of these
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import sbom

ROOT = Path(__file__).resolve().parent.parent
UNRELEASED = "## [Unreleased]"
LIMIT_S = 300
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


class ReleaseRefused(Exception):
    """What is missing for this release, and what to do."""


def release(version: str, out: Path, day: date, *, repository: Path = ROOT) -> list[Path]:
    """Make the release *version*, dated *day*, in the empty folder *out*; return its files.

    Raises:
        ReleaseRefused: *version* is none or too low, *out* holds something, or the changelog is
            silent about it.
    """
    if out.exists() and any(out.iterdir()):
        raise ReleaseRefused(f"{out} is not empty; name another folder or empty it.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _run("git", "clone", "--quiet", "--no-hardlinks", str(repository), str(tree))
        prepare(tree, version, day)
        if patch := _run("git", "diff", cwd=tree):
            (out / "release.patch").write_text(patch)
        # As of the commit, so that the same sources give the same wheel.
        made = _run("git", "log", "-1", "--format=%ct", cwd=tree).strip()
        environ = os.environ | {"SOURCE_DATE_EPOCH": made}
        # The build's own tools are this environment's, which the lock holds.
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree))
        _run(*build, environ=environ)
        lock = out / f"klein-server-{version}.lock"
        shutil.copyfile(tree / "requirements.hashes.lock", lock)
        notes = section((tree / "CHANGELOG.md").read_text(), version)
    (out / f"klein-server-{version}.cdx.json").write_text(sbom.of_lock(lock, version))
    (out / "notes.md").write_text(notes)
    (out / "tag.txt").write_text(f"klein-server {version}\n\n{_plain(notes)}")
    files = sorted(path for path in out.iterdir())
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (out / "SHA256SUMS").write_text("".join(sums))
    return [*files, out / "SHA256SUMS"]


def prepare(tree: Path, version: str, day: date) -> None:
    """Have the checkout *tree* say *version*, in the package and in the changelog."""
    source = tree / "app" / "__init__.py"
    now = _VERSION.findall(source.read_text())[0]
    try:
        is_older = Version(version) < Version(now)
    except InvalidVersion:
        raise ReleaseRefused(f"{version!r} is no version; say one such as 0.2.0.") from None
    if is_older:
        raise ReleaseRefused(f"{version} is older than {now}, which app/__init__.py says.")
    source.write_text(_VERSION.sub(f'__version__ = "{version}"', source.read_text()))
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(dated(changelog.read_text(), version, day))


def dated(changelog: str, version: str, day: date) -> str:
    """Return *changelog* with a section for *version*, made from what is unreleased if need be.

    Raises:
        ReleaseRefused: there is neither such a section nor anything unreleased.
    """
    if f"## [{version}]" in changelog:
        return changelog
    if UNRELEASED not in changelog or not section(changelog, "Unreleased").strip():
        raise ReleaseRefused(
            f"CHANGELOG.md has neither a section [{version}] nor anything under [Unreleased]; say "
            "there what changed for users."
        )
    return changelog.replace(UNRELEASED, f"{UNRELEASED}\n\n## [{version}] - {day}", 1)


def section(changelog: str, version: str) -> str:
    """Return what *changelog* says of *version*, without its heading."""
    after = changelog.partition(f"## [{version}]")[2].partition("\n")[2]
    return re.split(r"^## \[", after, maxsplit=1, flags=re.MULTILINE)[0].strip() + "\n"


def _plain(notes: str) -> str:
    """Return *notes* for a tag: git takes a line that begins with # for a comment."""
    return re.sub(r"^#+ (.+)$", r"\1:", notes, flags=re.MULTILINE)


def _run(*command: str, cwd: Path | None = None, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise ReleaseRefused(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def main() -> int:
    """Make the release that the command line names, and say what to do with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version")
    parser.add_argument("--out", type=Path, help="an empty folder (default: dist/VERSION)")
    parser.add_argument("--date", type=date.fromisoformat, default=datetime.now(UTC).date())
    options = parser.parse_args()
    out = options.out or ROOT / "dist" / options.version
    try:
        files = release(options.version, out, options.date)
    except ReleaseRefused as reason:
        print(reason, file=sys.stderr)
        return 1
    for path in files:
        print(f"{path.stat().st_size:12,} {path}")
    if (out / "release.patch").exists():
        print("Commit release.patch and run this again: a tag must name what was built.")
    else:
        print(f"git tag --sign --file {out / 'tag.txt'} v{options.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
