"""Pages of the origins that the operator lists may ask and read; of no others (CORS)."""

from __future__ import annotations

import pytest

from app.errors import StartupError
from app.settings import Settings
from tests.api.conftest import error_of

KEY = "first-key-1234"
UI = "https://ui.example"
ASKS = {
    "origin": UI,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,idempotency-key",
}
ROUTES = ("/generate", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/health")


def cors(response) -> dict[str, str]:
    """The headers by which a browser decides."""
    return {n: v for n, v in response.headers.items() if n.startswith("access-control-")}


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["open", "with keys"])
async def test_a_preflight_is_answered_without_a_key(serve, keys):
    """A browser sends none with it; the headers that it asks for are allowed."""
    client = await serve(allowed_origins=(UI,), api_keys=keys)
    for route in ROUTES:
        response = await client.options(route, headers=ASKS)

        assert response.status_code == 204
        assert cors(response) == {
            "access-control-allow-origin": UI,
            "access-control-allow-methods": "GET, HEAD, POST, DELETE",
            "access-control-allow-headers": ASKS["access-control-request-headers"],
            "access-control-max-age": "600",
            "access-control-expose-headers": cors(response)["access-control-expose-headers"],
        }
        assert response.headers["vary"] == "Origin"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin",
    [
        "http://ui.example",
        "https://ui.example:8443",
        "https://ui.example.evil.example",
        "https://ui.example/",
        "HTTPS://UI.EXAMPLE",
        "https://evil.example",
        "null",
        "*",
        "",
    ],
)
async def test_another_origin_is_given_nothing(serve, service, origin):
    """Compared byte by byte: neither its preflight nor its request passes."""
    client = await serve(allowed_origins=(UI,))
    preflight = await client.options("/generate", headers=ASKS | {"origin": origin})
    response = await client.post("/generate", json={"prompt": "a"}, headers={"origin": origin})

    assert (preflight.status_code, response.status_code) == (405, 403)
    assert not cors(preflight)
    assert not cors(response)
    assert response.headers["vary"] == "Origin"
    assert not service.tickets


async def test_two_origins_are_none(serve):
    """A second header does not borrow the first one's permission."""
    client = await serve(allowed_origins=(UI,))
    headers = [(b"origin", UI.encode()), (b"origin", b"https://evil.example")]
    response = await client.post("/generate", json={"prompt": "a"}, headers=headers)

    assert response.status_code == 403
    assert not cors(response)


async def test_by_default_no_origin_is_allowed(client):
    """Nothing is said of origins then, in no answer."""
    response = await client.options("/generate", headers=ASKS)
    read = await client.get("/v1/models", headers={"origin": UI})

    assert response.status_code == 405
    assert not cors(response) | cors(read)
    assert "vary" not in read.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
async def test_a_page_of_an_allowed_origin_makes_a_picture(serve, service, site):
    """The origin rule lets it pass, and it may read what the answer says of the picture."""
    client = await serve(allowed_origins=("http://localhost:3000", UI))
    headers = {"origin": UI} | ({"sec-fetch-site": site} if site else {})
    response = await client.post("/generate", json={"prompt": "a"}, headers=headers)
    exposed = set(response.headers["access-control-expose-headers"].split(", "))

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == UI
    assert "access-control-allow-credentials" not in response.headers
    assert len(service.tickets) == 1
    assert {"x-request-id", "server-timing", "x-klein-seed", "x-klein-peak-vram-bytes"} <= exposed
    assert {"x-klein-warnings", "retry-after"} <= exposed


@pytest.mark.parametrize(
    ("path", "status"), [("/nope", 404), ("/generate", 405), ("/v1/models", 401)]
)
async def test_a_refusal_can_be_read_too(serve, path, status):
    """Without these headers its page would see a failed fetch and no reason."""
    client = await serve(allowed_origins=(UI,), api_keys=(KEY,))
    headers = {"origin": UI} | ({} if status == 401 else {"api-key": KEY})
    response = await client.get(path, headers=headers)

    assert response.status_code == status
    assert error_of(response)["message"]
    assert response.headers["access-control-allow-origin"] == UI


async def test_the_answer_to_an_unexpected_error_can_be_read_too(serve, service, monkeypatch):
    """Also where no route has answered."""
    client = await serve(allowed_origins=(UI,))
    monkeypatch.setattr(type(service), "admit", lambda *_, **__: 1 / 0)
    response = await client.post("/generate", json={"prompt": "a"}, headers={"origin": UI})

    assert response.status_code == 500
    assert response.headers["access-control-allow-origin"] == UI


async def test_all_origins_need_a_key(serve, service):
    """`*` admits every page, and the key every request."""
    client = await serve(allowed_origins=("*",), api_keys=(KEY,))
    preflight = await client.options("/generate", headers=ASKS)
    statuses = [
        (await client.post("/generate", json={"prompt": "a"}, headers={"origin": UI} | key))
        for key in ({}, {"api-key": KEY})
    ]

    assert preflight.status_code == 204
    assert [response.status_code for response in statuses] == [401, 200]
    assert {r.headers["access-control-allow-origin"] for r in [preflight, *statuses]} == {"*"}
    assert len(service.tickets) == 1


@pytest.mark.parametrize("asked", ["x" * 1001, "a;b", "authorization,\tx", "ü"])
async def test_odd_header_names_are_not_repeated(serve, asked):
    """The preflight is answered, and allows none of them."""
    client = await serve(allowed_origins=(UI,))
    headers = ASKS | {"access-control-request-headers": asked}
    response = await client.options(
        "/generate", headers=[(n.encode(), v.encode("latin-1")) for n, v in headers.items()]
    )

    assert response.status_code == 204
    assert "access-control-allow-headers" not in response.headers


@pytest.mark.parametrize(
    "value",
    [
        "ui.example",
        "https://ui.example/",
        "https://ui.example/path",
        "https://*.example",
        "https://me@ui.example",
        "https://ui.example:443",
        "http://ui.example:80",
        "null",
        "https://ui.example,x",
    ],
)
def test_what_no_browser_sends_as_an_origin_ends_the_start(value):
    """It would never match, and be found out much later."""
    with pytest.raises(StartupError, match=r"KLEIN_ALLOWED_ORIGINS .*is no origin"):
        Settings.read({"KLEIN_ALLOWED_ORIGINS": value})


def test_all_origins_without_a_key_end_the_start(tmp_path):
    """Every page that somebody visits could use the card; keys of a file count."""
    file = tmp_path / "keys"
    file.write_text(KEY)
    with pytest.raises(StartupError, match="KLEIN_API_KEYS"):
        Settings.read({"KLEIN_ALLOWED_ORIGINS": "*"})
    with_keys = {"KLEIN_ALLOWED_ORIGINS": "*", "KLEIN_API_KEYS_FILE": str(file)}

    assert Settings.read(with_keys).allowed_origins == ("*",)


def test_origins_are_given_with_commas():
    """In any case, as browsers and programs with web views send them."""
    value = "http://localhost:3000, HTTPS://Ui.Example,tauri://localhost,http://[::1]:8080"
    read = Settings.read({"KLEIN_ALLOWED_ORIGINS": value}).allowed_origins

    assert read == (
        "http://localhost:3000",
        "https://ui.example",
        "tauri://localhost",
        "http://[::1]:8080",
    )
