"""The monitoring files fit together: what needs neither a service nor Prometheus to be seen."""

from __future__ import annotations

import itertools
import re

import yaml

from tests.monitoring import sources

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
        assert set(rule["annotations"]) == {"summary", "remedy"}
