"""How the page and its parts are sent: types, headers, and nothing that a Range can do."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from tests.support.server import Server

pytestmark = pytest.mark.slow

TYPES = {
    "/": "text/html; charset=utf-8",
    "/static/playground.css": "text/css; charset=utf-8",
    "/static/playground.js": "text/javascript; charset=utf-8",
    "/static/icon.svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    """A service with klein's ids and limits; no picture is asked for here."""
    with Server(
        module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    ) as server:
        yield server


@pytest.mark.parametrize("path", TYPES)
def test_each_file_has_its_type_and_its_guards(service, path) -> None:
    """No sniffing, no foreign origin, no inline script, and never an old file with a new server."""
    status, headers, _ = service.get(path)
    policy = headers["content-security-policy"]

    assert (status, headers["content-type"]) == (200, TYPES[path])
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    assert service.get(path, if_none_match=headers["etag"])[0] == 304


def test_the_page_holds_the_limits_of_the_model(service) -> None:
    """The form is right before anything was asked, and without a key."""
    page = service.get("/")[2].decode()
    model = json.loads(re.search(r'id="model">(.*?)</script>', page)[1])

    assert (model["id"], model["width"], model["steps"]) == ("flux.2-klein-4b", 1024, 4)
    assert model["max_pixels"] == 4_194_304


def test_the_page_names_no_other_host(service) -> None:
    """Neither in the page nor in any of its parts; the namespace of SVG is a name, no address."""
    parts = ["/", *(f"/static/{name}" for name in parts_of(service))]
    texts = [service.get(path)[2].decode() for path in parts]
    addresses = [
        found for text in texts for found in re.findall(r"(?:https?:)?//[a-z][^\s\"']*", text)
    ]

    assert set(addresses) <= {"http://www.w3.org/2000/svg"}


def test_many_ranges_cost_nothing(service) -> None:
    """A Range is ignored: the whole file once, at once (CVE-2025-62727)."""
    ranges = ",".join(f"{start}-{start + 1}" for start in range(0, 4000, 2))
    whole = service.get("/static/playground.js")[2]
    started = time.monotonic()
    status, headers, body = service.get("/static/playground.js", range=f"bytes={ranges}")

    assert (status, body) == (200, whole)
    assert "content-range" not in headers
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "path", ["/static/", "/static/playground.html", "/static/..%2fapp.py", "/static/../../app.py"]
)
def test_there_is_nothing_else_to_be_had(service, path) -> None:
    """A name is looked up among the page's parts and never becomes a path."""
    status, _, body = service.get(path)

    assert status == 404
    assert json.loads(body)["error"]["code"] == "unknown_url"


def parts_of(service) -> list[str]:
    """The names of all parts that the page and its scripts ask for."""
    page = service.get("/")[2].decode()
    names = set(re.findall(r'"static/([\w.]+)"', page))
    names |= set(
        re.findall(r'from "\./([\w.]+)"', service.get("/static/playground.js")[2].decode())
    )
    return sorted(names)
