"""docs/operations.md: a section for each alert, and the exit codes that the program has."""

from __future__ import annotations

import re

from app.cli import main, serve
from app.domain import Loss
from app.worker import child, restarts, supervisor
from tests.monitoring import sources

PAGE = (sources.ROOT / "docs" / "operations.md").read_text()
ALERTS = PAGE.partition("\n## Alerts\n")[2].partition("\n## ")[0]


def codes(heading: str) -> set[int]:
    """The numbers in the first column of the table that begins with *heading*."""
    table = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.M)}


def test_every_alert_has_its_section_and_every_section_its_alert():
    """Where its runbook leads: the heading is the alert's name, so the anchor is that in lower
    case; in the order of the rules, with how bad it is."""
    sections = dict(re.findall(r"^### (\w+)\n\n(\w+)\.", ALERTS, re.M))
    rules = {rule["alert"]: rule["labels"]["severity"].capitalize() for rule in sources.alerts()}

    assert list(sections.items()) == list(rules.items())
    assert len(re.findall(r"^### ", ALERTS, re.M)) == len(rules)


def test_every_reason_of_a_restart_is_explained():
    """Those of `klein_worker_restarts_total`."""
    section = ALERTS.partition("### KleinWorkerRestarted\n")[2].partition("\n### ")[0]

    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(Loss)


def test_the_exit_codes_are_the_programs():
    """Of the service and of a worker."""
    ends = {supervisor.EXIT_START_FAILED, supervisor.EXIT_CRASH_LOOP, serve.EXIT_SECOND_SIGNAL}

    assert codes("exit code") == {*main.EXIT_CODES, main.EXIT_BROKEN_PIPE, *ends}
    assert codes("worker's exit code") == {
        child.EXIT_FATAL,
        child.EXIT_START_FAILED,
        child.EXIT_PIPE,
    }


def test_the_numbers_of_restarts_and_of_the_end_are_the_programs():
    """Deaths, their window, the waits before the next start, and what a drain may take."""
    waits = [f"{each:g}" for each in restarts.BACK_OFF_S[1:]]

    assert restarts.MAX_DEATHS == 3
    assert "three times in ten minutes" in PAGE
    assert restarts.WINDOW_S == 600
    assert f"then after {', '.join(waits[:-1])} and {waits[-1]} s" in PAGE
    assert f"its longest deadline and {serve._LAST_ANSWERS_S:g} s" in PAGE
    assert f"KLEIN_STOP_GRACE_PERIOD:-{630}s" in (sources.ROOT / "compose.yaml").read_text()
    assert "630 s are in `compose.yaml`" in PAGE
