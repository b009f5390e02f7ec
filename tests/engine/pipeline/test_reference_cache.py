"""The cache of reference latents: what a key holds, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.domain import ImageSpec, Mask, RawImage
from app.engine.pipeline.reference_cache import ReferenceCache, reference_keys

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
PICTURE = RawImage(64, 96, bytes(range(256)) * 72)
SPEC = ImageSpec("a prompt", 128, 192, 4, 1.0, 7, references=(PICTURE,))


def latents(value: float, megapixels: float = 1.0) -> torch.Tensor:
    return torch.full((1, 128, 64, int(64 * megapixels)), value, dtype=torch.bfloat16)


def keys(count: int):
    pictures = tuple(RawImage(1, 1, bytes([number] * 3)) for number in range(count))
    return reference_keys(replace(SPEC, references=pictures))


def test_a_key_holds_what_the_latents_depend_on():
    """Pixels, size and role; a source also the size that it is fitted to. Nothing else."""
    mask = Mask(1, 1, b"\0")
    other = RawImage(64, 96, PICTURE.pixels[::-1])
    wanted = [
        SPEC,
        replace(SPEC, references=(replace(PICTURE, width=96, height=64),)),
        replace(SPEC, references=(other,)),
        replace(SPEC, mask=mask),
        replace(SPEC, mask=mask, width=64),
    ]
    alike = replace(SPEC, prompt="another", seed=8, width=64, num_inference_steps=1)

    assert len({reference_keys(each) for each in wanted}) == len(wanted)
    assert reference_keys(alike) == reference_keys(SPEC)
    assert reference_keys(replace(SPEC, references=(other, PICTURE), mask=mask))[1:] == (
        reference_keys(SPEC)
    )


def test_the_cache_keeps_the_references_used_last_within_its_bytes():
    """A larger picture takes the place of several; one beyond the whole takes none."""
    cache, names = ReferenceCache(3, CPU), keys(5)
    for number in range(3):
        cache.put(names[number], latents(number))
    assert cache.get(names[0]) is not None
    cache.put(names[3], latents(3, 2.0))
    cache.put(names[4], latents(4, 3.5))

    there = [number for number in range(5) if cache.get(names[number]) is not None]
    assert there == [0, 3]
    assert torch.equal(cache.get(names[3]), latents(3, 2.0))


def test_kept_latents_cannot_be_changed():
    """Both ways are copies."""
    cache, (name,), given = ReferenceCache(1, CPU), keys(1), latents(1)
    cache.put(name, given)
    given.zero_()
    cache.get(name).zero_()

    assert torch.equal(cache.get(name), latents(1))


def test_a_reference_cache_of_no_size_keeps_nothing():
    """0 turns it off."""
    cache, (name,) = ReferenceCache(0, CPU), keys(1)
    cache.put(name, latents(1))

    assert cache.get(name) is None
