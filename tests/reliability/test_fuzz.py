"""Schemathesis against the live OpenAPI document: whatever is sent to any route is answered as
documented, and the worker is the same afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.server import ROOT, Server

# The rules between fields (width and height against size, mask without images, stream with n) and
# the rule about sizes cannot be stated in a schema, so what fits it may still be refused with 400.
EXCLUDED = "positive_data_acceptance"

# Two tools side by side, since one computes with one core. The same cases every time: a run that
# fails shall fail again. To explore, change the seeds by hand.
RUNS = (
    ("--phases=examples,coverage,fuzzing", "--max-examples=300", "--seed=2026"),
    ("--phases=examples,fuzzing", "--max-examples=520", "--seed=2027"),
)

# Schemathesis 4.32.5 now and then gives its own wrapper of uploads to its own validator.
ITS_OWN_FAULT = "Unsupported type: 'Binary'"


@pytest.mark.full
def test_five_thousand_cases_break_nothing(tmp_path: Path) -> None:
    """5,000 cases over the whole API: no 5xx, OpenAI's error object everywhere, nothing of
    the inside in any answer, and no worker is lost: `/sleep` is one of the routes. The demo model's
    limits keep the pictures small, so that the time goes into requests instead of PNG."""
    with Server(
        "slow=0", module="tests.api.live", model="shapes", device="cpu", demo_scale=False
    ) as server:
        server.wait_until_ready()
        with ThreadPoolExecutor(len(RUNS)) as pool:
            runs = list(pool.map(lambda options: fuzz(server.url, options, tmp_path), RUNS))

        assert all(is_clean(run) for run in runs), "".join(
            run.stdout[-12_000:] + run.stderr[-2000:] for run in runs if not is_clean(run)
        )
        assert sum(cases(run) for run in runs) >= 5000
        assert json.loads(server.get("/health")[2])["worker_restarts"] == 0
        assert server.metric("klein_requests_total", outcome="error") == 0
        assert "Traceback" not in server.log


def fuzz(url: str, options: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the tool to its end. It makes no failure smaller, its own fault's neither: that would
    take longer than all else."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{url}/openapi.json",
        *options,
        f"--exclude-checks={EXCLUDED}",
        "--no-shrink",
        "--generation-database=none",
        "--warnings=off",
        "--no-color",
    ]
    environ = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.reliability.schema_checks",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=1200, check=False
    )


def is_clean(run: subprocess.CompletedProcess[str]) -> bool:
    """No finding at all; the tool's own fault, which sends nothing, is none of ours."""
    if run.returncode == 0:
        return True
    faults = re.findall(r"Runtime Error\s+(\S.*)", run.stdout)
    return "FAILURES" not in run.stdout and bool(faults) and set(faults) == {ITS_OWN_FAULT}


def cases(run: subprocess.CompletedProcess[str]) -> int:
    """How many the tool made."""
    (generated,) = re.findall(r"([0-9,]+) generated", run.stdout)
    return int(generated.replace(",", ""))
