"""Behind a proxy: whose X-Forwarded headers are believed, and which of their values."""

from __future__ import annotations

import pytest
from httpx import ASGITransport

from app.api.proxies import Proxies
from tests.api.conftest import error_of
from tests.api.test_middleware import with_version

LINK = {"prompt": "a", "response_format": "url"}
SAID = {"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https"}


async def link_of(client, **headers: str) -> str:
    """Where the picture of a request can be fetched, without its random name."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await client.post("/v1/images/generations", json=LINK, headers=named)

    assert response.status_code == 200, response.text

    return response.json()["data"][0]["url"].rpartition("/")[0]


async def test_links_begin_as_the_browser_sees_the_service(serve):
    """With the scheme and the name that a declared proxy forwards."""
    names = ("pictures.example",)
    client = await serve(trusted_proxies=("127.0.0.1",), allowed_hosts=names)
    kept = await link_of(client, host="pictures.example", **SAID)
    replaced = await link_of(client, **SAID, x_forwarded_host="pictures.example")

    assert kept == replaced == "https://pictures.example/v1/images/files"


async def test_the_name_that_a_proxy_forwards_is_the_services_own(serve, service):
    """Its page is no foreign one, though the proxy asks under another name."""
    names = ("pictures.example",)
    client = await serve(trusted_proxies=("127.0.0.1",), allowed_hosts=names)
    headers = {**SAID, "origin": "https://pictures.example", "sec-fetch-site": "same-origin"}
    with_name = headers | {"x-forwarded-host": "pictures.example"}
    statuses = [
        (await client.post("/generate", json={"prompt": "a"}, headers=each)).status_code
        for each in (headers, with_name)
    ]

    assert statuses == [403, 200]


@pytest.mark.parametrize("trusted", [(), ("10.0.0.0/8",)])
async def test_nobody_else_is_believed(serve, trusted):
    """Any other peer's headers change nothing, on this machine too."""
    client = await serve(trusted_proxies=trusted)
    link = await link_of(client, **SAID, x_forwarded_host="evil.example")

    assert link == "http://127.0.0.1:8000/v1/images/files"


async def test_the_public_address_goes_before_what_is_forwarded(serve):
    """`KLEIN_PUBLIC_URL` is the operator's own word, and may have a path."""
    client = await serve(trusted_proxies=("127.0.0.1",), public_url="https://a.example/pictures")

    assert await link_of(client, **SAID) == "https://a.example/pictures/v1/images/files"


async def test_a_forwarded_name_must_be_known_and_so_must_the_one_it_came_under(serve):
    """A page that rebinds its name can set the header where a proxy only hands it on."""
    client = await serve(trusted_proxies=("127.0.0.1",))
    for host, forwarded in (("127.0.0.1", "evil.example"), ("evil.example", "localhost")):
        response = await client.get(
            "/v1/models", headers={"host": host, "x-forwarded-host": forwarded}
        )
        assert response.status_code == 400
        assert "KLEIN_ALLOWED_HOSTS" in str(error_of(response)["message"])


@pytest.mark.parametrize(("forwarded", "status"), [("evil.example", 400), ("localhost", 404)])
async def test_a_forwarded_name_is_judged_where_host_is_missing_too(serve, forwarded, status):
    """HTTP/1.0 may leave it out; the socket's own address is told to nobody."""
    client = await serve(trusted_proxies=("127.0.0.1",))
    client._transport = ASGITransport(app=with_version(client._transport.app, "1.0"))
    answers = []
    for headers in ({"x-forwarded-host": forwarded}, {}):
        request = client.build_request("GET", "/v1/responses", headers=headers)
        del request.headers["host"]
        answers.append(await client.send(request))

    assert [answer.status_code for answer in answers] == [status, 404]
    assert "http://localhost:" in answers[1].text
    assert "127.0.0.1" not in answers[1].text


def scope_of(peer: str, **said: str) -> dict[str, object]:
    """A request of *peer* with X-Forwarded-For, -Proto and -Host."""
    headers = [(f"x-forwarded-{name}".encode(), text.encode()) for name, text in said.items()]
    return {"client": (peer, 4711), "headers": headers}


PROXY, CDN, CALLER, FORGED = "10.0.0.1", "10.0.0.2", "203.0.113.9", "6.6.6.6"
CHAINS = [
    # One proxy that sets them, whatever the caller wrote before.
    ({"for": CALLER, "proto": "https", "host": "a.example"}, ("https", "a.example")),
    ({"for": f"{FORGED}, {CALLER}", "proto": "https"}, ("https", None)),
    # One that appends to what the caller forged.
    (
        {"for": f"{FORGED}, {CALLER}", "proto": "http, https", "host": "evil.example, a.example"},
        ("https", "a.example"),
    ),
    # Two that append: what the outer one saw of the caller.
    (
        {"for": f"{CALLER}, {CDN}", "proto": "https, http", "host": "a.example, inner"},
        ("https", "a.example"),
    ),
    (
        {
            "for": f"{FORGED}, {CALLER}, {CDN}",
            "proto": "gopher, https, http",
            "host": "evil.example, a.example, inner",
        },
        ("https", "a.example"),
    ),
    # Two, of which the inner one overwrites, or hands on what the outer one wrote.
    ({"for": f"{CALLER}, {CDN}", "proto": "https"}, ("https", None)),
    ({"for": f"{FORGED}, {CALLER}, {CDN}", "proto": "http, https"}, ("https", None)),
    # Without addresses the nearest proxy's word counts.
    ({"proto": "http, https", "host": "evil.example, a.example:8443"}, ("https", "a.example:8443")),
    # What is no scheme and no name counts for nothing.
    ({"proto": "HTTPS", "host": "A.example."}, ("https", "A.example.")),
    ({"proto": "gopher", "host": "a/b"}, (None, None)),
    ({"proto": "", "host": ""}, (None, None)),
    ({"proto": "https,", "host": "a.example, "}, (None, None)),
    ({}, (None, None)),
]


@pytest.mark.parametrize(("said", "found"), CHAINS, ids=str)
def test_the_first_untrusted_hop_is_told_of(said, found):
    """Read from the right, like the addresses."""
    assert Proxies(("10.0.0.0/8",)).seen(scope_of(PROXY, **said)) == found
    assert Proxies(()).seen(scope_of(PROXY, **said)) == (None, None)
