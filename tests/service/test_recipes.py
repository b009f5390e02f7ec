"""Other programs read what is written into a picture: AUTOMATIC1111, and ComfyUI's front end."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from app.domain import ImageSpec, Lora, RawImage
from app.images import OutputFormat, encode
from app.service.recipes import write_recipe

READER = Path(__file__).with_name("comfyui_reader.mjs")
PROMPTS = (
    "a red circle",
    "ein Bär, 熊 and a 🐻",
    'one: "two", {three}\nSteps: 9\nNegative prompt: none',
    "{}",
)


def spec_of(prompt: str, *loras: Lora) -> ImageSpec:
    """An image of this prompt."""
    return ImageSpec(prompt, 512, 256, 4, 1.0, 7, loras=loras)


def png_of(spec: ImageSpec) -> bytes:
    """Its file, of one black pixel."""
    metadata = write_recipe(spec, "flux.2-klein-4b", {"precision": "fp8"})
    return encode(RawImage(1, 1, b"\0\0\0"), OutputFormat("png"), metadata)


@pytest.mark.parametrize("prompt", [*PROMPTS, "\0\x1b", "half: \ud83d", "x" * 32_000])
def test_the_recipe_has_the_prompt_as_it_was(prompt):
    """In a chunk that every reader of PNG understands, beside the one for AUTOMATIC1111."""
    texts = Image.open(io.BytesIO(png_of(spec_of(prompt)))).text

    assert set(texts) == {"parameters", "klein"}
    assert texts["klein"].isascii()
    assert json.loads(texts["klein"])["prompt"] == prompt


@pytest.mark.parametrize("prompt", PROMPTS)
def test_automatic1111_finds_the_settings(prompt):
    """Its last line has them as names with values, of which it wants three."""
    loras = Lora("ink", 0.5, "a" * 64, ""), Lora("oil", 1.0, "b" * 64, "")
    texts = Image.open(io.BytesIO(png_of(spec_of(prompt, *loras)))).text
    *lines, last = texts["parameters"].strip().split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))

    assert "\n".join(lines) == f"{prompt}\nNegative prompt: "
    assert found.pop("Version").startswith("klein-server ")
    assert found == {
        "Steps": "4",
        "Sampler": "Euler",
        "CFG scale": "1",
        "Seed": "7",
        "Size": "512x256",
        "Model": "flux.2-klein-4b",
        "Lora hashes": f'"ink: {"a" * 12}, oil: {"b" * 12}"',
    }


def test_no_chunk_is_named_as_comfyuis_graphs():
    """Its front end parses those as JSON."""
    names = re.findall(rb"[ti][ET]Xt(\w+)\0", png_of(spec_of("a red circle")))

    assert names == [b"parameters", b"klein"]


@pytest.mark.system
@pytest.mark.parametrize("prompt", PROMPTS)
def test_comfyuis_front_end_opens_it(prompt, tmp_path):
    """And fills in prompt, seed, steps and size."""
    node = shutil.which("node")
    assert node, "node is needed; install Debian's nodejs"
    (tmp_path / "a.png").write_bytes(png_of(spec_of(prompt)))
    words = [node, str(READER), str(tmp_path / "a.png")]
    said = subprocess.run(words, capture_output=True, check=True, timeout=30, text=True).stdout

    assert json.loads(said) == {
        "positive": prompt,
        "negative": "",
        "seed": 7,
        "steps": 4,
        "width": 512,
        "height": 256,
    }
