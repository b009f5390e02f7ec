"""The catalogue names what can be served, completely and by safe names."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import PurePosixPath

import pytest
from PIL import Image

from app.domain import ImageSpec
from app.engine.config import EngineConfig
from app.engine.models.registry import MODELS, files_for, find_model, find_spec
from app.engine.quantization.formats import FORMATS
from app.errors import StartupError
from tests.api.apps import app_on
from tests.api.conftest import client_of
from tests.support.in_process import InProcess

KLEIN, BASE, SHAPES = "flux.2-klein-4b", "flux.2-klein-base-4b", "shapes"


def gigabytes(key: str, precision: str) -> float:
    return round(
        sum(file.size_bytes for file in files_for(find_model(key), FORMATS[precision].file)) / 1e9,
        1,
    )


def test_keys():
    """A variant is known by the id of its card, and klein comes first."""
    assert list(MODELS) == [KLEIN, BASE, SHAPES]
    assert all(key == variant.spec.id for key, variant in MODELS.items())


@pytest.mark.parametrize(
    ("key", "precision", "expected"),
    [
        (KLEIN, "fp8", 12.3),
        (KLEIN, "int8", 16.0),
        (KLEIN, "bf16", 16.0),
        (KLEIN, "fp32", 16.0),
        (BASE, "fp8", 16.0),
        (BASE, "bf16", 16.0),
        (SHAPES, "fp8", 0.0),
    ],
)
def test_download_size(key, precision, expected):
    """Each precision downloads its own transformer once, and the rest."""
    assert gigabytes(key, precision) == expected


def test_only_one_transformer():
    """No load brings the transformer twice, as a snapshot of the repository would."""
    for precision in ("fp8", "int8", "bf16"):
        names = [file.path for file in files_for(find_model(KLEIN), FORMATS[precision].file)]
        weights = [name for name in names if name.endswith(".safetensors")]

        assert len(weights) == 4
        assert len(set(names)) == len(names)
    assert "flux-2-klein-4b-fp8.safetensors" in [
        file.path for file in files_for(find_model(KLEIN), "fp8")
    ]


def test_every_file_is_pinned():
    """Each file has a commit, a size and a hash, and a path that stays inside its folder."""
    for variant in MODELS.values():
        for file in variant.files:
            assert re.fullmatch(r"[0-9a-f]{40}", file.revision)
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.size_bytes > 0
            assert re.fullmatch(r"black-forest-labs/FLUX\.2-klein-[\w-]+", file.repository)
            assert not PurePosixPath(file.path).is_absolute()
            assert ".." not in PurePosixPath(file.path).parts


def test_no_code_and_no_pickles():
    """Nothing that can run code is ever asked for."""
    kinds = {PurePosixPath(file.path).suffix for entry in MODELS.values() for file in entry.files}

    assert kinds == {".safetensors", ".json", ".txt", ".jinja"}


def test_defaults_are_kleins():
    """Distilled: 4 steps and guidance 1, which cannot be changed. Base: 50 steps, guidance 4."""
    distilled, base = find_spec(KLEIN), find_spec(BASE)

    assert (distilled.default_steps, distilled.default_guidance) == (4, 1.0)
    assert (base.default_steps, base.default_guidance) == (50, 4.0)
    assert distilled.is_distilled
    assert not base.is_distilled
    assert (base.max_steps, base.max_guidance) == (100, 20.0)


def test_cards_agree_with_themselves():
    """Every default lies within its variant's own limits."""
    for variant in MODELS.values():
        it = variant.spec
        assert it.default_width * it.default_height <= it.max_pixels
        assert it.min_side <= it.default_width <= it.max_side
        assert it.default_steps <= it.max_steps
        assert it.default_guidance <= it.max_guidance
        assert it.min_side % 16 == it.max_side % 16 == 0


def test_shapes_is_embedded():
    """The demo model needs no file and says plainly what it can do."""
    variant = find_model(SHAPES)

    assert variant.is_embedded
    assert (variant.repositories, variant.revision) == ((), "embedded")
    assert "coloured shapes only" in variant.spec.note


def test_revision_is_that_of_the_variants_own_repository():
    """The revision that is reported is a commit of the repository that the card names."""
    assert find_model(KLEIN).revision.startswith("e7b7dc27")
    assert find_model(BASE).revision.startswith("a3b4f484")


@pytest.mark.parametrize("key", ["", "klein", "../etc", "/etc/passwd", "hub:a/b", KLEIN.upper()])
def test_unknown_key(key):
    """A name that is no key is refused with the keys that exist, and is not repeated."""
    with pytest.raises(StartupError, match=f"one of {KLEIN}, {BASE}, {SHAPES}"):
        find_model(key)


@pytest.mark.parametrize("key", ["flux.2-klein-9b", "black-forest-labs/FLUX.2-klein-base-9B"])
def test_nine_billion(key):
    """The 9B variants are refused with the reasons: licence and memory."""
    with pytest.raises(StartupError, match=r"licence .* 12 GB"):
        find_spec(key)


def test_unknown_precision():
    """A precision that has no files is refused with those that have."""
    with pytest.raises(StartupError, match="one of fp8, bf16"):
        files_for(find_model(KLEIN), "fp4")


def test_no_torch():
    """The HTTP process may read the catalogue: it brings neither torch nor a client of the hub."""
    code = (
        "import sys, app.engine.models.registry;"
        "print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


@pytest.fixture
def second(tiny_klein, monkeypatch):
    """One more model by one more entry: other layers are read, other sizes and steps allowed."""
    spec = replace(
        find_spec(SHAPES),
        id="second",
        title="a second small model",
        default_width=96,
        default_height=64,
        default_steps=2,
        max_steps=3,
        min_side=64,
        max_side=128,
        max_pixels=128 * 96,
        max_sequence_length=48,
    )
    layers = replace(find_model(SHAPES).architecture, text_layers=(2, 4, 5), text_width=32)
    architecture = replace(layers, latent_channels=8)
    entry = replace(find_model(SHAPES), spec=spec, architecture=architecture, folder=tiny_klein)
    monkeypatch.setitem(MODELS, "second", entry)
    return entry


@pytest.mark.torch
def test_a_second_model_is_one_entry(second, tmp_path):
    """The engine loads it with the entry's numbers, and makes a picture with its defaults."""
    from app.engine.engine import KleinEngine

    seen = []
    engine = KleinEngine(EngineConfig("second", None, str(tmp_path), None))
    info = engine.load(lambda _: None)
    made = engine.generate(
        ImageSpec("word " * 20, 96, 64, second.spec.default_steps, 1.0, 7),
        seen.append,
        lambda: False,
    )
    encoder = engine._started.components.encoder
    engine.close()

    assert (info.model, info.revision) == ("second", "embedded")
    assert info.max_pixels == (128 * 96,) * 5
    assert (made.image.width, made.image.height, len(made.timings.steps)) == (96, 64, 2)
    assert (made.prompt_tokens, made.is_prompt_cut) == (48, True)
    assert len(encoder.layers) == 5


async def test_a_second_models_defaults_are_the_services(second):
    """What is left out of a request comes from the entry; what it does not allow is refused."""
    runtime = InProcess(model="second")
    async with client_of(app_on(runtime)) as client:
        plain = await client.post("/generate", json={"prompt": "a red circle"})
        wrong = await client.post("/generate", json={"prompt": "a", "num_inference_steps": 4})

    assert Image.open(io.BytesIO(plain.content)).size == (96, 64)
    assert wrong.status_code == 400
    assert "3" in wrong.json()["error"]["message"]
