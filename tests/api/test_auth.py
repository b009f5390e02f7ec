"""Who may ask, and what stays open."""

from __future__ import annotations

import ast
import inspect

import pytest

from app.api import auth
from app.api.auth import KeyRing
from tests.api.conftest import error_of

KEYS = ("first-key-1234", "second-key-5678")
API = [
    ("POST", "/generate"),
    ("POST", "/v1/images"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/flux.2-klein-4b"),
    ("GET", "/health"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing/here"),
]


@pytest.mark.parametrize(("method", "path"), API)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong-key-0000"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEYS[0]}"},
        {"api-key": "wrong-key-0000"},
    ],
    ids=["none", "wrong", "bare", "basic", "azure"],
)
async def test_without_a_key_nothing_answers(serve, method, path, headers):
    """Closed by default: even an address that does not exist says only that a key is missing."""
    client = await serve(api_keys=KEYS)
    response = await client.request(method, path, headers=headers)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEYS[0]}"},
        {"authorization": f"bearer {KEYS[1]}"},
        {"api-key": KEYS[1]},
        {"authorization": "Bearer wrong-key-0000", "api-key": KEYS[0]},
    ],
)
async def test_any_configured_key_opens(serve, headers):
    """As a bearer or in Azure's header, whichever of the keys it is."""
    client = await serve(api_keys=KEYS)

    assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
async def test_probes_need_no_key(serve, path):
    """A load balancer and a scraper have none."""
    client = await serve(api_keys=KEYS)

    assert (await client.get(path)).status_code == 200


async def test_metrics_can_be_closed(serve):
    """`KLEIN_METRICS_KEY=required` puts them behind the key."""
    client = await serve(api_keys=KEYS, metrics_key="required")

    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers={"api-key": KEYS[0]})).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer "}, {"api-key": "whatever"}])
async def test_without_configured_keys_everyone_may_ask(client, headers):
    """Open WebUI sends a bare `Bearer ` when its key is empty."""
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/generate", "x/health/live?"),
        ("/generate", "x?"),
        ("/generate", "x#"),
        ("//v1/models", "127.0.0.1"),
        ("/%761/models", "127.0.0.1"),
        ("/health/live/../../v1/models", "127.0.0.1"),
        ("/health/live%2f..%2f..%2fv1/models", "127.0.0.1"),
        ("/metrics/", "127.0.0.1"),
        ("/v1/images/files", "127.0.0.1"),
    ],
)
async def test_neither_host_nor_spelling_opens_a_path(serve, path, host):
    """The decision looks at the decoded path alone."""
    client = await serve(api_keys=KEYS)
    response = await client.post(path, headers={"host": host}, json={"prompt": "a"})

    assert response.status_code == 401


async def test_a_key_that_is_no_ascii_is_simply_wrong(serve):
    """Odd bytes give 401, not 500."""
    client = await serve(api_keys=KEYS)
    headers = [(b"authorization", "Bearer schlüssel-ü".encode("latin-1"))]

    assert (await client.get("/v1/models", headers=headers)).status_code == 401


def test_keys_are_compared_in_constant_time_only():
    """Digests meet in `compare_digest` and nowhere else."""
    tree = ast.parse(inspect.getsource(KeyRing.find).replace("\n    ", "\n").strip())
    operators = [
        operator
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for operator in node.ops
    ]

    assert "hmac.compare_digest(presented, known)" in inspect.getsource(auth)
    assert not [each for each in operators if isinstance(each, ast.Eq | ast.NotEq | ast.In)]


async def test_the_queue_learns_who_asks_by_key_or_address(serve, service):
    """Fair shares are per key where there is one; the key itself goes no further."""
    client = await serve(api_keys=KEYS)
    for key in KEYS:
        await client.post("/generate", json={"prompt": "a"}, headers={"api-key": key})

    assert len(set(service.clients)) == 2
    assert not any(key in name for name in service.clients for key in KEYS)


async def test_without_keys_the_address_names_the_client(client, service):
    """The peer's address is all there is."""
    await client.post("/generate", json={"prompt": "a"})

    assert service.clients == ["address:127.0.0.1"]
