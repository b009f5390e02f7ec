"""A scene is one picture: where things stand, what training may see, what an edit may ask."""

from __future__ import annotations

import random

import pytest

from tools.shapes.scenes import (
    COLOURS,
    HELD_OUT_SHARE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    is_legible,
    lay_out,
    sample_edit,
    sample_scene,
)


@pytest.fixture
def rng():
    return random.Random(11)


def test_vocabulary():
    """The shapes, sizes and colours are those that were promised, number for number."""
    assert len(SHAPES) == 8
    assert len(COLOURS) == 12
    assert COLOURS["red"] == (220, 40, 40)
    assert COLOURS["gray"] == (140, 140, 140)
    assert SIZES == ("small", "medium", "large")


def test_unsaid():
    """What is not said is medium, in the centre, on white."""
    scene = Scene((Thing("circle", "red"),))

    (mark,) = lay_out(scene, 256, 256).marks

    assert scene.canonical() == "medium red circle centre on white"
    assert (mark.x, mark.y, mark.radius) == pytest.approx((128, 128, 51.2))


@pytest.mark.parametrize(("width", "height"), [(128, 128), (256, 256), (512, 128), (128, 512)])
def test_inside(width, height, rng):
    """Everything is inside the canvas, on any of its shapes."""
    for _ in range(300):
        for mark in lay_out(sample_scene(rng), width, height).marks:
            assert mark.radius < mark.x < width - mark.radius
            assert mark.radius < mark.y < height - mark.radius


def test_sampled_scenes_are_legible(rng):
    """Things never touch and never have the background's colour."""
    scenes = [sample_scene(rng) for _ in range(500)]

    assert all(is_legible(scene) for scene in scenes)
    assert {len(scene.things) for scene in scenes} == {1, 2}


def test_reading_order(rng):
    """A scene lists its things in reading order, so a pair has one spelling."""
    for _ in range(300):
        places = [PLACES.index(thing.place) for thing in sample_scene(rng).things]
        assert places == sorted(places)


def test_held_out_is_never_trained(rng):
    """What the examination asks is not among what training is given."""
    trained = {sample_scene(rng).canonical() for _ in range(2000)}
    examined = {sample_scene(rng, held_out=True).canonical() for _ in range(300)}

    assert not any(is_held_out(name) for name in trained)
    assert all(is_held_out(name) for name in examined)
    assert not trained & examined


def test_held_out_share():
    """About one scene in sixteen is held out, and always the same ones."""
    names = [f"scene {index}" for index in range(20_000)]

    assert sum(map(is_held_out, names)) / len(names) == pytest.approx(HELD_OUT_SHARE, abs=0.01)
    assert is_held_out("medium red circle centre on white") is False


def test_edits_keep_apart(rng):
    """Edits for training use neither a held-out edit nor a held-out scene on either side."""
    for _ in range(500):
        edit = sample_edit(rng)
        names = (edit.canonical(), edit.before.canonical(), edit.after.canonical())
        assert not any(is_held_out(name) for name in names)
    assert is_held_out(sample_edit(rng, held_out=True).canonical())


def test_edits_change_one_thing(rng):
    """An edit changes the background or one thing, and leaves it legible and in its place."""
    for _ in range(500):
        edit = sample_edit(rng)
        before, after = edit.before, edit.after
        pairs = zip(before.things, after.things, strict=True)
        changed = [index for index, (old, new) in enumerate(pairs) if old != new]

        assert is_legible(after)
        assert changed == ([] if edit.target is None else [edit.target])
        assert (before.background != after.background) == (edit.target is None)
        assert [t.place for t in before.things] == [t.place for t in after.things]
