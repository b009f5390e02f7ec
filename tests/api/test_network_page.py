"""docs/network.md names settings that exist, and its combinations do what it says."""

from __future__ import annotations

import re

import pytest

from app.settings import Settings, variable
from tests.support.server import ROOT

PAGE = (ROOT / "docs" / "network.md").read_text()
BLOCKS = [
    dict(line.split("=", 1) for line in text.splitlines())
    for text in re.findall(r"^```\n(KLEIN_.*?)^```$", PAGE, re.S | re.M)
]
KEY = "first-key-1234"


def test_every_setting_exists() -> None:
    """Those of the service, and the two of docker/caddy/Caddyfile."""
    known = {variable(name) for name in Settings.model_fields}
    caddy = set(re.findall(r"\{\$(\w+):", (ROOT / "docker" / "caddy" / "Caddyfile").read_text()))

    assert caddy == {"KLEIN_SITE", "KLEIN_UPSTREAM"}
    assert set(re.findall(r"\bKLEIN_\w+", PAGE)) <= known | caddy


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_block_is_accepted(block, tmp_path) -> None:
    """As it stands, but for where the keys are."""
    file = tmp_path / "keys"
    file.write_text(KEY)
    if "KLEIN_API_KEYS_FILE" in block:
        block = block | {"KLEIN_API_KEYS_FILE": str(file)}

    assert Settings.read(block)


async def test_the_proxys_block_makes_its_name_known_and_its_links_right(serve) -> None:
    """Nothing else is needed, as the page says."""
    (block,) = [each for each in BLOCKS if "KLEIN_PUBLIC_URL" in each]
    client = await serve(
        trusted_proxies=(block["KLEIN_TRUSTED_PROXIES"],), public_url=block["KLEIN_PUBLIC_URL"]
    )
    response = await client.post(
        "/v1/images/generations",
        json={"prompt": "a", "response_format": "url"},
        headers={
            "host": "pictures.example",
            "origin": "https://pictures.example",
            "x-forwarded-host": "pictures.example",
            "x-forwarded-proto": "https",
            "x-forwarded-for": "203.0.113.9",
        },
    )

    assert response.status_code == 200
    assert response.json()["data"][0]["url"].startswith("https://pictures.example/v1/")


@pytest.mark.parametrize(
    ("address", "settings"),
    [
        ("192.168.1.20:8000", {}),
        ("gpu.lan:8000", {"allowed_hosts": ("gpu.lan",)}),
        ("gpu.lan:8000", {"api_keys": (KEY,)}),
        ("host.docker.internal:8000", {}),
        ("host.containers.internal:8000", {}),
        ("klein:8000", {"allowed_hosts": ("klein",)}),
        ("pictures.example", {"public_url": "https://pictures.example"}),
    ],
)
async def test_each_address_of_the_table_is_answered(serve, address, settings) -> None:
    """With what the table says, and `compose.yaml` sets, for it."""
    client = await serve(**settings)
    headers = {"host": address, "api-key": KEY}

    assert f"//{address}/v1" in PAGE
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
