"""The clients themselves, as PyPI and npm have them, against a live service."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.api.pictures import mask, photo

pytestmark = pytest.mark.system

HERE = Path(__file__).parent / "packages"
PYTHON = ("litellm==1.83.0", "langchain-community==0.4.2")
NODE = (
    "openai@6.49.0",
    "ai@6.0.326",
    "@ai-sdk/openai@3.0.141",
    "@ai-sdk/openai-compatible@2.0.91",
    "@langchain/openai@1.5.8",
    "@langchain/core@1",
)
SIX_MINUTES = 360


def call(*command: object, cwd: Path) -> str:
    """Run a command and return what it printed."""
    run = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SIX_MINUTES,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

    return run.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture and a mask for it."""
    folder = tmp_path_factory.mktemp("clients")
    (folder / "picture.png").write_bytes(photo())
    (folder / "mask.png").write_bytes(mask())
    return folder


@pytest.fixture(scope="module")
def from_python(files: Path, live_scripted) -> dict:
    """What the Python clients got."""
    call(sys.executable, "-m", "venv", "python", cwd=files)
    python = files / "python" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PYTHON, cwd=files)
    script = HERE / "python_clients.py"
    url = live_scripted.url + "/v1"
    return json.loads(call(python, script, url, "picture.png", "mask.png", cwd=files))


@pytest.fixture(scope="module")
def from_node(files: Path, live_scripted) -> dict:
    """What the clients on Node got."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.fail("npm and node are needed; install Debian's nodejs and npm")
    shutil.copy(HERE / "node_clients.mjs", files)
    call(npm, "install", "--silent", "--no-fund", "--no-audit", *NODE, cwd=files)
    url = live_scripted.url + "/v1"
    return json.loads(call(node, "node_clients.mjs", url, "picture.png", "mask.png", cwd=files))


def size(text: str) -> tuple[int, int]:
    """Decode base64 as strictly as can be."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).size


def fetch(url: str) -> str:
    """Follow a link without a key and return its type."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.headers["content-type"]


def test_litellm_generates_edits_and_is_refused(from_python):
    """Two pictures, one edit, and our own sentence in its error."""
    assert [size(each) for each in from_python["litellm_made"]] == [(256, 256), (256, 256)]
    assert [size(each) for each in from_python["litellm_edited"]] == [(128, 128)]
    assert "1008x1008" in from_python["litellm_refused"]


def test_langchains_wrapper_returns_links(from_python):
    """It reads nothing but `url`, and asks for nothing."""
    assert [fetch(url) for url in from_python["langchain_links"]] == ["image/png", "image/png"]


def test_openai_node_does_all_that_the_python_sdk_does(from_node):
    """Pictures, edits, streams, refusals, models."""
    got = from_node["openai"]

    assert got["seeds"] == [5, 6]
    assert [size(each) for each in got["made"]] == [(256, 256), (256, 256)]
    assert [size(each) for each in got["edited"]] == [(128, 128)]
    assert got["streamed"] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert got["streamedEdit"] == ["image_edit.completed"]
    assert got["refused"] == {"status": 400, "param": "size", "code": "invalid_value"}
    assert got["models"] == ["flux.2-klein-4b"]
    assert got["hub"] == "black-forest-labs/FLUX.2-klein-4B"


def test_the_vercel_sdk_gets_pictures_as_base64(from_node):
    """Three calls of one each differ; a seed travels; edits with a mask; OpenAI's names."""
    got = from_node["vercel"]

    assert len(set(got["made"])) == 3
    assert got["seeded"] == from_node["openai"]["made"][:1]
    assert [size(each) for each in got["edited"]] == [(128, 128)]
    assert len(got["alias"]) == 2


def test_langchain_js_returns_a_link(from_node):
    """Its own default."""
    assert fetch(from_node["langchain"]) == "image/png"
