"""The service behind nginx and Caddy with the files in docker/: TLS, events, cancel, uploads."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.proxies import free_port, nginx_command, replaced, wait_until
from tests.support.server import ROOT, Server

pytestmark = pytest.mark.system

RATE = 20
SMALL = {"prompt": "a fox", "size": "64x64"}
CADDY = """{{
    admin off
    skip_install_trust
    http_port {plain}
    default_bind 127.0.0.1
}}
import {file}
"""


@dataclass
class Site:
    """A proxy that answers at *url*, and the service behind it."""

    url: str
    plain_url: str
    certificate: Path
    service: Server
    trace: Path
    gate: Path

    @contextmanager
    def client(self, address: str = "127.0.0.2") -> Iterator[httpx.Client]:
        """A caller at an address of its own, which is not the proxy's."""
        trust = ssl.create_default_context(cafile=self.certificate)
        transport = httpx.HTTPTransport(verify=trust, local_address=address)
        with httpx.Client(base_url=self.url, transport=transport, timeout=60) as client:
            yield client


def speaks_tls(port: int, certificate: Path) -> bool:
    """Whether it shows a certificate: Caddy listens before its authority has signed one."""
    with contextlib.suppress(OSError):
        trust = ssl.create_default_context(cafile=str(certificate))
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            trust.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    return False


def nginx(folder: Path, port: int, plain: int, upstream: str) -> tuple[list[str], Path]:
    """The file in docker/ with another name, ports and certificate."""
    pair = ("-keyout", folder / "key", "-out", folder / "crt")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    subprocess.run(
        ["openssl", "req", "-x509", *kind, *names, *pair], check=True, capture_output=True
    )
    changes = {
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/nginx/tls/pictures.example.": f"{folder}/",
        "pictures.example": "localhost",
        "127.0.0.1:8000": upstream,
    }
    file = (ROOT / "docker" / "nginx" / "klein.conf").read_text()
    (folder / "klein.conf").write_text(replaced(file, **changes))
    return nginx_command(folder, folder / "klein.conf"), folder / "crt"


def caddy(folder: Path, port: int, plain: int, upstream: str) -> tuple[list[str], Path]:
    """The file in docker/ as it is; its certificate is signed by Caddy's own authority."""
    file = ROOT / "docker" / "caddy" / "Caddyfile"
    (folder / "Caddyfile").write_text(CADDY.format(plain=plain, file=file))
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    return command, folder / "data" / "caddy" / "pki" / "authorities" / "local" / "root.crt"


@pytest.fixture(scope="module", params=[nginx, caddy], ids=["nginx", "caddy"])
def site(request, tmp_path_factory) -> Iterator[Site]:
    """One proxy after the other, in front of a service with scripted pictures."""
    name = request.param.__name__
    if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin"):
        pytest.fail(f"{name} is missing; run `make test-system`, which installs it")
    folder = tmp_path_factory.mktemp(name)
    folder.chmod(0o755)
    trace, gate = folder / "trace", folder / "gate"
    gate.touch()
    settings = {"model": "flux.2-klein-4b", "device": "cpu", "trusted_proxies": "127.0.0.1"}
    settings |= {"rate_limit_per_minute": RATE}
    words = (f"trace={trace}", f"gate={gate}")
    with Server(*words, module="tests.support.scripted_engine", **settings) as service:
        port, plain = free_port(), free_port()
        upstream = service.url.removeprefix("http://")
        command, certificate = request.param(folder, port, plain, upstream)
        environ = os.environ | {
            "PATH": os.environ["PATH"] + ":/usr/sbin",
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "KLEIN_SITE": f"localhost:{port}",
            "KLEIN_UPSTREAM": upstream,
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environ, stderr=log, stdout=log, cwd=folder)
        try:
            wait_until(lambda: speaks_tls(port, certificate))
            urls = f"https://localhost:{port}", f"http://localhost:{plain}"
            yield Site(*urls, certificate, service, trace, gate)
        finally:
            process.terminate()
            process.wait(20)


def traced(site: Site) -> str:
    """What the engine has noted so far."""
    return site.trace.read_text() if site.trace.exists() else ""


def test_a_picture_comes_through(site) -> None:
    """Over TLS, also for the service's own page, whose origin has another scheme here."""
    own = {"origin": site.url, "sec-fetch-site": "same-origin"}
    foreign = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    with site.client() as client:
        made = client.post("/v1/images/generations", json=SMALL, headers=own)
        refused = client.post("/v1/images/generations", json=SMALL, headers=foreign)

        assert client.get("/").text.startswith("<!doctype html>")
    assert (made.status_code, refused.status_code) == (200, 403)
    assert made.headers["x-request-id"]


def test_caddy_speaks_http2_with_callers(site) -> None:
    """And HTTP/1.1 with the service; nginx's file leaves it off."""
    command = ["curl", "--http2", "--silent", "--cacert", str(site.certificate), "--max-time", "20"]
    command += ["--output", os.devnull, "--write-out", "%{http_version} %{http_code}"]
    command += ["--json", '{"prompt": "a", "size": "64x64"}', f"{site.url}/v1/images/generations"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ran.stdout == ("2 200" if site.certificate.name == "root.crt" else "1.1 200")


def test_links_lead_back_through_the_proxy(site) -> None:
    """With https, the name and the port that the caller used."""
    with site.client() as client:
        made = client.post("/v1/images/generations", json={**SMALL, "response_format": "url"})
        url = made.json()["data"][0]["url"]

        assert url.startswith(f"{site.url}/v1/images/files/")
        assert client.get(url).content.startswith(b"\x89PNG")
        assert client.head(url).headers["content-type"] == "image/png"
        assert client.get("/models").json()["error"]["message"].count(f"{site.url}/v1") == 1


def test_plain_http_is_sent_to_tls_with_its_body(site) -> None:
    """By a redirect that keeps method and body."""
    answer = httpx.post(f"{site.plain_url}/v1/images/generations", json=SMALL)

    assert answer.status_code == 308
    assert answer.headers["location"].startswith("https://localhost")
    assert answer.headers["location"].endswith("/v1/images/generations")


def test_events_are_not_held_back(site) -> None:
    """What stands in the queue is told before the picture is begun."""
    site.gate.unlink()
    body = {**SMALL, "stream": True, "partial_images": 1}
    with site.client() as client, client.stream("POST", "/v1/images/generations", json=body) as it:
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
    site.gate.unlink()
    try:
        before = traced(site).count("stopped")
        body = {**SMALL, "stream": is_stream}
        with site.client() as client:
            if is_stream:
                with client.stream("POST", "/v1/images/generations", json=body) as answer:
                    lines = answer.iter_lines()  # which, once it is gone, ends the request
                    next(lines)
                    wait_until(lambda: site.service.metric("klein_requests_running") == 1)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/images/generations", json=body, timeout=3)
        wait_until(lambda: traced(site).count("stopped") == before + 1)
    finally:
        site.gate.touch()


def test_sixty_megabytes_come_through(site) -> None:
    """Four photographs that nothing compresses; more than is allowed is refused."""
    side = 2220
    files = [("prompt", (None, "winter")), ("size", (None, "64x64"))]
    for number in range(4):
        file = io.BytesIO()
        noise = Image.frombytes("RGB", (side, side), os.urandom(side * side * 3))
        noise.save(file, "PNG", compress_level=0)
        files.append(("image", (f"{number}.png", file.getvalue(), "image/png")))
    size = sum(len(content) for _, (_, content, *_) in files)
    with site.client() as client:
        made = client.post("/v1/images/edits", files=files)
        huge = client.post("/v1/images/edits", files=[*files, files[-1]])

    assert 58e6 < size < 62e6
    assert made.status_code == 200, made.text
    assert huge.status_code == 413


def test_each_caller_is_a_client_of_its_own(site) -> None:
    """By the address that the proxy saw, whatever the caller says; one that has asked too often
    takes nothing from another.
    """
    statuses = []
    with site.client("127.0.0.3") as client:
        for number in range(RATE + 1):
            said = {"x-forwarded-for": f"203.0.113.{number}"}
            answer = client.post("/v1/images/generations", json=SMALL, headers=said)
            statuses.append(answer.status_code)
    with site.client("127.0.0.4") as client:
        statuses.append(client.post("/v1/images/generations", json=SMALL).status_code)

    assert statuses == [200] * RATE + [429, 200]


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "//metrics//"]
)
def test_the_scrape_is_not_for_the_public(site, path) -> None:
    """In no spelling that the service would answer."""
    assert site.service.get("/metrics/")[0] == 200
    host, port = site.url.removeprefix("https://").split(":")
    trust = ssl.create_default_context(cafile=site.certificate)
    with (
        socket.create_connection(("127.0.0.1", int(port))) as plain,
        trust.wrap_socket(plain, server_hostname=host) as connection,
    ):
        line = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        connection.sendall(line.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))

    assert answer.split()[1] in {b"404", b"308", b"301"}
    assert b"klein_" not in answer
