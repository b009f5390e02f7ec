"""Adapters at klein's full size: what graphs replay, what switching leaves, what is compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.domain import ImageSpec
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from benchmarks.bench_lora import write

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

SPEC = ImageSpec("a red circle", 512, 512, 4, 1.0, 7)
_STRENGTH = 0.3
_LEAST_DB = 40
"""Between a picture of eager passes and one of a graph's: other kernels may be chosen there."""


@pytest.fixture(scope="module", params=["fp8", "int8"])
def engine(checkpoint, tmp_path_factory, request):
    cache = tmp_path_factory.getbasetemp() / "cache"
    config = EngineConfig("flux.2-klein-4b", str(checkpoint), str(cache), 0, request.param)
    made = KleinEngine(config)
    made.shapes = made.load(lambda _: None).linear_shapes
    made.cache = cache
    yield made
    made.close()


@pytest.fixture(scope="module")
def loras(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [
        write(folder / f"{rank}-{seed}.safetensors", engine.shapes, rank, seed, _STRENGTH)
        for rank, seed in ((32, 1), (32, 2), (16, 3), (100, 4))
    ]


def draw(engine, *loras, times: int = 1) -> np.ndarray:
    for _ in range(times):
        image = engine.generate(replace(SPEC, loras=loras), lambda _: None, lambda: False).image
    return np.frombuffer(image.pixels, np.uint8).astype(np.float64)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(((one - other) ** 2).mean())
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def test_a_switch_leaves_nothing_behind_where_graphs_are_replayed(engine, loras) -> None:
    """a, none, b: each as before, after slots grew and graphs of other ranks were captured."""
    a, b, *_ = loras
    none, only_a, only_b = draw(engine, times=4), draw(engine, a, times=4), draw(engine, b, times=4)
    assert psnr(none, only_a) < _LEAST_DB
    assert psnr(only_a, only_b) < _LEAST_DB
    for _ in range(2):
        assert np.array_equal(draw(engine, a), only_a)
        assert np.array_equal(draw(engine), none)
        assert np.array_equal(draw(engine, b), only_b)
        draw(engine, *loras)
        assert np.array_equal(draw(engine, b, times=4), only_b)


def test_a_graph_draws_what_single_passes_draw(engine, loras) -> None:
    """The first picture of a choice is eager, the third a replay."""
    chosen = replace(loras[2], scale=0.5), loras[0]
    assert psnr(draw(engine, *chosen), draw(engine, *chosen, times=4)) > _LEAST_DB


def test_no_adapter_has_a_kernel_compiled(engine, loras) -> None:
    """Each bucket's first use finds every kernel there."""
    folder = Path(engine.cache) / "compiled"
    before = sorted(folder.rglob("*.cubin"))

    for chosen in (loras[:1], loras[:2], loras[3:], loras):
        draw(engine, *chosen)

    assert before
    assert sorted(folder.rglob("*.cubin")) == before
