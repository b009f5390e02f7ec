"""The clients themselves, as PyPI and npm have them, against a live service."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from tests.api.pictures import mask, photo
from tests.support import packages
from tests.support.server import ROOT

pytestmark = pytest.mark.system

HERE = Path(__file__).parent / "packages"
PYTHON = ("litellm[proxy]==1.83.0", "langchain-community==0.4.2", "semantic-kernel==1.45.0")
NODE = (
    "openai@6.49.0",
    "ai@6.0.326",
    "@ai-sdk/openai@3.0.141",
    "@ai-sdk/openai-compatible@2.0.91",
    "@langchain/openai@1.5.8",
    "@langchain/core@1",
)
SIX_MINUTES = 360


def call(*command: object, cwd: Path, **environ: str) -> str:
    """Run a command, with *environ* set beside what is, and return what it printed."""
    run = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=SIX_MINUTES,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

    return run.stdout


@contextlib.contextmanager
def installing() -> Iterator[None]:
    """A registry that fails or is slow is named as the cause."""
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired) as error:
        pytest.fail(f"The packages were not installed; this tells nothing of the service: {error}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture and a mask for it."""
    folder = tmp_path_factory.mktemp("clients")
    (folder / "picture.png").write_bytes(photo())
    (folder / "mask.png").write_bytes(mask())
    return folder


@pytest.fixture(scope="module")
def python(files: Path) -> Path:
    """The folder of an environment with the Python clients."""
    venv.create(files / "python", with_pip=False)
    programs = files / "python" / "bin"
    with installing():
        packages.install(*PYTHON, python=programs / "python")
    return programs


@pytest.fixture(scope="module")
def from_python(files: Path, python: Path, live_scripted) -> dict:
    """What the Python clients got."""
    script = HERE / "python_clients.py"
    url = live_scripted.url + "/v1"
    return json.loads(call(python / "python", script, url, "picture.png", "mask.png", cwd=files))


@pytest.fixture(scope="module")
def proxy(files: Path, python: Path, live_scripted) -> Iterator[OpenAI]:
    """A client of LiteLLM's proxy, which runs with the file of docs/clients.md."""
    (config,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.S)
    file = files / "litellm.yaml"
    file.write_text(config.replace("http://127.0.0.1:8000", live_scripted.url))
    command = (python / "litellm", "--config", file, "--host", "127.0.0.1", "--port", "0")
    # Else it asks GitHub for the prices of models.
    environ = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with subprocess.Popen(
        [str(each) for each in command],
        cwd=files,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        late = threading.Timer(90, process.kill)
        late.start()
        try:
            assert process.stdout
            started = re.compile(r"running on (http://\S+) ")
            found = next(filter(None, map(started.search, process.stdout)), None)
            late.cancel()
            assert found, "LiteLLM's proxy did not start"
            with OpenAI(base_url=found[1] + "/v1", api_key="any", max_retries=0) as client:
                yield client
        finally:
            late.cancel()
            process.terminate()


@pytest.fixture(scope="module")
def from_node(files: Path, live_scripted) -> dict:
    """What the clients on Node got."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.fail("npm and node are needed; install Debian's nodejs and npm")
    shutil.copy(HERE / "node_clients.mjs", files)
    with installing():
        call(npm, "install", "--silent", "--no-fund", "--no-audit", *NODE, cwd=files)
    url = live_scripted.url + "/v1"
    return json.loads(call(node, "node_clients.mjs", url, "picture.png", "mask.png", cwd=files))


def size(text: str) -> tuple[int, int]:
    """Decode base64 as strictly as can be."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).size


def test_openai_pythons_newest_passes_what_the_locked_one_does(files):
    """The same tests, with whatever PyPI has today before what the lock installed."""
    newest = files / "newest"
    with installing():
        packages.install("--target", newest, "openai")
    kept = "import openai; print(openai.__file__)"
    names = ("tests/api/test_openai_sdk.py", "tests/api/test_openai_sdk_live.py")
    run = ("-m", "pytest", "-p", "no:cacheprovider", "-m", "not full", "-n0", *names)
    searched = {"PYTHONPATH": str(newest)}

    assert call(sys.executable, "-c", kept, cwd=ROOT, **searched).startswith(str(newest))
    call(sys.executable, *run, cwd=ROOT, **searched)


def test_litellm_generates_edits_and_is_refused(from_python):
    """Two pictures, one edit, and our own sentence in its error."""
    assert [size(each) for each in from_python["litellm_made"]] == [(256, 256), (256, 256)]
    assert [size(each) for each in from_python["litellm_edited"]] == [(128, 128)]
    assert "1008x1008" in from_python["litellm_refused"]


def test_langchains_wrapper_returns_links(from_python):
    """It reads nothing but `url`, and asks for nothing."""
    assert from_python["langchain_links"] == ["image/png", "image/png"]


def test_semantic_kernel_generates_and_edits(from_python):
    """Two pictures of the size it was told, and an edit of a file."""
    assert [size(each) for each in from_python["kernel_made"]] == [(256, 256), (256, 256)]
    assert [size(each) for each in from_python["kernel_edited"]] == [(128, 128)]


def test_litellms_proxy_passes_requests_on(proxy):
    """With its own name for the model, and our fields; what we refuse it refuses with our words."""
    asked = {"model": "klein", "prompt": "a"}
    made = proxy.images.generate(**asked, n=2, size="256x256", extra_body={"seed": 5})
    again = proxy.images.generate(**asked, size="256x256", extra_body={"seed": 5})
    picture, layer = ("a.png", photo()), ("mask.png", mask())
    edited = proxy.images.edit(**asked, image=picture, mask=layer)
    with pytest.raises(BadRequestError, match="1008x1008"):
        proxy.images.generate(**asked, size="1000x1000")

    assert [size(item.b64_json) for item in made.data] == [(256, 256), (256, 256)]
    assert again.data[0].b64_json == made.data[0].b64_json
    assert [size(item.b64_json) for item in edited.data] == [(128, 128)]


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
    assert from_node["langchain"] == "image/png"
