"""The monitoring files fit together: what needs neither a service nor Prometheus to be seen."""

from __future__ import annotations

import itertools
import re
from typing import Any

import yaml

from tests.monitoring import sources

GUIDE = sources.ROOT / "docs" / "operations.md"
GRAFANA = sources.ROOT / "docker" / "grafana" / "provisioning"


def test_every_panel_says_what_it_shows() -> None:
    """A title, a sentence, and an id of its own."""
    panels = sources.dashboard()["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"].endswith(".")


def test_no_two_panels_lie_on_one_another() -> None:
    """And none reaches over the dashboard's 24 columns."""
    places = [panel["gridPos"] for panel in sources.dashboard()["panels"]]

    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_every_query_asks_the_chosen_source_and_instance() -> None:
    """So one dashboard serves any Prometheus and any number of services."""
    for panel in sources.dashboard()["panels"]:
        for target in panel.get("targets", ()):
            named = sources.names(target["expr"])
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count('instance=~"$instance"') >= len(named)


def test_the_dashboards_stages_are_the_services() -> None:
    """The heat maps can be had for every stage that is measured."""
    from app.telemetry.metrics import STAGES

    heat_maps = {query.panel for query in sources.queries() if query.panel in STAGES}
    repeated = {query.panel.removeprefix("$stage ") for query in sources.queries()}

    assert set(STAGES) <= heat_maps | repeated


def test_grafana_finds_what_it_is_given() -> None:
    """The datasource scrapes as often as Prometheus does, and the dashboard is where it is
    mounted."""
    source = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())
    config = yaml.safe_load((sources.ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    provider = yaml.safe_load((GRAFANA / "dashboards" / "klein.yaml").read_text())

    assert (
        source["datasources"][0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    )
    assert provider["providers"][0]["options"]["path"] == "/etc/grafana/dashboards"


def test_every_alert_says_what_to_do() -> None:
    """Two sentences, how bad it is, and a row on the metrics' page."""
    rows = set(re.findall(r"^\| `(Klein\w+)` \|", sources.PAGE.read_text(), re.MULTILINE))

    assert rows == {rule["alert"] for rule in sources.alerts()}
    for rule in sources.alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "remedy", "runbook_url"}


def test_every_alert_leads_into_the_guide() -> None:
    """By the anchor of the heading that is the alert's name."""
    page, _, _ = sources.alerts()[0]["annotations"]["runbook_url"].partition("#")
    for rule in sources.alerts():
        assert rule["annotations"]["runbook_url"] == f"{page}#{rule['alert'].lower()}"
    assert page == GUIDE.relative_to(sources.ROOT).as_posix()


def test_the_guide_has_a_section_for_every_alert() -> None:
    """And for no other, so that a renamed alert takes its section with it."""
    headings = re.findall(r"^#+ `?(Klein\w+)`?$", GUIDE.read_text(), re.MULTILINE)
    assert set(headings) == {rule["alert"] for rule in sources.alerts()}


def test_compose_brings_both_only_when_asked() -> None:
    """In a profile of their own, at pinned versions, and reached from this machine alone."""
    for name in ("prometheus", "grafana"):
        service = _service(name)
        assert service["profiles"] == ["monitoring"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_compose_mounts_the_files_where_they_are_looked_for() -> None:
    """Each mounted folder exists; alerts lie beside the configuration, as it says."""
    mounts = {
        target: source
        for name in ("prometheus", "grafana")
        for source, target, *_ in (volume.split(":") for volume in _service(name)["volumes"])
        if source.startswith("./")
    }

    assert all((sources.ROOT / source).is_dir() for source in mounts.values())
    assert mounts["/etc/alerts"] == "./docker/alerts"
    assert mounts["/etc/prometheus"] == "./docker/prometheus"
    assert mounts["/etc/grafana/provisioning"] == "./docker/grafana/provisioning"
    home = _service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"/etc/grafana/dashboards/{sources.DASHBOARD.name}"
    assert mounts["/etc/grafana/dashboards"] == "./docker/grafana/dashboards"


def _service(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((sources.ROOT / "compose.yaml").read_text())
    return document["services"][name]
