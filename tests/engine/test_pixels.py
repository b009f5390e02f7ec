"""The pixels are the pipeline's own: our stages against diffusers on the same tiny weights and
noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinInpaintPipeline, Flux2KleinPipeline
from PIL import Image

from app.domain import Generated, ImageSpec, Mask, RawImage
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from tests.support.checkpoints import write_tiny_klein

# The first is in every run, all of them are in .ci/run.
pytestmark = pytest.mark.torch
full = pytest.mark.full

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def engine_for(tmp_path_factory):
    """Load a folder once per precision and variant; close all at the end of the module."""
    cache = tmp_path_factory.mktemp("cache")
    loaded: dict[tuple, KleinEngine] = {}

    def load(folder: Path, precision: str = "fp32", model: str = "flux.2-klein-4b") -> KleinEngine:
        key = (folder, precision, model)
        if key not in loaded:
            config = EngineConfig(model, str(folder), str(cache), None, precision)
            loaded[key] = KleinEngine(config)
            loaded[key].load(lambda _: None)
        return loaded[key]

    yield load
    for engine in loaded.values():
        engine.close()


def spec(**changes) -> ImageSpec:
    values = {
        "prompt": "a red circle",
        "width": 96,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 7,
    }
    return ImageSpec(**(values | changes))


def make(engine: KleinEngine, wanted: ImageSpec) -> Generated:
    return engine.generate(wanted, lambda _: None, lambda: False)


def array(image: RawImage) -> np.ndarray:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def picture(width: int, height: int, seed: int = 0) -> RawImage:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    rows = np.kron(noise, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
    return RawImage(width, height, rows.tobytes())


def pil(image: RawImage) -> Image.Image:
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def pipeline(folder: Path, precision: str, kind=Flux2KleinPipeline):
    # On a processor the engine's VAE computes in float32 at every precision.
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", dtype=torch.float32)
    decode = vae.decode
    vae.decode = lambda latents, **options: decode(latents.float(), **options)
    loaded = kind.from_pretrained(folder, vae=vae, dtype=DTYPES[precision])
    loaded.set_progress_bar_config(disable=True)
    for network in (loaded.transformer, loaded.text_encoder, loaded.vae):
        for weight in network.parameters():
            # Products with one row differ in their last bit by the alignment of the weights, and a
            # memory-mapped file aligns them by chance.
            weight.data = weight.data.clone()
    return loaded


def theirs(loaded, wanted: ImageSpec, **more) -> np.ndarray:
    result = loaded(
        prompt=wanted.prompt,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(wanted.seed),
        **more,
    )
    return np.asarray(result.images[0])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=full)])
def test_a_picture_equals_the_pipelines(engine_for, tiny_klein, precision):
    """Text to image at both precisions: every byte is the same."""
    ours = array(make(engine_for(tiny_klein, precision), spec()).image)

    expected = theirs(pipeline(tiny_klein, precision), spec())

    assert expected.std() > 3
    assert np.array_equal(expected, ours)


@full
def test_a_full_prompt_equals_the_pipelines(engine_for, tiny_klein):
    """A prompt of 512 tokens and more is cut as the pipeline cuts it, and without padding."""
    wanted = spec(prompt="long " * 200)
    made = make(engine_for(tiny_klein), wanted)

    assert made.is_prompt_cut
    assert made.prompt_tokens == 512
    assert np.array_equal(theirs(pipeline(tiny_klein, "fp32"), wanted), array(made.image))


@full
def test_guidance_runs_both_branches_for_the_base_variant(engine_for, tmp_path):
    """A model that is not distilled follows its guidance scale, as the pipeline does."""
    base = write_tiny_klein(tmp_path, is_distilled=False)
    wanted = spec(guidance_scale=4.0)
    ours = array(make(engine_for(base, model="flux.2-klein-base-4b"), wanted).image)

    assert np.array_equal(theirs(pipeline(base, "fp32"), wanted), ours)
    assert not np.array_equal(ours, theirs(pipeline(base, "fp32"), spec()))


@full
@pytest.mark.parametrize(("precision", "second"), [("fp32", (1200, 1000)), ("bf16", (80, 210))])
def test_an_edit_equals_the_pipelines(engine_for, tiny_klein, precision, second):
    """Two references of odd sizes, one over a megapixel, are seen as the pipeline sees them."""
    references = (picture(130, 100), picture(*second, seed=1))
    wanted = spec(references=references)
    ours = array(make(engine_for(tiny_klein, precision), wanted).image)

    expected = theirs(
        pipeline(tiny_klein, precision), wanted, image=[pil(each) for each in references]
    )

    assert np.array_equal(expected, ours)
    assert not np.array_equal(expected, theirs(pipeline(tiny_klein, precision), spec()))


@full
def test_a_masked_edit_equals_the_pipelines_and_keeps_what_it_must(engine_for, tiny_klein):
    """Where the mask repaints, the inpaint pipeline's pixels; where it keeps, the source's."""
    source, other = picture(96, 64), picture(80, 80, seed=2)
    weights = np.zeros((64, 96), np.uint8)
    weights[16:48, 32:96] = 255
    wanted = spec(references=(source, other), mask=Mask(96, 64, weights.tobytes()))
    ours = array(make(engine_for(tiny_klein), wanted).image)

    loaded = pipeline(tiny_klein, "fp32", Flux2KleinInpaintPipeline)
    expected = theirs(
        loaded,
        wanted,
        image=pil(source),
        mask_image=Image.fromarray(weights),
        image_reference=pil(other),
        strength=1.0,
    )
    painted = weights == 255

    assert np.array_equal(expected[painted], ours[painted])
    assert np.array_equal(array(source)[~painted], ours[~painted])
    assert not np.array_equal(array(source)[painted], ours[painted])


@full
def test_a_picture_does_not_depend_on_what_ran_before(engine_for, tiny_klein):
    """Sizes, references and guidance of other jobs leave no trace."""
    engine = engine_for(tiny_klein)
    first = make(engine, spec()).image
    make(engine, spec(width=64, seed=1, references=(picture(64, 64),), previews=2))

    assert make(engine, spec()).image == first


@full
def test_previews_come_on_their_steps_and_change_no_pixel(engine_for, tiny_klein):
    """Two previews of four steps, no larger than the picture, and the picture is the same."""
    engine = engine_for(tiny_klein)
    seen = []
    wanted = spec(num_inference_steps=4)
    plain = make(engine, wanted).image
    shown = engine.generate(spec(num_inference_steps=4, previews=2), seen.append, lambda: False)

    previews = [progress for progress in seen if progress.preview is not None]

    assert [progress.step for progress in previews] == [1, 3]
    assert all(array(progress.preview).std() > 3 for progress in previews)
    assert plain == shown.image
