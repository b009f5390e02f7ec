"""`make check` holds the locks against known holes, with the advisories or without."""

from __future__ import annotations

import pytest

from tools import audit


def report(**skipped: str) -> dict[str, object]:
    """What pip-audit prints of one package with a hole, and of *skipped* ones."""
    hole = {"id": "CVE-2026-1", "fix_versions": ["1.0.1"]}
    found: list[dict[str, object]] = [
        {"name": "starlette", "version": "1.0.0", "vulns": [hole]},
        {"name": "torch", "version": "2.13.0", "vulns": []},
    ]
    found += [{"name": name, "skip_reason": reason} for name, reason in skipped.items()]
    return {"dependencies": found, "fixes": []}


def test_an_advisory_is_told_with_the_version_that_mends_it() -> None:
    """One line for each."""
    assert audit.read(report()) == ["starlette 1.0.0: CVE-2026-1, mended in 1.0.1"]


def test_a_package_that_was_passed_over_is_no_clean_one() -> None:
    """An index without advisories would have everything pass."""
    with pytest.raises(audit.Unreachable, match="not found"):
        audit.read(report(h11="not found"))


def test_without_advisories_the_floors_have_the_last_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes, and says on what basis; below a floor it fails all the same."""

    def fail(_: object) -> list[str]:
        raise audit.Unreachable("no route")

    monkeypatch.setattr(audit, "advisories", fail)
    assert audit.main() == 0
    assert "by the floors alone; no advisories could be had (no route)" in capsys.readouterr().out

    monkeypatch.setitem(audit.FLOORS, "torch", (99,))
    assert audit.main() == 1
    assert "torch 2.13.0 has known holes; 99 or newer" in capsys.readouterr().out


def test_a_hole_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And both locks were asked about."""
    asked: list[dict[str, str]] = []

    def answer(locked: dict[str, str]) -> list[str]:
        asked.append(locked)
        return audit.read(report())

    monkeypatch.setattr(audit, "advisories", answer)

    assert audit.main() == 1
    assert "CVE-2026-1" in capsys.readouterr().out
    assert {"torch", "pytest"} <= asked[-1].keys()


@pytest.mark.system
def test_pip_audit_without_a_network_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program, with nobody behind its proxy."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")

    with pytest.raises(audit.Unreachable):
        audit.advisories({"starlette": "1.10.0"})
