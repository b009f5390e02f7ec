"""`response_format=url`: pictures behind links, in memory, bounded, gone after a while."""

from __future__ import annotations

import re
import time

import pytest

from app.api.openai.image_store import ImageStore
from tests.api.conftest import error_of
from tests.support.timing import TIMED

ROUTE = "/v1/images/generations"


class Clock:
    """A clock that goes when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    """The time, for the test to move."""
    return Clock()


def put(links: ImageStore, size: int = 10, *, client: str = "a") -> str:
    return links.put(b"x" * size, format="png", media_type="image/png", client=client)


def kept(links: ImageStore, names: list[str]) -> list[bool]:
    """Which of them are still there."""
    return [links.get(name) is not None for name in names]


def test_a_link_is_found_until_its_time_is_over(clock):
    """And not a second longer."""
    links = ImageStore(lifetime_s=60, clock=clock)
    name = put(links)
    clock.now = 59.9

    assert links.get(name) is not None

    clock.now = 60.0

    assert links.get(name) is None
    assert repr(links) == "<ImageStore: 0 links, 0 bytes>"


@pytest.mark.parametrize("limits", [{"max_bytes": 25}, {"max_count": 2}])
def test_the_oldest_goes_when_there_is_no_room(clock, limits):
    """Whether it is bytes or number that run out."""
    links = ImageStore(lifetime_s=60, clock=clock, **limits)
    names = [put(links) for _ in range(3)]

    assert [links.get(name) is not None for name in names] == [False, True, True]
    assert repr(links) == "<ImageStore: 2 links, 20 bytes>"


@pytest.mark.parametrize("limits", [{"max_bytes": 256}, {"max_count": 25}])
def test_large_pictures_of_one_client_drive_out_nobody_elses(clock, limits):
    """Its newest drive out its own oldest, and a quarter is left to the others."""
    links = ImageStore(lifetime_s=60, clock=clock, **limits)
    others = [put(links, client="b"), put(links, client="c")]
    flood = [put(links, client="a") for _ in range(100)]
    most = 19 if "max_bytes" in limits else 18

    assert kept(links, others) == [True, True]
    assert kept(links, flood) == [False] * (100 - most) + [True] * most


def test_who_was_alone_makes_room_for_the_next(clock):
    """Alone a client has all of it; with others it has three quarters, then an equal part."""
    links = ImageStore(lifetime_s=60, clock=clock, max_count=16)
    first = [put(links, client="a") for _ in range(16)]

    assert all(kept(links, first))

    second = [put(links, client="b")]
    assert sum(kept(links, first)) == 12

    second += [put(links, client="b") for _ in range(7)]
    assert (sum(kept(links, first)), sum(kept(links, second))) == (8, 8)

    third = [put(links, client="c") for _ in range(30)]
    assert sorted(sum(kept(links, each)) for each in (first, second, third)) == [5, 5, 6]


@TIMED
def test_room_is_made_at_the_same_cost_however_many_have_links(clock, is_timed: bool):
    """A large picture drives out thousands of small ones of thousands of clients, within a tenth
    of a second of computing."""
    links = ImageStore(lifetime_s=60, clock=clock, max_bytes=20_000, max_count=2_000)
    before = time.thread_time()
    names = [put(links, client=str(number)) for number in range(2_000)]
    put(links, 15_000, client="a")

    assert not is_timed or time.thread_time() - before < 0.1
    assert sum(kept(links, names)) == 500


def test_what_is_too_old_counts_for_nobody(clock):
    """A client whose links have expired is no one to leave room to."""
    links = ImageStore(lifetime_s=60, clock=clock, max_count=4)
    put(links, client="b")
    clock.now = 60.0
    names = [put(links, client="a") for _ in range(4)]

    assert all(kept(links, names))
    assert repr(links) == "<ImageStore: 4 links, 40 bytes>"


async def test_links_are_counted_by_who_asked(serve):
    """The key's holder, not the address that a thousand share."""
    client = await serve(api_keys=("first-key-1234", "second-key-5678"))
    for key in ("first-key-1234", "second-key-5678"):
        body = {"prompt": "a", "response_format": "url"}
        url = (await client.post(ROUTE, json=body, headers={"api-key": key})).json()
        assert (await client.get(url["data"][0]["url"])).status_code == 200


async def test_a_link_leads_to_the_picture(client):
    """Absolute, without a key, with the type that Open WebUI checks."""
    body = (
        await client.post(ROUTE, json={"prompt": "a", "n": 2, "response_format": "url", "seed": 3})
    ).json()
    urls = [item["url"] for item in body["data"]]

    assert [{"url", "seed"}] * 2 == [set(item) for item in body["data"]]
    assert len(set(urls)) == 2
    for url in urls:
        assert re.fullmatch(r"http://127\.0\.0\.1:8000/v1/images/files/[0-9a-f]{32}\.png", url)
        picture = await client.get(url)

        assert picture.content.startswith(b"\x89PNG")
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["cache-control"] == "private, max-age=3600"


async def test_an_expired_link_is_an_error_object(serve, clock):
    """404, like a link that never was."""
    client = await serve(link_lifetime_s=30.0, clock=clock)
    body = {"prompt": "a", "response_format": "url"}
    url = (await client.post(ROUTE, json=body)).json()["data"][0]["url"]

    assert (await client.get(url)).headers["cache-control"] == "private, max-age=30"

    clock.now = 31.0
    for address in (url, "/v1/images/files/nothing.png", "/v1/images/files/..%2fx"):
        response = await client.get(address)

        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_url"


async def test_a_link_needs_neither_key_nor_known_host(serve):
    """The picture is for whoever got the link, under the name that the key made good."""
    client = await serve(api_keys=("first-key-1234",))
    headers = {"api-key": "first-key-1234", "host": "gpu.example:8000"}
    body = {"prompt": "a", "response_format": "url"}
    url = (await client.post(ROUTE, json=body, headers=headers)).json()["data"][0]["url"]

    assert url.startswith("http://gpu.example:8000/v1/images/files/")
    assert (await client.get(url)).status_code == 200


async def test_the_public_address_starts_the_links(serve):
    """`KLEIN_PUBLIC_URL`, whose host is known from then on."""
    client = await serve(public_url="https://pictures.example/klein/")
    body = {"prompt": "a", "response_format": "url"}
    url = (await client.post(ROUTE, json=body)).json()["data"][0]["url"]

    assert url.startswith("https://pictures.example/klein/v1/images/files/")
    assert (await client.get("/v1/models", headers={"host": "pictures.example"})).status_code == 200


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ({"model": "dall-e-2"}, "url"),
        ({"model": "dall-e-3"}, "url"),
        ({"model": "dall-e-3", "response_format": "b64_json"}, "b64_json"),
        ({"model": "gpt-image-1"}, "b64_json"),
        ({}, "b64_json"),
    ],
    ids=str,
)
async def test_the_default_follows_the_name_of_the_model(client, sent, key):
    """DALL-E answered with links; LangChain's wrapper reads nothing else."""
    (item,) = (await client.post(ROUTE, json={"prompt": "a", **sent})).json()["data"]

    assert {key, "seed"} == set(item)


async def test_links_can_be_switched_off(serve, service):
    """`KLEIN_IMAGE_URLS=false`: refused by name, and DALL-E's default is base64 too."""
    client = await serve(image_urls=False)
    refused = await client.post(ROUTE, json={"prompt": "a", "response_format": "url"})

    assert error_of(refused)["param"] == "response_format"
    assert not service.tickets

    (item,) = (await client.post(ROUTE, json={"prompt": "a", "model": "dall-e-2"})).json()["data"]

    assert "b64_json" in item
