"""Who may ask, and what stays open."""

from __future__ import annotations

import ast
import inspect

import pytest

from app.api.middleware import auth
from app.api.middleware.auth import KeyRing
from app.api.proxies import Proxies
from app.errors import StartupError
from app.settings import Settings
from tests.api.conftest import error_of

KEYS = ("first-key-1234", "second-key-5678")
API = [
    ("POST", "/generate"),
    ("POST", "/v1/images"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/flux.2-klein-4b"),
    ("GET", "/v1/loras"),
    ("GET", "/v1/loras/ink"),
    ("GET", "/v1/loras/ink/preview"),
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
        ("/metricsx", "127.0.0.1"),
        ("/v1/images/files", "127.0.0.1"),
        ("/v1/images/files/", "127.0.0.1"),
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


def scope_of(peer: str | None, *said: str) -> dict[str, object]:
    """A request of *peer* with these X-Forwarded-For headers."""
    headers = [(b"x-forwarded-for", each.encode("latin-1")) for each in said]
    return {"client": peer and (peer, 4711), "headers": headers}


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("192.0.2.7", "address:192.0.2.7"),
        ("::ffff:192.0.2.7", "address:192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "address:2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff::1", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "address:2001:db8:1:3::/64"),
        ("fe80::1%eth0", "address:fe80::/64"),
        (None, "address:unknown"),
        ("/run/klein.sock", "address:unknown"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(peer, name):
    """Whoever has an IPv6 address has at least 2^64 of them, and is one client all the same."""
    assert Proxies(()).client(scope_of(peer)) == name


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "10.0.0.9", "192.0.2.1"])
@pytest.mark.parametrize("said", ["203.0.113.9", "127.0.0.1", "10.0.0.1, 203.0.113.9"])
def test_nobody_chooses_an_address(peer, said):
    """X-Forwarded-For counts for nothing unless its sender was declared, on this machine too."""
    plain = Proxies(()).client(scope_of(peer))

    assert Proxies(()).client(scope_of(peer, said)) == plain
    assert Proxies(("10.0.0.1", "172.16.0.0/12")).client(scope_of(peer, said)) == plain


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (("203.0.113.9",), "203.0.113.9"),
        (("6.6.6.6, 203.0.113.9",), "203.0.113.9"),
        (("6.6.6.6", "203.0.113.9"), "203.0.113.9"),
        (("6.6.6.6, 203.0.113.9, 10.1.2.3, ::ffff:10.0.0.2",), "203.0.113.9"),
        (("203.0.113.9:4711",), "203.0.113.9"),
        (("[2001:db8:1:2::7]:4711",), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::7",), "2001:db8:1:2::/64"),
        (("10.0.0.2, 10.0.0.3",), "10.0.0.2"),
        (("6.6.6.6, nonsense",), "10.0.0.1"),
        (("6.6.6.6, nonsense, 10.0.0.3",), "10.0.0.3"),
        (("",), "10.0.0.1"),
        (("6.6.6.6, ",), "10.0.0.1"),
        (("\u00fc",), "10.0.0.1"),
        ((", ".join(["10.0.0.2"] * 3000),), "10.0.0.2"),
        ((), "10.0.0.1"),
    ],
)
def test_a_declared_proxy_tells_who_asks(said, name):
    """Read from the right to the first address that is no proxy of ours; what stands before it
    was written by whoever asked."""
    proxies = Proxies(("10.0.0.0/8",))

    assert proxies.client(scope_of("10.0.0.1", *said)) == f"address:{name}"


async def test_behind_a_declared_proxy_each_caller_is_a_client(serve, service):
    """`KLEIN_TRUSTED_PROXIES` reaches the queue."""
    client = await serve(trusted_proxies=("127.0.0.0/8",))
    for address in ("203.0.113.9", "203.0.113.10"):
        await client.post(
            "/generate", json={"prompt": "a"}, headers={"x-forwarded-for": f"6.6.6.6, {address}"}
        )

    assert service.clients == ["address:203.0.113.9", "address:203.0.113.10"]


def test_a_proxy_that_was_not_declared_is_told_of_once(caplog):
    """When one peer sends several: the operator learns why all its callers share one place."""
    proxies = Proxies(("10.0.0.0/8",))
    for peer, said in (
        ("192.0.2.1", "1.1.1.1"),
        ("192.0.2.1", "1.1.1.1"),
        ("192.0.2.2", "2.2.2.2"),
        ("10.0.0.1", "3.3.3.3"),
        ("10.0.0.1", "4.4.4.4"),
    ):
        proxies.client(scope_of(peer, said))
    before = len(caplog.records)
    for number in range(5):
        proxies.client(scope_of("192.0.2.1", f"5.5.5.{number}"))
        proxies.client(scope_of("192.0.2.2", f"5.5.5.{number}"))
    (warning,) = caplog.records

    assert before == 0
    assert warning.levelname == "WARNING"
    assert "192.0.2.1 sends different" in warning.getMessage()
    assert "KLEIN_TRUSTED_PROXIES" in warning.getMessage()
    assert "5.5.5" not in warning.getMessage()


def test_peers_are_not_remembered_without_end():
    """A million addresses that each say something leave a few behind."""
    proxies = Proxies(())
    for number in range(1000):
        proxies.client(scope_of(f"10.0.{number // 250}.{number % 250}", "1.1.1.1"))

    assert len(proxies._said) <= 65


@pytest.mark.parametrize("value", ["nginx", "10.0.0.0/33", "10.0.0.1/8", "*", "10.0.0.1,x", "1.2"])
def test_a_proxy_that_is_no_address_ends_the_start(value):
    """By the setting's name: a proxy that is not trusted would be found out much later."""
    with pytest.raises(StartupError, match=r"KLEIN_TRUSTED_PROXIES .*neither an address"):
        Settings.read({"KLEIN_TRUSTED_PROXIES": value})


def test_proxies_are_given_by_address_and_network():
    """Separated by commas, of either kind."""
    value = "127.0.0.1, ::1,172.18.0.0/16 , 2001:db8::/32"
    read = Settings.read({"KLEIN_TRUSTED_PROXIES": value}).trusted_proxies

    assert read == ("127.0.0.1", "::1", "172.18.0.0/16", "2001:db8::/32")
