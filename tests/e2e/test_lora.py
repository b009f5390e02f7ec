"""Adapters over a real socket: found while the service runs, chosen per request, gone when gone."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from app.engine.adapters.shapes import linear_shapes
from app.engine.models.registry import find_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.torch]

BODY = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 3}
SEEN_S = 15.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    """The demo, whose folder of adapters is empty at first."""
    cache = tmp_path_factory.mktemp("cache")
    with Server(
        model="shapes", device="cpu", lora_dir=str(folder), cache_dir=str(cache)
    ) as running:
        running.wait_until_ready()
        yield running


def write(path: Path, seed: int) -> str:
    """Write an adapter at *path* as copies arrive, whole at once; return its hash."""
    from tests.engine.adapters import forge

    shapes = linear_shapes(find_model("shapes").architecture)
    pairs = {n: (down / 10, up / 3) for n, (down, up) in forge.draw(shapes, 4, seed).items()}
    hidden = path.with_name(f".{path.name}.part")
    forge.write(hidden, *forge.layouts(pairs, 4.0)["kohya"])
    hidden.replace(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listed(server: Server) -> dict[str, dict]:
    return {each["id"]: each for each in json.loads(server.get("/v1/loras")[2])["data"]}


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + SEEN_S
    while not is_so():
        assert time.monotonic() < end, "it was not seen in time"
        time.sleep(0.1)


def draw(server: Server, **changes) -> tuple[dict[str, str], np.ndarray, Image.Image]:
    status, headers, body = server.post("/generate", BODY | changes)
    assert status == 200, body
    image = Image.open(io.BytesIO(body))
    return headers, np.asarray(image), image


def test_an_adapter_is_found_used_replaced_and_forgotten(server, folder) -> None:
    """Without a restart; a request's adapters are its own, and its picture says which they were."""
    _, none, _ = draw(server, loras=[])
    first = write(folder / "My style.safetensors", 1)
    wait_for(lambda: "My-style" in listed(server))

    headers, one, image = draw(server, loras=[{"name": "My-style", "scale": 0.5}])
    recipe = f"My-style:0.5@{first}"
    assert headers["x-klein-loras"] == recipe
    assert json.loads(image.text["klein"])["loras"] == [
        {"name": "My-style", "scale": 0.5, "sha256": first}
    ]
    assert (one != none).any()
    assert (draw(server, loras=[])[1] == none).all()
    assert (draw(server, loras=[{"name": "My-style", "scale": 0}])[1] == none).all()
    assert (draw(server, loras=[{"name": "My-style", "scale": 0.5}])[1] == one).all()

    second = write(folder / "My style.safetensors", 2)
    wait_for(lambda: listed(server)["My-style"]["sha256"] == second)
    headers, other, _ = draw(server, loras=[{"name": "My-style", "scale": 0.5}])
    assert second in headers["x-klein-loras"]
    assert (other != one).any()

    (folder / "My style.safetensors").unlink()
    wait_for(lambda: "My-style" not in listed(server))
    status, _, body = server.post("/generate", BODY | {"loras": [{"name": "My-style"}]})
    assert status == 400
    assert json.loads(body)["error"]["param"] == "loras[0].name"


def test_any_openai_client_can_choose_one(server, folder) -> None:
    """As a model with a parent; an unknown one is a bad request there, and missing in the list."""
    sha256 = write(folder / "night.safetensors", 3)
    wait_for(lambda: "night" in listed(server))
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        models = {model.id: model for model in client.models.list()}
        made = client.images.generate(model="night", prompt="a red circle", size="128x128")

        assert models["night"].parent == "shapes"
        assert made.loras == [{"name": "night", "scale": 1.0, "sha256": sha256}]
        assert client.models.retrieve("night").id == "night"
        with pytest.raises(NotFoundError):
            client.models.retrieve("nigth")
        with pytest.raises(BadRequestError, match="`night`") as refused:
            client.images.generate(model="nigth", prompt="a red circle")
    assert refused.value.code == "model_not_found"


def test_files_that_cannot_be_used_are_told_of_and_do_no_harm(server, folder) -> None:
    """One for another model, one that is none: refused by name in the log, and not listed."""
    from tests.engine.adapters import forge

    shapes = linear_shapes(find_model("flux.2-klein-4b").architecture)
    name = "single_transformer_blocks.1.attn.to_out"
    pairs = forge.draw({name: shapes[name]}, 4)
    forge.write(folder / "large.safetensors", *forge.layouts(pairs, 4.0)["PEFT, named"])
    (folder / "text.safetensors").write_text("no safetensors")

    server.wait_for(r"large\.safetensors cannot be used as an adapter: it is for another model")
    server.wait_for(r"text\.safetensors cannot be used")

    assert not {"large", "text"} & listed(server).keys()
    assert draw(server)[0]["x-klein-seed"] == "3"
