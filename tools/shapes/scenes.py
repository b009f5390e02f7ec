"""What can be drawn: scenes in words, pictures in pixels, and the edits between scenes.

A `Scene` says what a prompt says and has no size; `lay_out` turns it into a `Picture` for a canvas.
Everything that a prompt leaves open has one fixed answer, so a prompt determines its picture.
Knows no wording (see prompts) and no pixels (see draw).
"""

import hashlib
import random
from dataclasses import dataclass, replace
from itertools import combinations

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 210, 50),
    "orange": (240, 140, 40),
    "purple": (140, 60, 180),
    "pink": (240, 140, 190),
    "cyan": (60, 200, 220),
    "brown": (130, 85, 50),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "medium", "large")
# In reading order: a scene lists its things in this order, so a pair has one spelling.
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
_LEFT_OUT = 0.65
HELD_OUT_SHARE = 1 / 16

# Radius as a share of the canvas's shorter side, by how many things share the canvas.
_RADII = {1: (0.12, 0.20, 0.30), 2: (0.10, 0.15, 0.20)}
_CELLS = (0.25, 0.5, 0.75)
_MARGIN = 0.03


@dataclass(frozen=True)
class Thing:
    """One object as a prompt describes it."""

    shape: str
    colour: str
    size: str = "medium"
    place: str = "centre"


@dataclass(frozen=True)
class Scene:
    """One or two things, in reading order, on a plain background."""

    things: tuple[Thing, ...]
    background: str = "white"

    def canonical(self) -> str:
        """The one spelling of this scene, on which the held-out rule stands."""
        things = ";".join(f"{t.size} {t.colour} {t.shape} {t.place}" for t in self.things)
        return f"{things} on {self.background}"


@dataclass(frozen=True)
class Edit:
    """A change of a scene into another; `target` is the changed thing, None for the background."""

    before: Scene
    after: Scene
    target: int | None

    def canonical(self) -> str:
        """The one spelling of this edit, on which the held-out rule stands."""
        return f"{self.before.canonical()} => {self.after.canonical()}"


@dataclass(frozen=True)
class Mark:
    """One shape on a canvas; centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Picture:
    """What is to be drawn on a canvas of a given size."""

    marks: tuple[Mark, ...]
    background: str
    width: int
    height: int


def lay_out(scene: Scene, width: int, height: int) -> Picture:
    """Put a scene on a canvas: places are shares of each side, radii of the shorter one."""
    marks = tuple(_mark(thing, len(scene.things), width, height) for thing in scene.things)
    return Picture(marks, scene.background, width, height)


def _mark(thing: Thing, count: int, width: int, height: int) -> Mark:
    shorter = min(width, height)
    radius = _RADII[count][SIZES.index(thing.size)] * shorter
    row, column = divmod(PLACES.index(thing.place), 3)
    keep = radius + _MARGIN * shorter
    x = min(max(_CELLS[column] * width, keep), width - keep)
    y = min(max(_CELLS[row] * height, keep), height - keep)
    return Mark(thing.shape, thing.colour, x, y, radius)


def is_held_out(canonical: str) -> bool:
    """Whether a scene or edit is kept from training: one in sixteen, by a hash, always the same."""
    digest = hashlib.sha256(f"shapes:{canonical}".encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A random scene from the training set, or from what training never sees."""
    while True:
        scene = _pair(rng) if rng.random() < 0.55 else _single(rng)
        if is_held_out(scene.canonical()) == held_out:
            return scene


def sample_edit(rng: random.Random, *, held_out: bool = False) -> Edit:
    """A random edit whose wording is unambiguous; neither of its scenes is a held-out one.

    Training sees more of those that must find one of two things: they take longest to learn.
    """
    while True:
        before = sample_scene(rng)
        edit = rng.choice((_recoloured, _replaced, _on_other_background))(before, rng)
        is_easy = edit.target is None or len(before.things) == 1
        if is_easy and not held_out and rng.random() < _LEFT_OUT:
            continue
        target_is_clear = edit.target is None or _is_told_apart(before)
        if not target_is_clear or is_held_out(edit.after.canonical()):
            continue
        if is_held_out(edit.canonical()) == held_out:
            return edit


def is_legible(scene: Scene) -> bool:
    """Whether every thing stands out from the background and the things do not touch."""
    if any(thing.colour == scene.background for thing in scene.things):
        return False
    marks = lay_out(scene, 256, 256).marks
    return all(
        (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2
        for a, b in combinations(marks, 2)
    )


def _single(rng: random.Random) -> Scene:
    while True:
        place = "centre" if rng.random() < 0.4 else rng.choice(PLACES)
        scene = Scene((_thing(rng, place),), _background(rng))
        if is_legible(scene):
            return scene


def _pair(rng: random.Random) -> Scene:
    while True:
        first, second = (_thing(rng, place) for place in _pair_of_places(rng))
        if rng.random() < 0.04:
            second = replace(first, place=second.place)
        scene = Scene((first, second), _background(rng))
        if is_legible(scene):
            return scene


def _pair_of_places(rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.4:
        return "left", "right"
    if draw < 0.65:
        return "top", "bottom"
    first, second = sorted(rng.sample(range(len(PLACES)), 2))
    return PLACES[first], PLACES[second]


def _thing(rng: random.Random, place: str) -> Thing:
    size = rng.choice(("medium", "medium", "small", "large"))
    return Thing(rng.choice(SHAPES), rng.choice(COLOUR_NAMES), size, place)


def _background(rng: random.Random) -> str:
    return "white" if rng.random() < 0.35 else rng.choice(COLOUR_NAMES)


def _is_told_apart(scene: Scene) -> bool:
    return len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)


def _recoloured(before: Scene, rng: random.Random) -> Edit:
    target = rng.randrange(len(before.things))
    taken = {before.things[target].colour, before.background}
    colour = rng.choice([name for name in COLOUR_NAMES if name not in taken])
    return Edit(before, _with_thing(before, target, colour=colour), target)


def _replaced(before: Scene, rng: random.Random) -> Edit:
    target = rng.randrange(len(before.things))
    old = before.things[target]
    shape = rng.choice([name for name in SHAPES if name != old.shape])
    colour = old.colour
    if rng.random() < 0.2:
        colour = rng.choice([name for name in COLOUR_NAMES if name != before.background])
    return Edit(before, _with_thing(before, target, shape=shape, colour=colour), target)


def _on_other_background(before: Scene, rng: random.Random) -> Edit:
    taken = {before.background, *(thing.colour for thing in before.things)}
    background = rng.choice([name for name in COLOUR_NAMES if name not in taken])
    return Edit(before, replace(before, background=background), None)


def _with_thing(scene: Scene, target: int, **change: str) -> Scene:
    things = list(scene.things)
    things[target] = replace(things[target], **change)
    return replace(scene, things=tuple(things))
