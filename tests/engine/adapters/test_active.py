"""Adapters at work: the numbers of every layout, path and precision, and what switching leaves."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.domain import Generated, ImageSpec, Lora
from app.engine.adapters import active
from app.engine.adapters.branches import Place, Prepared, SlotBranch
from app.engine.adapters.names import targets_of
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.load import load
from app.engine.models.registry import find_spec
from app.errors import GenerationFailed, OutOfMemory
from tests.engine.adapters import forge
from tests.engine.test_pixels import pipeline, theirs
from tests.support.long_form import one_of
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch
full = pytest.mark.full


MODEL = "flux.2-klein-4b"
SPEC = ImageSpec("a red circle", 64, 96, 2, 1.0, 7, wants_latents=True)
ALPHA, RANK = 2.0, 4
READ_RIGHTLY = {
    "PEFT, alpha in the metadata": "",
    "ai-toolkit": "norm_out",
    "kohya": "embed|modulation|norm_out|proj_out",
}
"""The layouts that diffusers 0.42.1 with peft 0.21.2 reads rightly, and the layers of each that it
loses, or of which it swaps the halves."""


@pytest.fixture(scope="module")
def engines(tiny_klein, tmp_path_factory):
    """An engine for each precision, loaded once, without a warm-up picture.

    That of `fp8` has a file like the published one, whose layers take their input in fp8.
    """
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "fp8"
    shutil.copytree(tiny_klein, folder)
    paths = {"fp8": write_fp8(folder, folder / "fp8.safetensors")}
    made: dict[str, KleinEngine] = {}

    def engine(precision: str) -> KleinEngine:
        if precision not in made:
            path = paths.get(precision, tiny_klein)
            config = EngineConfig(MODEL, str(path), str(cache), None, precision)
            made[precision] = each = KleinEngine(config)
            spec = replace(find_spec(MODEL), max_sequence_length=512)
            each._started = load(config, spec, lambda _: None)
        return made[precision]

    yield engine
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def pairs(engines):
    """The factors of an adapter of all layers, weak enough to leave a picture."""
    shapes = engines("fp32")._started.components.adapters.shapes
    return {name: (down, up * 0.05) for name, (down, up) in forge.draw(shapes, RANK).items()}


@pytest.fixture(scope="module")
def files(pairs, tmp_path_factory):
    """The adapter in every layout."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: forge.write(folder / f"{number}.safetensors", *each)
        for number, (name, each) in enumerate(forge.layouts(pairs, ALPHA).items())
    }


def use(path, scale: float = 1.0) -> Lora:
    """Choose the adapter at *path*."""
    return Lora(path.stem, scale, hashlib.sha256(path.read_bytes()).hexdigest(), str(path))


def draw(engine: KleinEngine, *loras: Lora, **changes):
    """Make the picture with *loras*."""
    spec = replace(SPEC, loras=loras, **changes)
    return engine.generate(spec, lambda _: None, lambda: False)


def latents(engine: KleinEngine, *loras: Lora, seed: int = 7) -> np.ndarray:
    """Return the final latents of the picture with *loras*."""
    return np.frombuffer(draw(engine, *loras, seed=seed).latents, np.float32)


def distance_db(made: np.ndarray, right: np.ndarray) -> float:
    """Return the error of *made* in dB: the ratio of signal to error."""
    error = float(((made - right) ** 2).sum())
    return 10 * math.log10(float((right**2).sum()) / error) if error else math.inf


@full
@pytest.mark.parametrize("layout", READ_RIGHTLY)
def test_pixels_are_the_pipelines_with_the_same_file(
    engines, tiny_klein, pairs, tmp_path, layout
) -> None:
    """In bf16 every byte is that of diffusers with PEFT, at two scales."""
    engine = engines("bf16")
    lost = READ_RIGHTLY[layout]
    kept = {name: each for name, each in pairs.items() if not lost or not re.search(lost, name)}
    # diffusers refuses alpha beside lora_A.
    alpha = RANK if layout == "ai-toolkit" else ALPHA
    tensors, notes = forge.layouts(kept, alpha)[layout]
    if layout == "ai-toolkit":
        tensors = {name: each for name, each in tensors.items() if "alpha" not in name}
    path = forge.write(tmp_path / "a.safetensors", tensors, notes)
    loaded = pipeline(tiny_klein, "bf16")
    loaded.load_lora_weights(str(path), adapter_name="a")
    for scale in (1.0, 0.3):
        loaded.set_adapters(["a"], [scale])
        right = theirs(loaded, SPEC)

        made = _array(draw(engine, use(path, scale)))

        assert (right != _array(draw(engine))).any()
        assert np.array_equal(made, right)


@full
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_are_the_pipelines_two(engines, tiny_klein, files, pairs, tmp_path) -> None:
    """In the same order, each at its scale."""
    one, other = files["PEFT, alpha in the metadata"], _other(pairs, tmp_path)
    loaded = pipeline(tiny_klein, "bf16")
    loaded.load_lora_weights(str(one), adapter_name="a")
    loaded.load_lora_weights(str(other), adapter_name="b")
    loaded.set_adapters(["a", "b"], [0.8, -0.5])
    right = theirs(loaded, SPEC)

    made = _array(draw(engines("bf16"), use(one, 0.8), use(other, -0.5)))

    assert np.array_equal(made, right)


@full
@pytest.mark.parametrize("precision", ["fp8", "bf16", "int8"])
def test_every_layout_gives_the_same_latents(engines, files, precision) -> None:
    """Bit for bit, as the same adapter in PEFT's layout."""
    engine = engines(precision)
    right, *others = (latents(engine, use(path)) for path in files.values())
    plain = latents(engine)

    assert distance_db(plain, right) < 30
    for made in others:
        assert np.array_equal(made, right)


@full
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_an_adapter_costs_8_bit_no_accuracy(engines, pairs, tmp_path, precision) -> None:
    """The distance to pictures without quantization stays within 1 dB of that without one.

    The mean of a few adapters, each a few per cent of the weights' norm, as those that people have.
    """
    exact, quantized = engines("fp32"), engines(precision)
    without = distance_db(latents(quantized), latents(exact))
    found = []
    for seed in range(4):
        drawn = forge.draw(exact._started.components.adapters.shapes, RANK, seed)
        weak = {name: (down, up * 0.02) for name, (down, up) in drawn.items()}
        tensors, notes = forge.layouts(weak, ALPHA)["ai-toolkit"]
        lora = use(forge.write(tmp_path / f"{seed}.safetensors", tensors, notes))
        found.append(distance_db(latents(quantized, lora), latents(exact, lora)))

    assert distance_db(latents(exact, lora), latents(exact)) < 30
    assert sum(found) / len(found) > without - 1


@pytest.mark.parametrize("precision", one_of("fp8", "fp32", "int8"))
def test_a_switch_leaves_nothing_behind(engines, files, pairs, tmp_path, precision) -> None:
    """Scale 0 is none, bit for bit; after a and none, b gives what b alone gives."""
    engine = engines(precision)
    a, b = use(files["kohya"]), use(_other(pairs, tmp_path), 0.7)
    none, only_b = latents(engine), latents(engine, b)

    drawn = [
        latents(engine, *loras)
        for loras in ((a,), (), (b,), (a, b), (replace(a, scale=0.0),), (b,))
    ]

    assert np.array_equal(drawn[1], none)
    assert np.array_equal(drawn[2], only_b)
    assert np.array_equal(drawn[4], none)
    assert np.array_equal(drawn[5], only_b)
    assert not np.array_equal(drawn[0], none)
    assert not np.array_equal(drawn[3], only_b)


@pytest.mark.parametrize("precision", one_of("fp8", "fp32", "int8"))
def test_the_order_of_two_adapters_is_rounding(engines, files, pairs, tmp_path, precision) -> None:
    """Their changes add up."""
    engine = engines(precision)
    a, b = use(files["kohya"], 0.5), use(_other(pairs, tmp_path), 0.7)

    assert distance_db(latents(engine, a, b), latents(engine, b, a)) > (
        90 if precision == "fp32" else 25
    )


@pytest.mark.parametrize("precision", one_of("fp8", "fp32", "int8"))
@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"])
def test_a_kronecker_product_is_the_matrix_that_it_stands_for(
    engines, tmp_path, layer, precision
) -> None:
    """LoKr draws what a low-rank branch of full rank draws with the multiplied matrix."""
    engine = engines(precision)
    shapes = engine._started.components.adapters.shapes
    modules = targets_of(shapes)[layer].modules
    rows, columns = sum(shapes[name][0] for name in modules), shapes[modules[0]][1]
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(4, 4, generator=generator)
    right = torch.randn(rows // 4, columns // 4, generator=generator) * 0.2
    prefix = f"diffusion_model.{layer}"
    files = {
        "lokr": {"lokr_w1": left, "lokr_w2": right},
        "whole": {
            "lora_A.weight": torch.eye(columns),
            "lora_B.weight": torch.kron(left, right).contiguous(),
        },
    }
    for name, tensors in files.items():
        named = {f"{prefix}.{word}": each for word, each in tensors.items()}
        save_file(named, tmp_path / f"{name}.safetensors")

    made, same = (latents(engine, use(tmp_path / f"{name}.safetensors")) for name in files)

    assert distance_db(made, latents(engine)) < 35
    assert distance_db(made, same) > (90 if precision == "fp32" else 30)


@pytest.mark.parametrize("precision", one_of("fp8", "fp32", "int8"))
def test_the_trial_touches_a_block_of_each_kind_and_leaves_nothing(engines, precision) -> None:
    """Zeros change no picture; afterwards no slot is held."""
    engine = engines(precision)
    adapters = engine._started.components.adapters
    none = latents(engine)

    with adapters.trial() as loras:
        made = draw(engine, *loras)
        touched = {
            name
            for place in adapters._places.values()
            if vars(place.layer).get("branch")
            for name in place.modules
        }

    assert distance_db(np.frombuffer(made.latents, np.float32), none) > 60
    assert made.lora_bytes > 0
    assert {name.split(".0.")[0] for name in touched} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    assert not touched & {name for modules in adapters._branches for name in modules}
    assert np.array_equal(latents(engine), none)


def test_it_says_what_was_brought_from_where(engines, files, pairs, tmp_path) -> None:
    """From disk at first, then from host memory; nothing while the choice stays."""
    engine = engines("fp8")
    a, b = use(files["OneTrainer"]), use(_other(pairs, tmp_path, seed=9))
    latents(engine)

    seen = [
        [(load.name, load.source) for load in draw(engine, *loras).lora_loads]
        for loras in ((a,), (a,), (a, b), (), (b,), (replace(b, scale=0.5),))
    ]

    disk = "host" if seen[0] == [(a.name, "host")] else "disk"
    assert seen == [
        [(a.name, disk)],
        [],
        [(a.name, "host"), (b.name, "disk")],
        [],
        [(b.name, "host")],
        [(b.name, "host")],
    ]
    assert draw(engine, b).lora_bytes > 0


def test_a_file_that_was_replaced_is_not_drawn_with(engines, files, tmp_path) -> None:
    """The job fails with a sentence, and the next is as without adapters."""
    engine = engines("fp8")
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["kohya"].read_bytes())
    lora = replace(use(path), sha256="0" * 64)
    none = latents(engine)

    with pytest.raises(GenerationFailed, match="adapter a was replaced"):
        draw(engine, lora)

    assert np.array_equal(latents(engine), none)


def test_a_file_that_holds_no_numbers_is_said_to(engines, files, tmp_path) -> None:
    """Its header is listed, and to ask again would not help."""
    engine = engines("fp8")
    tensors = load_file(files["kohya"])
    name = "lora_unet_img_in.lora_up.weight"
    path = tmp_path / "a.safetensors"
    save_file(tensors | {name: torch.full_like(tensors[name], math.inf)}, path)

    with pytest.raises(GenerationFailed, match=r"a cannot be used: img_in has .* not finite"):
        draw(engine, use(path))


def test_a_file_that_is_gone_puts_no_path_into_the_log(engines, tmp_path, caplog) -> None:
    """As no other line does."""
    lora = Lora("a", 1.0, "0" * 64, str(tmp_path / "gone.safetensors"))

    with pytest.raises(GenerationFailed, match="adapter a was replaced"):
        draw(engines("fp8"), lora)

    assert "The adapter a cannot be read (No such file or directory)." in caplog.messages
    assert str(tmp_path) not in caplog.text


def test_a_pipe_in_the_place_of_a_file_holds_up_no_job(engines, tmp_path) -> None:
    """It came there after the file was listed."""
    os.mkfifo(tmp_path / "a.safetensors")
    lora = Lora("a", 1.0, "0" * 64, str(tmp_path / "a.safetensors"))

    with pytest.raises(GenerationFailed, match="adapter a"):
        draw(engines("fp8"), lora)


@pytest.mark.parametrize("precision", one_of("fp8", "fp32"))
def test_without_room_for_slots_the_job_fails_alone(engines, files, monkeypatch, precision) -> None:
    """It is out of memory; the next is as without adapters, and the adapter works when asked."""
    engine = engines(precision)
    lora = use(files["bare BFL names"], 0.9)
    none, right = latents(engine), latents(engine, lora)
    latents(engine)
    kind, filled = engine._started.components.adapters._kind, []

    def fill(branch, parts) -> None:
        filled.append(branch)
        if len(filled) > 3:
            raise torch.OutOfMemoryError("no room")
        whole(branch, parts)

    whole = kind.fill
    with monkeypatch.context() as patch:
        patch.setattr(kind, "fill", fill)
        with pytest.raises(OutOfMemory):
            draw(engine, lora)

    assert np.array_equal(latents(engine), none)
    assert np.array_equal(latents(engine, lora), right)


def test_without_room_for_half_of_a_slot_there_is_none(monkeypatch) -> None:
    """A's was allocated, B's was not: else every later job of this layer would fail."""
    branch = SlotBranch(Place(("x",), torch.nn.Linear(8, 6), False), 6, torch.device("cpu"))
    part = Prepared(torch.ones(2, 8), torch.ones(2, 6), 1.0, ())
    empty, made = torch.empty, []

    def allocate(*shape, **more):
        made.append(shape)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no room")
        return empty(*shape, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", allocate)
        with pytest.raises(torch.OutOfMemoryError):
            branch.fill([(part, 1.0)])
    branch.fill([(part, 1.0)])

    assert torch.equal(branch.add(torch.zeros(1, 6), torch.ones(1, 8)), torch.full((1, 6), 16.0))


def test_out_of_memory_gives_up_the_slots(engines, files, monkeypatch) -> None:
    """Else a picture that fits without adapters would find no room until the service restarts."""
    engine = engines("fp8")
    lora = use(files["kohya"])
    right = latents(engine, lora)
    adapters = engine._started.components.adapters
    allocated = {name: each.allocations for name, each in adapters._branches.items()}
    assert draw(engine).lora_bytes > 0

    def no_room(*_args):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("app.engine.engine.decode", no_room)
        with pytest.raises(OutOfMemory):
            draw(engine, lora)

    assert adapters.size_bytes == 0
    assert np.array_equal(latents(engine, lora), right)
    # A graph of the slots before is of another variant.
    assert all(adapters._branches[name].allocations > was for name, was in allocated.items())


def test_host_memory_keeps_what_was_used_last(engines, pairs, tmp_path, monkeypatch) -> None:
    """Within a limit: the adapter that was used the longest ago is read from disk again."""
    engine = engines("fp8")
    one, two, three = (use(_other(pairs, tmp_path, seed)) for seed in (11, 12, 13))
    latents(engine, one)
    adapter = engine._started.components.adapters._kept[one.sha256]
    size = sum(t.nbytes for part in adapter.values() for t in part.tensors())
    monkeypatch.setattr(active, "_HOST_BYTES", size)

    sources = [draw(engine, lora).lora_loads[0].source for lora in (two, three, two, one)]

    assert sources == ["disk", "disk", "host", "disk"]
    with pytest.raises(GenerationFailed):
        draw(engine, two, three, replace(one, sha256="0" * 64))
    draw(engine)
    assert len(engine._started.components.adapters._kept) <= 3
    draw(engine, one)
    draw(engine)
    assert len(engine._started.components.adapters._kept) == 1


def _other(pairs, folder, seed: int = 5):
    """Write another adapter, of a few layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"transformer.{name}.lora_{word}.weight": torch.randn(each.shape, generator=generator) * 0.2
        for name, both in pairs.items()
        if "single" in name
        for word, each in zip("AB", both, strict=True)
    }
    path = folder / f"other{seed}.safetensors"
    save_file(tensors, path)
    return path


def _array(made: Generated) -> np.ndarray:
    image = made.image
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
