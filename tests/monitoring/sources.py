"""The monitoring files as the tests read them: which metrics each of them names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "klein.json"
RULES = ROOT / "docker" / "alerts" / "klein.yml"
PAGE = ROOT / "docs" / "metrics.md"

_NAME = re.compile(r"\bklein_[a-z_]+")


@dataclass(frozen=True)
class Query:
    """One query of a panel, with the dashboard's variables filled in."""

    panel: str
    expr: str


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON."""
    return json.loads(DASHBOARD.read_text())


def queries(*, interval: str = "1m") -> list[Query]:
    """Every query of the dashboard; a repeated panel gives one for each stage."""
    found = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            for stage in _stages() if panel.get("repeat") == "stage" else ("",):
                expr = target["expr"].replace("$__rate_interval", interval)
                expr = expr.replace("$instance", ".+").replace("$stage", stage)
                found.append(Query(f"{panel['title']} {stage}".strip(), expr))
    return found


def alerts() -> list[dict[str, Any]]:
    """Every alert's rule."""
    document = yaml.safe_load(RULES.read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def names(text: str) -> set[str]:
    """The service's metrics that *text* names."""
    return set(_NAME.findall(text))


@dataclass(frozen=True)
class Documented:
    """A row of the metrics' page."""

    kind: str
    labels: frozenset[str]
    meaning: str


def documented() -> dict[str, Documented]:
    """What the page says of each metric."""
    lines = (line for line in PAGE.read_text().splitlines() if line.startswith("| `klein_"))
    found = {}
    for line in lines:
        name, kind, labels, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = Documented(
            kind, frozenset(re.findall(r"`(\w+)`", labels)), meaning
        )
    return found


@dataclass(frozen=True)
class Scraped:
    """A family as a scrape gives it: *samples* are the names that a query can use."""

    kind: str
    labels: frozenset[str]
    samples: frozenset[str]


def scraped(text: str) -> dict[str, Scraped]:
    """The service's families of a scrape, under the names that people use."""
    found = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("klein_") or family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        samples = frozenset(sample.name for sample in family.samples)
        found[name] = Scraped(family.type, frozenset(labels), samples)
    return found


def _stages() -> tuple[str, ...]:
    (variable,) = (entry for entry in dashboard()["templating"]["list"] if entry["name"] == "stage")
    return tuple(variable["query"].split(","))
