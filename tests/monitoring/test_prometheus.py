"""What Prometheus says: of the files, and of the dashboard's queries against a live service."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.monitoring import sources
from tests.monitoring.conftest import Watched

pytestmark = [pytest.mark.system, pytest.mark.slow]

CONFIG = sources.ROOT / "docker" / "prometheus" / "prometheus.yml"


def promtool(*arguments: str, text: str | None = None) -> str:
    """Run promtool; what it prints, all of it."""
    command = shutil.which("promtool")
    assert command, "promtool is not installed"
    done = subprocess.run(
        [command, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_takes_the_configuration() -> None:
    """The file is valid, and finds the alerts beside it as it does in the container."""
    said = promtool("check", "config", str(CONFIG))

    assert "1 rule files found" in said


def test_prometheus_takes_the_alerts() -> None:
    """Every rule is well formed."""
    said = promtool("check", "rules", str(sources.RULES))

    assert f"{len(sources.alerts())} rules found" in said


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    """The unit tests beside this file, one or more for each alert."""
    tests = Path(__file__).with_name("alerts_test.yml")
    named = re.findall(r"alertname: (\w+)", tests.read_text())

    promtool("test", "rules", str(tests))
    for rule in sources.alerts():
        assert named.count(rule["alert"]) >= 2, rule["alert"]


def test_every_query_of_the_dashboard_is_promql(tmp_path) -> None:
    """Each panel's expression passes as the rule of a recording."""
    rules = [
        {"record": f"panel:query{number}", "expr": query.expr}
        for number, query in enumerate(sources.queries())
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    said = promtool("check", "rules", str(file))

    assert f"{len(rules)} rules found" in said


def test_a_scrape_is_as_prometheus_wants_it(watched) -> None:
    """Names, units and help texts, by Prometheus' own linter; the client's own are not ours."""
    lines = watched.get("/metrics")[2].decode().splitlines(keepends=True)
    ours = "".join(line for line in lines if re.search(r"\bklein_", line))

    promtool("check", "metrics", text=ours)


@pytest.fixture(scope="module")
def prometheus(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus with our configuration, pointed at the service and scraping each second."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(sources.RULES)]
    config["scrape_configs"][0]["static_configs"] = [
        {"targets": [urllib.parse.urlsplit(watched.url).netloc]}
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = shutil.which("prometheus")
    assert command, "prometheus is not installed"
    log = (folder / "log").open("w+")
    with (
        log,
        subprocess.Popen(
            [
                command,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=log,
        ) as process,
    ):
        try:
            yield f"http://127.0.0.1:{_port(process.pid)}"
        finally:
            process.terminate()


def _port(pid: int) -> int:
    """The port on which the process listens, once it does."""
    import psutil

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return int(connection.laddr.port)
        time.sleep(0.1)
    raise AssertionError("Prometheus does not listen")


def ask(prometheus: str, expr: str) -> list[float]:
    """The values of an instant query."""
    query = urllib.parse.urlencode({"query": expr})
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=10) as answer:
            series = json.load(answer)["data"]["result"]
    except OSError:
        return []
    return [float(entry["value"][1]) for entry in series]


def test_every_panel_shows_something(watched, prometheus) -> None:
    """Each query, run by a real Prometheus fed by a live service, gives at least one number."""
    deadline = time.monotonic() + 60
    missing = sources.queries(interval="30s")
    while missing and time.monotonic() < deadline:
        for prompt in ("a red circle", "oom", "fail"):
            watched.ask(prompt)
        watched.edit()
        watched.overflow()
        watched.sleep()
        missing = [
            query
            for query in missing
            if not any(math.isfinite(value) for value in ask(prometheus, query.expr))
        ]

    assert missing == []


def test_the_alerts_are_loaded_and_see_the_service(watched, prometheus) -> None:
    """A picture that found no room raises its alert; a service that is scraped is not missed."""
    deadline = time.monotonic() + 30
    while "KleinOutOfMemory" not in (firing := _firing(prometheus)):
        assert time.monotonic() < deadline, firing
        watched.ask("oom")
        time.sleep(0.5)

    assert "KleinNotScraped" not in firing


def _firing(prometheus: str) -> set[str]:
    with urllib.request.urlopen(f"{prometheus}/api/v1/alerts", timeout=10) as answer:
        found = json.load(answer)["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}
