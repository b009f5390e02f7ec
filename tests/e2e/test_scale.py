"""Three services behind HAProxy and nginx with the files in docker/scale/: what is lost when.

docs/scale.md has the table that `test_the_table_of_deaths` measures, cell by cell.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.chaos import Answer, ask, request_bytes
from tests.support.greedy import ASKS, KEYS, PICTURE_S, SMALL, beside_greedy
from tests.support.proxies import PAGE, PATH, SCALE, Site, behind, held_by, replaced, wait_until

pytestmark = pytest.mark.system

PROXIES = pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
# So that what is measured is the time before a check has noticed, however slow the machine is; and
# that "early" and "late" do not depend on it either.
UNNOTICED = {"inter 1s fastinter 200ms": "inter 60s fastinter 60s"}
EARLY = {"proxy_next_upstream_timeout 2s": "proxy_next_upstream_timeout 60s"}
LATE = {"proxy_next_upstream_timeout 2s": "proxy_next_upstream_timeout 100ms"}


def edit() -> dict[str, object]:
    """A request with a picture that is larger than HAProxy's buffer."""
    file = io.BytesIO()
    Image.frombytes("RGB", (128, 128), os.urandom(128 * 128 * 3)).save(file, "png")
    return {**SMALL, "images": [base64.b64encode(file.getvalue()).decode()]}


KINDS: dict[str, Callable[[], dict[str, object]]] = {"generation": SMALL.copy, "edit": edit}


class Requests:
    """Sends requests to a site, each once the one before is held by a service or answered."""

    def __init__(self, site: Site, kind: str) -> None:
        self.site = site
        self.data = request_bytes("/generate", KINDS[kind]())
        assert (len(self.data) > 16_384) is (kind == "edit")

    async def send(self, count: int) -> list[asyncio.Task[Answer]]:
        """Send so many; each is answered, or held by a service, before the next."""
        tasks = []
        for _ in range(count):
            before = self.site.held()
            tasks.append(asyncio.create_task(ask(self.site.port, self.data)))
            await until(lambda task=tasks[-1], held=before: task.done() or self.site.held() > held)
        return tasks


async def until(holds: Callable[[], object]) -> None:
    """Let the requests go on until it holds."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


def word(answer: Answer) -> str:
    """What one caller got; every 502 and 503 says when to ask again."""
    if answer.status in {502, 503}:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    return f"{answer.status} {answer.code}".strip()


async def worst(tasks: list[asyncio.Task[Answer]]) -> str:
    """What one of these got that got no picture; all such got the same. 200 where all got one."""
    words = {word(await task) for task in tasks} - {"200"}
    assert len(words) < 2, words
    return f"`{words.pop() if words else 200}`"


def kill_idle(site: Site) -> None:
    """The first service is killed."""
    kill_service(site)


def kill_service(site: Site) -> None:
    """With SIGKILL, as the kernel does where memory is short."""
    site.services[0].process.kill()
    site.services[0].process.wait(20)


def kill_all(site: Site) -> None:
    """All three are killed."""
    for service in site.services:
        service.process.kill()
        service.process.wait(20)


def kill_worker(site: Site) -> None:
    """The first service's worker is killed; it takes a while to be replaced."""
    service = site.services[0]
    os.kill(service.worker_pid(), signal.SIGKILL)
    wait_until(lambda: service.get("/health/ready")[0] == 503)


def stop_service(site: Site) -> None:
    """The first service is told to stop, and finishes what it has."""
    site.services[0].process.send_signal(signal.SIGTERM)
    wait_until(lambda: site.services[0].get("/health/ready")[0] == 503)


def nothing(site: Site) -> None:
    """Nobody dies; the queues are full."""


ROWS: dict[str, tuple[Callable[[Site], None], int, dict[str, str]]] = {
    "a service is killed while it is idle": (kill_idle, 0, {}),
    "a service is killed, its requests less than 2 s old": (kill_service, 1, EARLY),
    "a service is killed, its requests older": (kill_service, 1, LATE),
    "a service's worker is killed": (kill_worker, 1, {}),
    "a service is told to stop (SIGTERM)": (stop_service, 1, {}),
    "all queues are full": (nothing, 2, {}),
    "all services are killed": (kill_all, 0, {}),
}
"""What happens, how many requests wait in each queue then (none: all are idle), and what of the
proxy's file is changed so that the row holds on a slow machine."""
CASES = [(row, proxy, kind) for row in ROWS for proxy in ("haproxy", "nginx") for kind in KINDS]


@pytest.mark.parametrize(("row", "proxy", "kind"), CASES, ids=[" ".join(case) for case in CASES])
def test_the_table_of_deaths(row, proxy, kind, tmp_path) -> None:
    """Each row of the page's table: what becomes of the picture that is made there, of one that
    waits there, and of those that come before the proxy's check has noticed."""
    happen, waiting, changes = ROWS[row]
    file_changes = UNNOTICED if proxy == "haproxy" else changes
    words = ("load=1",) if happen is kill_worker else ()
    places = 2 if happen is nothing else 8
    with behind(proxy, tmp_path, words, file_changes, queue_images=places) as site:
        found = asyncio.run(measured(site, kind, happen, waiting))

    assert row_of_page(row, proxy, kind) == found


async def measured(
    site: Site, kind: str, happen: Callable[[Site], None], waiting: int
) -> list[str]:
    """The cells of one row."""
    requests = Requests(site, kind)
    made, queued = [], []
    if waiting:
        site.gate.unlink()
        made = await requests.send(3)
        assert [held_by(service) for service in site.services] == [1, 1, 1]
        queued = await requests.send(3 * waiting)
        assert [held_by(service) for service in site.services] == [1 + waiting] * 3
        await asyncio.sleep(0.2 if happen is kill_service else 0)  # older than LATE
    await asyncio.to_thread(happen, site)
    await until(lambda: site.held() or happen in {kill_all, kill_idle})
    coming = await requests.send(4)
    site.gate.touch()
    cells = [await worst(tasks) if tasks else "" for tasks in (made, queued)]
    lost = [task for task in (*made, *queued) if word(task.result()) != "200"]
    assert len(lost) <= 1 + waiting  # never anything of another service
    return [*cells, await worst(coming)]


def row_of_page(row: str, proxy: str, kind: str) -> list[str]:
    """The cells that the page has."""
    names = {"haproxy": "HAProxy", "nginx": "nginx"}
    wanted = [row, names[proxy], f"{kind}s"]
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:3] == wanted:
            return cells[3:]
    raise AssertionError(f"the page has no row {wanted}")


def test_the_page_has_no_other_rows() -> None:
    """One for each case."""
    rows = re.findall(r"^\| (a|all) .* \| (HAProxy|nginx) \|", PAGE.read_text(), re.M)

    assert len(rows) == len(CASES)


RATE = 20


def running(site: Site) -> float:
    """How many pictures are being made."""
    return sum(service.metric("klein_requests_running") for service in site.services)


@pytest.fixture(scope="module", params=["haproxy", "nginx"])
def site(request, tmp_path_factory) -> Iterator[Site]:
    """Three services that live on from test to test."""
    folder = tmp_path_factory.mktemp(request.param)
    words = (f"trace={folder / 'trace'}",)
    with behind(request.param, folder, words, rate_limit_per_minute=RATE) as found:
        yield found


def test_requests_are_spread(site) -> None:
    """Of six at once each service gets two."""
    site.gate.unlink()

    async def run() -> list[Answer]:
        tasks = await Requests(site, "generation").send(6)
        assert [held_by(service) for service in site.services] == [2, 2, 2]
        site.gate.touch()
        return [await task for task in tasks]

    assert [answer.status for answer in asyncio.run(run())] == [200] * 6


def test_events_are_not_held_back(site) -> None:
    """What stands in the queue is told before the picture is begun."""
    site.gate.unlink()
    body = {"prompt": "a fox", "size": "64x64", "stream": True, "partial_images": 1}
    url = f"{site.url}/v1/images/generations"
    with httpx.stream("POST", url, json=body, timeout=20) as it:
        lines = it.iter_lines()
        first = next(lines)
        site.gate.touch()
        rest = list(lines)

    assert it.headers["content-type"].startswith("text/event-stream")
    assert first.startswith(":")
    assert "event: image_generation.completed" in rest


@pytest.mark.parametrize("is_stream", [True, False], ids=["events", "waiting"])
def test_a_caller_who_leaves_ends_the_picture(site, is_stream) -> None:
    """The proxy passes it on, and the card is free."""
    trace = site.folder / "trace"
    stopped = lambda: trace.read_text().count("stopped") if trace.exists() else 0  # noqa: E731
    before = stopped()
    site.gate.unlink()
    url = f"{site.url}/v1/images/generations"
    body = {"prompt": "a fox", "size": "64x64", "stream": is_stream}
    try:
        if is_stream:
            with httpx.stream("POST", url, json=body, timeout=20) as answer:
                lines = answer.iter_lines()  # which, once it is gone, ends the request
                next(lines)
                wait_until(lambda: running(site) == 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=2)
        wait_until(lambda: stopped() == before + 1 and site.held() == 0)
    finally:
        site.gate.touch()


def test_links_lead_to_the_service_that_keeps_the_picture(site) -> None:
    """Under the proxy's address; through the proxy's common address only one in three would have
    it."""
    urls = []
    for _ in range(6):
        body = {"prompt": "a fox", "size": "64x64", "response_format": "url"}
        answer = httpx.post(f"{site.url}/v1/images/generations", json=body, timeout=20)
        urls.append(answer.json()["data"][0]["url"])

    assert {url.split("/")[3] for url in urls} == {"klein-0", "klein-1", "klein-2"}
    for url in urls:
        assert url.startswith(f"{site.url}/klein-")
        assert httpx.get(url).content.startswith(b"\x89PNG")


def test_each_caller_is_a_client_of_its_own(site) -> None:
    """By the address that the proxy saw, whatever the caller says; each service counts for itself,
    so a limit of 20 in a minute is one of 20 to 60."""
    made = 0
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3")) as client:
        for number in range(3 * RATE + 1):
            said = {"x-forwarded-for": f"203.0.113.{number}"}
            answer = client.post(f"{site.url}/generate", json=SMALL, headers=said)
            if answer.status_code != 200:
                break
            made += 1
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.4")) as client:
        other = client.post(f"{site.url}/generate", json=SMALL)

    assert (answer.status_code, other.status_code) == (429, 200)
    assert RATE <= made <= 3 * RATE


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "//metrics//", "/klein-0/metrics"]
)
def test_the_scrape_is_not_for_the_public(site, path) -> None:
    """In no spelling that a service would answer."""
    answer = httpx.get(f"{site.url}{path}")

    assert answer.status_code == 404
    assert "klein_" not in answer.text


def test_haproxy_takes_an_unready_service_out_and_in_again(tmp_path: Path) -> None:
    """Told to stop, a service finishes its picture, and 1.2 s later no edit is refused any more;
    one that is killed and started again gets requests at once."""
    with behind("haproxy", tmp_path) as site:
        edits = Requests(site, "edit")

        async def run() -> list[str]:
            site.gate.unlink()
            made = await edits.send(3)
            begun = time.monotonic()
            await asyncio.to_thread(stop_service, site)
            await until(lambda: site.states() == ["DOWN", "UP", "UP"])
            assert time.monotonic() - begun < 1.2 + 0.5
            coming = await edits.send(4)
            site.gate.touch()
            return [word(await task) for task in (*made, *coming)]

        assert asyncio.run(run()) == ["200"] * 7


def test_haproxy_takes_a_certificate(tmp_path: Path) -> None:
    """With the line for TLS uncommented, and one file for certificate and key."""
    pem = tmp_path / "site.pem"
    names = ("-subj", "/CN=localhost", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    kind = ("-nodes", "-days", "2", "-keyout", str(pem), "-out", str(tmp_path / "crt"))
    subprocess.run(["openssl", "req", "-x509", *names, *kind], check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "crt").read_text())
    text = replaced(
        (SCALE / "haproxy.cfg").read_text(),
        **{
            "# bind :8443": "bind 127.0.0.1:8443",
            "/etc/haproxy/site.pem": str(pem),
            **{f"klein-{number}:8000": f"127.0.0.1:{8001 + number}" for number in range(3)},
        },
    )
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    found = subprocess.run(
        ["haproxy", "-c", "-f", str(file)],
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stdout + found.stderr
    assert "warning" not in (found.stdout + found.stderr).lower()


@PROXIES
def test_a_stream_ends_with_its_service(proxy, tmp_path: Path) -> None:
    """Once events have come it is not begun anew elsewhere: the caller sees it cut off."""
    with behind(proxy, tmp_path) as site:
        site.gate.unlink()
        body = {"prompt": "a fox", "size": "64x64", "stream": True}
        url = f"{site.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            wait_until(lambda: site.held() == 1)
            (service,) = [each for each in site.services if held_by(each)]
            service.process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
            service.process.wait(20)

        assert site.held() == 0


@PROXIES
def test_each_replica_is_fair(proxy, tmp_path: Path) -> None:
    """Three services, a picture each 0.4 s by each: who asks politely is served beside 24 sockets
    that never stop, at the median within three pictures' time, its own included."""
    words, keys = (f"slow={PICTURE_S}",), ",".join(KEYS)
    with behind(proxy, tmp_path, words, queue_images=8, api_keys=keys) as site:
        polite, greedy = asyncio.run(beside_greedy(site.port))
    served = sorted(answer.seconds for answer in polite if answer.status == 200)

    assert {answer.status for answer in polite + greedy} <= {200, 503}
    assert len(served) >= ASKS - 1
    assert served[len(served) // 2] < 3 * PICTURE_S
