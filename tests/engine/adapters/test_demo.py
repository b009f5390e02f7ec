"""The demo model's adapter: red becomes blue as far as asked for, and nothing else changes."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from app.domain import ImageSpec, Lora
from app.engine.adapters.layout import read_layout
from app.engine.adapters.names import targets_of
from app.engine.adapters.shapes import linear_shapes
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.models.shapes import SHAPES
from tools.shapes.judge import judge
from tools.shapes.scenes import Picture, Scene, Thing, lay_out

pytestmark = pytest.mark.torch

PATH = SHAPES.folder / "loras" / "red-to-blue.safetensors"
SIDE = 128
SCENES = [3, pytest.param(12, marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Draw a scene with the adapter at a scale; height x width x 3."""
    engine = KleinEngine(EngineConfig("shapes", None, str(tmp_path_factory.mktemp("c")), None))
    engine.load(lambda _: None)
    sha256 = hashlib.sha256(PATH.read_bytes()).hexdigest()

    def draw(scene: Scene, scale: float) -> np.ndarray:
        (thing,) = scene.things
        lora = Lora("red-to-blue", scale, sha256, str(PATH))
        prompt = f"a {thing.colour} {thing.shape} on a {scene.background} background"
        spec = ImageSpec(prompt, SIDE, SIDE, 4, 1.0, 3, loras=(lora,))
        image = engine.generate(spec, lambda _: None, lambda: False).image
        return np.frombuffer(image.pixels, np.uint8).reshape(SIDE, SIDE, 3)

    yield draw
    engine.close()


def scenes(colours: tuple[str, ...], count: int) -> list[Scene]:
    """Single shapes of *colours* on backgrounds that are neither red nor blue."""
    rng = random.Random(1)
    shapes = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
    return [
        Scene(
            (Thing(rng.choice(shapes), rng.choice(colours)),),
            rng.choice(["white", "yellow", "black", "gray"]),
        )
        for _ in range(count)
    ]


def asked(scene: Scene, colour: str) -> Picture:
    """Return what should be drawn, with the thing in *colour*."""
    (thing,) = scene.things
    return lay_out(Scene((Thing(thing.shape, colour),), scene.background), SIDE, SIDE)


def test_the_file_is_an_adapter_of_every_block() -> None:
    """Small, in a layout that every reader knows, and with its licence."""
    from app.engine.checkpoint.safetensors_header import read_header

    shapes = linear_shapes(SHAPES.architecture)
    layout = read_layout(PATH, targets_of(shapes), shapes)
    with PATH.open("rb") as file:
        _, notes = read_header(file, PATH.stat().st_size)

    assert PATH.stat().st_size < 300_000
    assert {layer.rank for layer in layout.layers} == {4}
    assert len(layout.layers) == sum("transformer_blocks" in name for name in shapes)
    assert notes["modelspec.license"] == "Apache-2.0"


@pytest.mark.parametrize("count", SCENES)
def test_red_becomes_blue_and_at_half_the_scale_half_as_much(draw, count) -> None:
    """The judge sees a blue shape at 1 and a red one at 0; at 0.5 the colour lies between."""
    passed = {0.0: 0, 1.0: 0}
    for scene in scenes(("red",), count):
        for scale, colour in ((0.0, "red"), (1.0, "blue")):
            passed[scale] += judge(asked(scene, colour), draw(scene, scale)).passed
        red, half, blue = (_core(scene, draw(scene, scale)) for scale in (0.0, 0.5, 1.0))
        share = float((half - red) @ (blue - red) / ((blue - red) @ (blue - red)))
        assert 0.3 < share < 0.7, scene

    assert min(passed.values()) >= 0.9 * count


@pytest.mark.parametrize("count", SCENES)
def test_what_is_not_red_stays_as_it_is(draw, count) -> None:
    """Shapes of other colours are drawn as before."""
    kept = 0
    for scene in scenes(("green", "yellow", "orange", "purple", "cyan"), count):
        (thing,) = scene.things
        plain, made = (draw(scene, scale) for scale in (0.0, 1.0))
        right = asked(scene, thing.colour)
        kept += judge(right, made).passed >= judge(right, plain).passed

    assert kept >= 0.9 * count


def _core(scene: Scene, pixels: np.ndarray) -> np.ndarray:
    """Return the median colour of what differs from the background."""
    corner = pixels[4, 4].astype(float)
    away = np.abs(pixels.astype(float) - corner).max(axis=-1) > 60
    return np.median(pixels[away], axis=0)
