"""The engine's contract: progress, cancellation, errors, and what it says of itself."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from app import errors
from app.domain import Device, ImageSpec, Mask, RawImage, Stage
from app.engine import engine as engine_module
from app.engine import error_mapping
from app.engine import load as start
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine, _Clock, _Job
from app.engine.models.registry import MODELS
from app.engine.pipeline.denoise import draw_noise
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.pipeline.reference_cache import ReferenceCache
from app.engine.pipeline.text import Text
from app.engine.runtime.tokenizer import Tokens

pytestmark = pytest.mark.torch

SPEC = ImageSpec("a red circle", 64, 64, 3, 1.0, 7)


@pytest.fixture(scope="module")
def engine(tiny_klein, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    (cache / "converted").mkdir()
    (cache / "converted" / "encoder-int8-0123456789ab.safetensors").write_bytes(bytes(10))
    engine = KleinEngine(
        EngineConfig("flux.2-klein-4b", str(tiny_klein), str(cache), None, cache_max_bytes=1)
    )
    engine.cache = cache
    engine.info = engine.load(lambda _: None)
    yield engine
    engine.close()


def test_it_says_what_it_loaded(engine):
    """On the processor: the model's name, precision with its reason, and no card."""
    info = engine.info

    assert (info.model, info.device, info.precision) == ("flux.2-klein-4b", "cpu", "fp32")
    assert info.precision_reason
    assert info.plan_reasons
    assert info.warm_up_s > 0
    assert info.weights_bytes > 100_000


def test_a_load_prunes_the_cache_to_its_limit(engine):
    """What an earlier model was quantized to goes; a limit of 0 is none."""
    assert not (engine.cache / "converted" / "encoder-int8-0123456789ab.safetensors").exists()


def test_a_step_is_told_of_once_the_gpu_has_done_it(engine, monkeypatch):
    """The host runs one step ahead of a GPU, and waits for each before it says so."""
    waited, seen = [], []
    monkeypatch.setattr(_Clock, "is_over", lambda clock, lap: False)
    monkeypatch.setattr(_Clock, "wait", lambda clock, lap: waited.append(lap))

    def told(progress):
        seen.append((progress.stage, progress.step, waited[-1] if waited else None))

    engine.generate(SPEC, told, lambda: False)
    # Laps: the clock's beginning, text, references, and one for each step.
    assert seen == [
        (Stage.TEXT, 0, None),
        *((Stage.DENOISE, number, 2 + number) for number in (1, 2, 3)),
        (Stage.DECODE, 3, 5),
    ]


@pytest.mark.parametrize(
    ("device", "holds_encoder", "is_first"),
    [("cpu", True, False), ("cuda", False, False), ("cuda", True, True)],
)
def test_a_gpu_that_waits_for_the_prompt_gets_it_first(
    engine, monkeypatch, device, holds_encoder, is_first
):
    """Other threads would hold the interpreter; elsewhere the stage is told of before it begins."""
    seen = []

    def encode_text(components, spec):
        seen.append("encoded")
        return Text(torch.zeros(1), None, Tokens([1], 1, 0, is_cut=False), is_cached=False)

    class Helpers(ThreadPoolExecutor):
        def submit(self, run, *given):
            seen.append("helped")
            return super().submit(run, *given)

    monkeypatch.setattr(engine_module, "encode_text", encode_text)
    components = replace(
        engine._started.components, device=torch.device(device), holds_encoder=holds_encoder
    )
    with Helpers(1) as helpers:
        job = _Job(
            components, SPEC, helpers, lambda told: seen.append(told.stage), lambda: False, False
        )
        _, noise, keys = job._begin()

    others = [Stage.TEXT, "helped"]
    assert seen == (["encoded", *others] if is_first else [*others, "encoded"])
    assert torch.equal(noise.result(), draw_noise(components, SPEC))
    assert keys is None


def test_the_decode_is_told_of_before_it_begins(engine, monkeypatch):
    """On a processor it takes as long as a step, and who waits shall know what runs."""
    seen = []
    original = engine_module.decode

    def decode(*given):
        assert seen[-1] == Stage.DECODE
        return original(*given)

    monkeypatch.setattr(engine_module, "decode", decode)
    engine.generate(SPEC, lambda progress: seen.append(progress.stage), lambda: False)
    assert seen[-1] == Stage.DECODE


def test_it_reports_stages_and_steps(engine):
    """One sign of life per stage, one per step, and timings for each."""
    seen = []
    made = engine.generate(SPEC, seen.append, lambda: False)

    assert [(each.stage, each.step) for each in seen] == [
        (Stage.TEXT, 0),
        (Stage.DENOISE, 1),
        (Stage.DENOISE, 2),
        (Stage.DENOISE, 3),
        (Stage.DECODE, 3),
    ]
    assert len(made.timings.steps) == 3
    assert made.timings.text > 0
    assert made.timings.decode > 0
    assert (made.peak, made.held) == (None, None)
    assert not made.is_prompt_cut


def test_it_says_whether_the_prompt_was_kept(engine, monkeypatch):
    """A miss, then a hit with the same pixels; nothing where no cache is in use."""
    wanted = replace(SPEC, prompt="a prompt of its own")
    first, again = (engine.generate(wanted, lambda _: None, lambda: False) for _ in range(2))
    monkeypatch.setattr(engine._started.components, "cache", PromptCache(0, torch.device("cpu")))
    without = engine.generate(wanted, lambda _: None, lambda: False)

    kept = [made.is_prompt_cached for made in (first, again, without)]
    assert kept == [False, True, None]
    assert first.image == again.image == without.image


def test_pictures_of_one_edit_encode_its_references_once(engine, monkeypatch):
    """A masked edit's source and another picture: the second time from the cache, bit by bit."""
    components = engine._started.components
    monkeypatch.setattr(components, "references", ReferenceCache(1, torch.device("cpu")))
    source, other = (RawImage(64, 64, bytes([shade]) * 64 * 64 * 3) for shade in (50, 200))
    mask = Mask(64, 64, bytes([0, 255]) * 32 * 64)
    wanted = replace(SPEC, references=(source, other), mask=mask)
    encoded = []
    encode = components.vae.encode
    monkeypatch.setattr(
        components.vae, "encode", lambda pixels: (encoded.append(pixels), encode(pixels))[1]
    )
    first, other_seed, again = (
        engine.generate(replace(wanted, seed=seed), lambda _: None, lambda: False)
        for seed in (7, 8, 7)
    )
    assert len(encoded) == 2
    monkeypatch.setattr(components, "references", ReferenceCache(0, torch.device("cpu")))
    without = engine.generate(wanted, lambda _: None, lambda: False)

    assert first.image == again.image == without.image != other_seed.image
    cached = [made.are_references_cached for made in (first, other_seed, without)]
    assert cached == [(False, False), (True, True), ()]


def test_noise_hangs_on_the_seed_alone(engine):
    """It is drawn beside the text stage, and is the same as drawn here."""
    components = engine._started.components
    drawn = draw_noise(components, SPEC)
    right = torch.randn(drawn.shape, generator=torch.Generator("cpu").manual_seed(SPEC.seed))

    assert torch.equal(drawn, right)
    assert not torch.equal(drawn, draw_noise(components, replace(SPEC, seed=8)))


def test_it_stops_between_two_steps(engine):
    """A job that nobody waits for ends before the next step."""
    seen = []
    with pytest.raises(errors.Cancelled):
        engine.generate(SPEC, seen.append, lambda: len(seen) > 1)

    assert [each.step for each in seen] == [0, 1]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), errors.OutOfMemory),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), errors.OutOfMemory),
        (MemoryError(), errors.OutOfMemory),
        (RuntimeError("secret /path of mine"), errors.GenerationFailed),
    ],
)
def test_failures_become_the_errors_callers_know(engine, monkeypatch, raised, expected):
    """What happened goes to the log; the caller gets a fixed text, and the next job succeeds."""

    def fail(*_args, **_more):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr("app.engine.engine.decode", fail)
        with pytest.raises(expected) as caught:
            engine.generate(SPEC, lambda _: None, lambda: False)

    assert type(caught.value) is expected
    assert "secret" not in caught.value.message
    assert engine.generate(SPEC, lambda _: None, lambda: False).image.width == 64


def test_an_accelerator_error_is_fatal_unless_it_is_memory(monkeypatch):
    """CUDA's code 2 is memory; any other leaves a context that cannot be trusted."""

    class AcceleratorError(RuntimeError):
        error_code = 2

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError)
    memory, assertion = AcceleratorError("device"), AcceleratorError("device")
    assertion.error_code = 710

    assert type(error_mapping.translate(memory)) is errors.OutOfMemory
    assert type(error_mapping.translate(assertion)) is errors.WorkerLost


def test_a_failed_job_frees_its_tensors(engine, monkeypatch):
    """The frames of the traceback are dropped, so nothing of the failed job stays in memory."""
    held = []

    def fail(_parts, latents, _shape):
        tensor = torch.zeros(1234, 77)
        held.append(weakref.ref(tensor))
        raise RuntimeError(str(latents.shape))

    monkeypatch.setattr("app.engine.engine.decode", fail)
    with pytest.raises(errors.GenerationFailed):
        engine.generate(SPEC, lambda _: None, lambda: False)

    assert held[0]() is None


def test_a_package_without_the_demo_says_so(tmp_path, monkeypatch):
    """An installation that lost its weights is told in a sentence, not drawn around."""
    lost = replace(MODELS["shapes"], folder=tmp_path / "nothing")
    monkeypatch.setitem(MODELS, "shapes", lost)
    engine = KleinEngine(EngineConfig("shapes", None, str(tmp_path), None))
    with pytest.raises(errors.StartupError, match="install the package again"):
        engine.load(lambda _: None)
    engine.close()


def test_a_process_without_a_card_computes_with_its_share(monkeypatch):
    """Of the cores, where there are several such processes; one alone leaves it to torch."""
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    config = EngineConfig("shapes", None, "", None, place=Device(None, "cpu", "cpu:1", threads=2))

    assert start.find_device(config) == torch.device("cpu")
    start.find_device(replace(config, place=Device(None, "cpu", "cpu")))
    assert given == [2]


def test_a_card_that_is_not_there_is_told_in_a_sentence(tmp_path):
    """No traceback where there is no card, but what to do."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    config = EngineConfig("flux.2-klein-4b", str(tmp_path), str(tmp_path), 0)
    with pytest.raises(errors.StartupError, match="KLEIN_DEVICE=cpu"):
        start.find_device(config)
