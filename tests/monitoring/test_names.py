"""Dashboard, alerts and documentation name the metrics that the service has, and no others."""

from __future__ import annotations

import pytest

from app.telemetry.metrics import OUTCOMES
from tests.monitoring import sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scrape(watched) -> str:
    """One scrape, after one request of each outcome."""
    return watched.get("/metrics")[2].decode()


@pytest.fixture(scope="module")
def samples(scrape) -> frozenset[str]:
    """Every name that a query can use."""
    return frozenset().union(*(family.samples for family in sources.scraped(scrape).values()))


def test_every_outcome_was_seen(watched) -> None:
    """What the other promises rest on: no label value is missing because nothing happened."""
    for outcome in OUTCOMES:
        assert watched.metric("klein_requests_total", outcome=outcome) > 0, outcome


def test_the_page_documents_what_a_scrape_holds(scrape) -> None:
    """Each metric with its type and labels, none left out and none that is not there."""
    found = sources.scraped(scrape)
    page = sources.documented()

    assert set(page) == set(found)
    assert {name: row.kind for name, row in page.items()} == {
        name: family.kind for name, family in found.items()
    }
    assert {name: row.labels for name, row in page.items()} == {
        name: family.labels for name, family in found.items()
    }
    assert all(row.meaning for row in page.values())


def test_every_query_of_the_dashboard_names_metrics_that_exist(samples) -> None:
    """A panel on a metric that was renamed would stay empty without a word."""
    for query in sources.queries():
        assert sources.names(query.expr) <= samples, query.panel


def test_every_alert_names_metrics_that_exist(samples) -> None:
    """An alert on a metric that was renamed would never fire."""
    for rule in sources.alerts():
        assert sources.names(rule["expr"]) <= samples, rule["alert"]


def test_every_metric_can_be_seen(scrape) -> None:
    """What the service measures stands on the dashboard, or in an alert."""
    shown = sources.names(
        " ".join([query.expr for query in sources.queries()])
        + " ".join(rule["expr"] for rule in sources.alerts())
    )

    unseen = [
        name for name, family in sources.scraped(scrape).items() if not family.samples & shown
    ]
    assert unseen == []
