"""Schemathesis against the live OpenAPI document: no 5xx, every answer as documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT

pytestmark = pytest.mark.slow

# The rules between fields (width and height against size, mask without images, stream with n) and
# the rule about sizes cannot be stated in a schema, so what fits it may still be refused with 400.
EXCLUDED = "positive_data_acceptance"

# The same cases every time: a run that fails shall fail again. To explore, change it by hand.
SEED = 2026

# Schemathesis 4.32.5 now and then gives its own wrapper of uploads to its own validator.
ITS_OWN_FAULT = "Unsupported type: 'Binary'"


def is_clean(run: subprocess.CompletedProcess[str]) -> bool:
    """No finding at all; the tool's own fault, which sends nothing, is none of ours."""
    if run.returncode == 0:
        return True
    faults = re.findall(r"Runtime Error\s+(\S.*)", run.stdout)
    return "FAILURES" not in run.stdout and bool(faults) and set(faults) == {ITS_OWN_FAULT}


@pytest.mark.parametrize(
    ("cases", "options"),
    [
        pytest.param(
            200,
            [
                "--phases=coverage",
                "--include-path=/generate",
                "--include-path=/v1/images/generations",
            ],
            marks=pytest.mark.full,
        ),
        pytest.param(
            2000,
            ["--phases=examples,coverage,fuzzing", "--max-examples=150", "--workers=2"],
            marks=pytest.mark.full,
        ),
    ],
    ids=["200", "2000"],
)
def test_whatever_is_sent_is_answered_as_documented(live_scripted, tmp_path: Path, cases, options):
    """At least so many cases; the worker that was there before is there after."""
    server = live_scripted
    worker = server.worker_pid()
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        *options,
        f"--exclude-checks={EXCLUDED}",
        f"--seed={SEED}",
        "--warnings=off",
        "--no-color",
    ]
    environ = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.api.schema_checks",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    generated = re.search(r"([0-9,]+) generated", run.stdout)

    assert is_clean(run), run.stdout[-12_000:] + run.stderr[-2000:]
    assert generated is not None
    assert int(generated[1].replace(",", "")) >= cases
    assert server.worker_pid() == worker
    assert server.metric("klein_requests_total", outcome="error") == 0
    assert "Traceback" not in server.log
