"""No page of another origin drives the card, whatever it sends and whether or not it can read."""

from __future__ import annotations

import pytest

from tests.api.conftest import error_of

KEY = "first-key-1234"
FORM = {"prompt": (None, "a"), "image": ("a.png", b"no picture", "image/png")}
ROUTES = ("/generate", "/v1/images", "/v1/images/generations", "/v1/images/edits", "/nowhere")
FOREIGN = [
    {"origin": "http://evil.example"},
    {"origin": "https://evil.example:8000"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1:8001"},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://localhost:8000"},
    {"origin": "http://127.0.0.1:8000.evil.example"},
    {"origin": "http://127.0.0.1:8000@evil.example"},
    {"origin": "http://127.0.0.1:8000/"},
    {"origin": "127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8000 http://evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "Cross-Site"},
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "cross-site"},
    {"origin": "http://evil.example", "sec-fetch-site": "same-origin"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_page_of_another_origin_is_refused(client, service, headers):
    """403 with OpenAI's error object, on every route, before a byte of the body is read."""
    for route in ROUTES:
        response = await client.post(route, files=FORM, headers=headers)

        assert response.status_code == 403
        error = error_of(response)
        assert (error["type"], error["code"]) == ("invalid_request_error", "origin_not_allowed")
    assert not service.tickets


async def test_two_origins_are_not_one_own(client):
    """A second header does not hide the first."""
    headers = [(b"origin", b"http://127.0.0.1:8000"), (b"origin", b"http://evil.example")]

    assert (await client.post("/generate", json={"prompt": "a"}, headers=headers)).is_error


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "https://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
        ("localhost", "https://localhost"),
        ("localhost", "https://localhost:443"),
        ("localhost:443", "https://localhost"),
        ("localhost:80", "http://localhost"),
        ("LocalHost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("pictures.example", "https://pictures.example"),
    ],
)
async def test_the_services_own_page_goes_on_working(serve, service, host, origin):
    """Also behind a proxy that speaks TLS, where the scheme is another."""
    client = await serve(allowed_hosts=("pictures.example",))
    headers = {"host": host, "origin": origin, "sec-fetch-site": "same-origin"}
    response = await client.post("/generate", json={"prompt": "a"}, headers=headers)

    assert response.status_code == 200
    assert len(service.tickets) == 1


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": "none"}])
async def test_what_is_no_page_needs_no_origin(client, headers):
    """Programs send neither header; a person who types the address is no other site."""
    response = await client.post("/generate", json={"prompt": "a"}, headers=headers)

    assert response.status_code == 200


async def test_a_configured_key_comes_from_anywhere(serve, service):
    """Whoever runs that page was given the key; without one, or with a wrong one, it is 401."""
    client = await serve(api_keys=(KEY,))
    headers = {"origin": "https://ui.example", "sec-fetch-site": "cross-site"}
    for key, status in ((KEY, 200), ("wrong-key-0000", 401)):
        response = await client.post(
            "/generate", json={"prompt": "a"}, headers={**headers, "api-key": key}
        )
        assert response.status_code == status
    assert len(service.tickets) == 1


async def test_reading_is_no_deed(client):
    """A link to the page, and a picture of it, may stand anywhere."""
    headers = {"sec-fetch-site": "cross-site", "origin": "http://evil.example"}

    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.options("/generate", headers=headers)).status_code == 405
