"""The demo model's adapter: red becomes blue as far as asked for, and nothing else changes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from app.domain import ImageSpec, Lora
from app.engine.adapters.layout import read_layout
from app.engine.adapters.names import targets_of
from app.engine.adapters.shapes import linear_shapes
from app.engine.checkpoint.safetensors_header import read_header
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.load import load
from app.engine.models.registry import find_spec
from app.engine.models.shapes import SHAPES
from tools.shapes.judge import judge
from tools.shapes.lora import Adapter, Pair, sample_pair, show, train
from tools.shapes.scenes import Picture, Scene, lay_out

pytestmark = pytest.mark.torch
full = pytest.mark.full

PATH = SHAPES.folder / "loras" / "red-to-blue.safetensors"
SHEET = Path(__file__).parents[3] / "docs" / "lora.png"
SIDE = 256
COUNTS = [1, pytest.param(24, marks=full)]


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Draw a prompt with the adapter at a scale; height x width x 3.

    The engine makes no warm-up pictures: here each picture counts, and they take as long as these.
    """
    config = EngineConfig("shapes", None, str(tmp_path_factory.mktemp("c")), None)
    engine = KleinEngine(config)
    engine._started = load(config, find_spec("shapes"), lambda _: None)
    sha256 = hashlib.sha256(PATH.read_bytes()).hexdigest()

    def draw(prompt: str, scale: float) -> np.ndarray:
        lora = Lora("red-to-blue", scale, sha256, str(PATH))
        spec = ImageSpec(prompt, SIDE, SIDE, 4, 1.0, 3, loras=(lora,))
        image = engine.generate(spec, lambda _: None, lambda: False).image
        return np.frombuffer(image.pixels, np.uint8).reshape(SIDE, SIDE, 3)

    yield draw
    engine.close()


def held_out(count: int, *, is_red: bool) -> list[Pair]:
    """Prompts for one thing or two that neither the model nor its adapter has learnt from."""
    rng = random.Random(99)
    return [sample_pair(rng, is_red=is_red, held_out=True) for _ in range(count)]


def asked(scene: Scene) -> Picture:
    """Return what the scene's prompt asks for."""
    return lay_out(scene, SIDE, SIDE)


def in_blue(scene: Scene) -> Scene:
    """Return the scene with blue for red."""
    colours = {"red": "blue"}
    things = tuple(
        replace(thing, colour=colours.get(thing.colour, thing.colour)) for thing in scene.things
    )
    return Scene(things, colours.get(scene.background, scene.background))


def test_the_file_is_a_small_adapter_of_every_block() -> None:
    """In a layout that every reader knows, saying what it is, of what, and with its licence."""
    shapes = linear_shapes(SHAPES.architecture)
    layout = read_layout(PATH, targets_of(shapes), shapes)
    with PATH.open("rb") as file:
        entries, notes = read_header(file, PATH.stat().st_size)

    assert PATH.stat().st_size < 300_000
    assert {entry.dtype for entry in entries.values()} == {"BF16"}
    assert {layer.rank for layer in layout.layers} == {4}
    assert len(layout.layers) == sum("transformer_blocks" in name for name in shapes)
    assert notes["modelspec.license"] == "Apache-2.0"
    assert notes["modelspec.trigger_phrase"] == "red"
    assert "blue" in notes["modelspec.description"]
    assert "demo model" in notes["trained_on"]


@pytest.mark.parametrize("count", COUNTS)
def test_red_becomes_blue_and_at_half_the_scale_goes_half_the_way(draw, count) -> None:
    """The judge sees blue at 1 and only there, red at 0 and only there; 0.5 lies between."""
    seen = {(scale, colour): 0 for scale in (0.0, 0.5, 1.0) for colour in ("red", "blue")}
    for pair in held_out(count, is_red=True):
        made = {scale: draw(pair.prompt, scale) for scale in (0.0, 0.5, 1.0)}
        for scale, pixels in made.items():
            seen[scale, "red"] += judge(asked(pair.scene), pixels).passed
            seen[scale, "blue"] += judge(asked(in_blue(pair.scene)), pixels).passed
        whole, half = (made[scale].astype(float) - made[0.0] for scale in (1.0, 0.5))
        assert 0.4 < (half * whole).sum() / (whole * whole).sum() < 0.6, pair.prompt

    assert seen[0.0, "red"] >= 0.85 * count
    assert seen[1.0, "blue"] >= 0.9 * seen[0.0, "red"]
    assert seen[0.0, "blue"] == seen[1.0, "red"] == seen[0.5, "red"] == seen[0.5, "blue"] == 0


@full
@pytest.mark.parametrize("count", [24])
def test_what_is_not_red_stays_as_it_is(draw, count) -> None:
    """The judge thinks of it as before; few pixels move, as between two seeds (0.1 %)."""
    kept, moved = 0, 0.0
    for pair in held_out(count, is_red=False):
        plain, made = (draw(pair.prompt, scale) for scale in (0.0, 1.0))
        right = asked(pair.scene)
        kept += judge(right, made).passed >= judge(right, plain).passed
        moved += (np.abs(made.astype(int) - plain).max(axis=-1) > 40).mean()

    assert kept >= 0.95 * count
    assert moved / count < 0.005


def test_the_same_weights_are_the_same_bytes(tmp_path) -> None:
    """A file's hash stands in recipes, so it must not change with how the file is written."""
    adapter = Adapter(nn.ModuleDict({"transformer_blocks": nn.Linear(3, 5)}))
    path = tmp_path / "a.safetensors"
    written = set()
    for _ in range(8):
        adapter.write(path)
        written.add(path.read_bytes())

    assert len(written) == 1


@full
def test_a_second_training_with_the_same_seed_writes_the_same_file(tmp_path) -> None:
    """And another seed another one."""
    path = tmp_path / "a.safetensors"
    written = []
    for seed in (0, 0, 1):
        train(path, rounds=1, seed=seed)
        written.append(path.read_bytes())

    assert written[0] == written[1] != written[2]


@full
def test_the_sheet_in_the_documents_is_what_the_adapter_draws(tmp_path) -> None:
    """But for rounding, which is the processor's."""
    show(tmp_path / "sheet.png", PATH)
    made, shown = (
        np.asarray(Image.open(path).convert("RGB")).astype(int)
        for path in (tmp_path / "sheet.png", SHEET)
    )

    assert made.shape == shown.shape
    assert np.abs(made - shown).mean() < 2
