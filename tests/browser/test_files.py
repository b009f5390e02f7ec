"""How the page and its parts are sent: types, headers, and nothing that a Range can do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.api.system import playground
from tests.support.server import Server

pytestmark = pytest.mark.slow

STATIC = Path(playground.__file__).resolve().parent.parent / "static"
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


def test_the_page_holds_the_defaults_of_the_model(service) -> None:
    """The form has its first values before anything was asked, and without a key."""
    page = service.get("/")[2].decode()
    model = json.loads(re.search(r'id="model">(.*?)</script>', page)[1])

    assert (model["id"], model["width"], model["steps"]) == ("flux.2-klein-4b", 1024, 4)


def test_no_limit_stands_in_the_page(service) -> None:
    """The form keeps those that `/health` hands out, so the page writes down none of its own."""
    limits = json.loads(service.get("/health")[2])["limits"]
    scripts = [f"/static/{name}" for name in parts_of(service) if name.endswith(".js")]
    texts = [service.get(path)[2].decode().replace("_", "") for path in ("/", *scripts)]
    texts[0] = re.sub(r'id="model">.*?</script>', "", texts[0])
    telling = {value for value in limits.values() if isinstance(value, int) and value >= 1000}

    assert len(telling) >= 4
    for text in texts:
        assert {value for value in telling if re.search(rf"\b{value:.0f}\b", text)} == set()
        assert "MAX_SAFE_INTEGER" not in text


def test_what_is_not_sent_of_a_script_is_a_comment() -> None:
    """The end of a line from ` // ` on is left out, so no text in a script may hold that."""
    texts = {path.name: path.read_text("utf-8") for path in STATIC.glob("*.js")}
    ends = [
        (name, line)
        for name, text in texts.items()
        for line in text.splitlines()
        if " // " in line and not line.lstrip().startswith("//")
    ]
    within = [
        (name, line)
        for name, line in ends
        if any(line.partition(" // ")[0].count(quote) % 2 for quote in "'\"`")
    ]

    assert len(ends) > 20
    assert within == []


def test_the_page_names_no_other_host(service) -> None:
    """Neither in the page nor in any of its parts; the namespace of SVG is a name, no address."""
    parts = ["/", *(f"/static/{name}" for name in parts_of(service))]
    texts = [service.get(path)[2].decode() for path in parts]
    addresses = [
        found for text in texts for found in re.findall(r"(?:https?:)?//[a-z][^\s\"']*", text)
    ]

    assert set(addresses) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "ranges", [",".join(f"{start}-{start + 1}" for start in range(0, 4000, 2)), "no range at all"]
)
def test_a_range_is_not_even_read(service, ranges) -> None:
    """The whole file once: many ranges cost no more than a header that is none (CVE-2025-62727)."""
    whole = service.get("/static/playground.js")[2]
    status, headers, body = service.get("/static/playground.js", range=f"bytes={ranges}")

    assert (status, body) == (200, whole)
    assert not {"content-range", "accept-ranges"} & headers.keys()


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
