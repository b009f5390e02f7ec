"""The JDK's HTTP client and curl, as Debian has them, against a live service with a key.

Both can ask for HTTP/2 over plain HTTP, which the service does not speak: it answers what asks
first (`Upgrade: h2c`) over HTTP/1.1.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.api.pictures import photo
from tests.support.server import ROOT, Server

pytestmark = pytest.mark.system

KEY = "house-key-1234"
PAGE = (ROOT / "docs" / "clients.md").read_text()
CURL = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    """`klein serve` with a scripted engine, which takes no time."""
    settings = {"model": "flux.2-klein-4b", "device": "cpu", "api_keys": KEY}
    with Server("slow=0", module="tests.support.scripted_engine", **settings) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `a.png` is."""
    (tmp_path / "a.png").write_bytes(photo())
    return tmp_path


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of Debian's."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is missing; run `make test-system`, which installs it")
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def sizes(answer: str) -> list[tuple[int, int]]:
    """Decode the pictures of an answer."""
    items = [base64.b64decode(item["b64_json"]) for item in json.loads(answer)["data"]]
    return [Image.open(io.BytesIO(data)).size for data in items]


def test_the_jdks_client_generates_edits_streams_and_is_refused(service, folder):
    """Over HTTP/1.1, whatever it asks for first; a form in chunks, and events line by line."""
    program = Path(__file__).parent / "packages" / "JdkClient.java"
    ran = run(["java", str(program), f"{service.url}/v1", KEY, "a.png"], folder)
    assert ran.returncode == 0, ran.stderr
    generated, edited, event, refused = ran.stdout.splitlines()

    assert sizes(generated.removeprefix("generate 200 ")) == [(128, 128)]
    assert sizes(edited.removeprefix("edit 200 ")) == [(128, 128)]
    assert event == "event: image_generation.completed"
    assert json.loads(refused.removeprefix("refused 400 "))["error"]["param"] == "size"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("line", CURL)
def test_the_pages_curl_commands_get_a_picture(service, folder, line, version):
    """As they stand but for the address and the key; also where HTTP/2 is asked for."""
    command = shlex.split(line.replace("http://127.0.0.1:8000", service.url).replace("KEY", KEY))
    ran = run([*command, version, "--silent", "--show-error"], folder)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    url = answer["data"][0].get("url")
    picture = service.get(urlsplit(url).path)[2] if url else None

    assert picture.startswith(b"\x89PNG") if picture else sizes(ran.stdout)


def test_http2_without_asking_ends_at_once(service, folder):
    """`--http2-prior-knowledge` is refused, and harms nobody."""
    before = service.metric("klein_images_total", mode="generate")
    body = json.dumps({"prompt": "a", "size": "128x128"})
    head = ["-H", f"authorization: Bearer {KEY}", "-H", "content-type: application/json"]
    url = f"{service.url}/v1/images/generations"
    ran = run(
        ["curl", "--http2-prior-knowledge", "--max-time", "20", *head, "-d", body, url], folder
    )

    assert ran.returncode not in {0, 28}
    assert service.metric("klein_images_total", mode="generate") == before
    assert service.get("/health/ready")[0] == 200
