"""Workflows, issue forms and what they call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.schemas import faults
from tests.support.server import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(
    set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
)


def steps(workflow: Path) -> list[dict[str, Any]]:
    """Every step of every job."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
    ],
)
def test_each_file_is_of_its_form(schema: str, files: list[Path]) -> None:
    """By the schemas that check-jsonschema ships."""
    assert files
    assert faults(schema, *files) == ""


def test_the_checks_are_the_targets_of_ci() -> None:
    """What .ci/run runs, and nothing that only a workflow knows."""
    (wanted,) = re.findall(r"^for target in (.*); do$", (ROOT / ".ci/run").read_text(), re.M)

    run = [step["run"] for step in steps(GITHUB / "workflows/check.yml") if "run" in step]
    assert run == [f"make {target}" for target in wanted.split()]


def test_every_target_that_a_workflow_calls_is_there() -> None:
    """A target that was renamed takes its workflow with it."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = {
        name
        for workflow in WORKFLOWS
        for step in steps(workflow)
        for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
    }

    assert {"check", "coverage", "test-system", "release"} <= called <= targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_trusts_as_little_as_it_can(workflow: Path) -> None:
    """Actions by their commit, read rights by default, and nothing of a stranger's in a shell."""
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        assert "${{" not in step.get("run", "")
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])
            assert step["with"]["persist-credentials"] is False


def test_the_forms_ask_for_what_helps() -> None:
    """doctor's words of a fault and of a card, bench's report, a client's request."""
    asked = {
        form.stem: " ".join(
            f"{part['attributes'].get('label')} {part['attributes'].get('description')}"
            for part in yaml.safe_load(form.read_text())["body"]
        )
        for form in FORMS
    }

    assert asked.keys() == {"bug", "card", "client"}
    assert "klein doctor" in asked["bug"]
    assert "klein bench --out report.md" in asked["card"]
    assert "klein doctor" in asked["card"]
    assert "klein --version" in asked["client"]
