"""How people say a scene or an edit: many phrasings, all with one meaning.

What a phrase leaves unsaid is medium, in the centre, on white; a thing without a colour is black.
Of two things joined by "and" or "next to" the first is on the left. Knows no pixels.
"""

import random
from typing import NamedTuple

from tools.shapes.scenes import Edit, Scene, Thing

_COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "purple", "purple", "violet")}
_SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "big", "huge"),
}
_SHAPE_WORDS = {
    "circle": ("circle",) * 8 + ("disc", "dot"),
    "diamond": ("diamond",) * 8 + ("rhombus",),
    "cross": ("cross",) * 8 + ("plus sign",),
}
_OPENINGS = (
    *("",) * 22,
    *("a photo of ", "a picture of ", "an image of ", "a drawing of ", "an illustration of "),
    *("draw ", "draw me ", "please draw ", "paint ", "show ", "show me ", "generate ", "create "),
    *("I want ", "I would like ", "there is ", "can you draw ", "picture of ", "photo of "),
)
_ENDINGS = (*("",) * 14, ".", ".", ".", "!", " please", ", please", ", simple", ", flat design")
_BACKGROUNDS_AFTER = (
    *(" on a {} background",) * 6,
    *(" on {}", " against a {} background", " with a {} background", ", {} background"),
    *(" in front of a {} background", " on a {} backdrop", ", background {}"),
)
_BACKGROUNDS_BEFORE = ("on a {} background, ", "{} background, ", "on {}, ", "{} background: ")
_LEFT_RIGHT = (
    "{a} left of {b}",
    "{a} to the left of {b}",
    "{a} on the left of {b}",
    "{b} right of {a}",
    "{b} to the right of {a}",
    "{b} on the right of {a}",
    "{a} on the left and {b} on the right",
    "{a} on the left, {b} on the right",
    "{b} on the right and {a} on the left",
    "{a} left, {b} right",
    "{a} and {b}",
    "{a} and {b}",
    "{a} next to {b}",
    "{a} beside {b}",
    "{a} and {b} side by side",
    "{a}, {b}",
)
_TOP_BOTTOM = (
    "{a} above {b}",
    "{a} above {b}",
    "{b} below {a}",
    "{b} below {a}",
    "{b} under {a}",
    "{b} beneath {a}",
    "{a} over {b}",
    "{a} at the top and {b} at the bottom",
    "{b} at the bottom and {a} at the top",
    "{a} on top, {b} below",
    "{a} with {b} below",
    "{a} with {b} below it",
)
_TWO_PLACES = (
    "{a} {pa} and {b} {pb}",
    "{b} {pb} and {a} {pa}",
    "{a} {pa}, {b} {pb}",
    "{b} {pb}, {a} {pa}",
    "{a} {pa} with {b} {pb}",
)
_CORNER_PHRASES = (*("in the {}",) * 4, "in the {} corner", "at the {}", "{}")
_SIDE_PHRASES = (*("on the {}",) * 4, "on the {} side", "at the {}", "to the {}")
_EDGE_PHRASES = (*("at the {}",) * 4, "in the {}", "on the {}")
_RECOLOUR = (
    *("make {t} {c}",) * 4,
    *("turn {t} {c}", "change {t} to {c}", "paint {t} {c}", "{colour} {t} {c}"),
    *("change the {colour} of {t} to {c}",) * 2,
    *("re{colour} {t} {c}", "re{colour} {t} to {c}", "{t} should be {c}", "set {t} to {c}"),
)
_RECOLOUR_ONLY = ("change the {colour} to {c}", "change {colour} to {c}", "make the {colour} {c}")
_REPLACE = (
    *("replace {t} with {n}",) * 4,
    *("turn {t} into {n}",) * 3,
    *("change {t} into {n}", "change {t} to {n}", "make {t} {n}", "swap {t} for {n}"),
    *("{t} should be {n}", "transform {t} into {n}"),
)
_BACKGROUND = (
    *("make the background {c}",) * 4,
    *("change the background to {c}",) * 2,
    *("turn the background {c}", "set the background to {c}", "the background should be {c}"),
    *("change the background {colour} to {c}", "paint the background {c}", "{c} background"),
    *("use a {c} background", "put it on a {c} background", "on a {c} background"),
)


class Instruction(NamedTuple):
    """An edit in words, and by what it names the thing that it changes."""

    text: str
    names_shape: bool = False
    names_colour: bool = False


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the many prompts for a scene."""
    core = _one(scene.things[0], rng) if len(scene.things) == 1 else _two(scene, rng)
    if scene.background == "white" and rng.random() < 0.8:
        body = core
    elif rng.random() < 0.12:
        body = _articles(rng.choice(_BACKGROUNDS_BEFORE).format(_colour(scene.background, rng)))
        body += core
        return _with_case(body + rng.choice(_ENDINGS), rng)
    else:
        phrase = rng.choice(_BACKGROUNDS_AFTER).format(_colour(scene.background, rng))
        body = core + _articles(phrase)
    return _with_case(rng.choice(_OPENINGS) + body + rng.choice(_ENDINGS), rng)


def instruct(edit: Edit, rng: random.Random) -> Instruction:
    """One of the many instructions that lead from the scene before to the scene after."""
    spelling = rng.choice(("colour", "color"))
    if edit.target is None:
        name = _colour(edit.after.background, rng)
        text = _articles(rng.choice(_BACKGROUND).format(c=name, colour=spelling))
        said = Instruction(text)
    else:
        said = _instruct_thing(edit, edit.target, rng, spelling)
    return said._replace(text=_with_case(said.text + rng.choice(_ENDINGS[:18]), rng))


def _instruct_thing(edit: Edit, target: int, rng: random.Random, spelling: str) -> Instruction:
    old, new = edit.before.things[target], edit.after.things[target]
    named = _mention(edit.before, target, rng)
    if old.shape == new.shape:
        colour = _colour(new.colour, rng)
        if len(edit.before.things) == 1 and rng.random() < 0.2:
            return Instruction(rng.choice(_RECOLOUR_ONLY).format(c=colour, colour=spelling))
        return named._replace(
            text=rng.choice(_RECOLOUR).format(t=named.text, c=colour, colour=spelling)
        )
    shape = rng.choice(_SHAPE_WORDS.get(new.shape, (new.shape,)))
    if old.colour != new.colour:
        shape = f"{_colour(new.colour, rng)} {shape}"
    noun = f"{_article(shape)} {shape}"
    return named._replace(text=rng.choice(_REPLACE).format(t=named.text, n=noun))


def _mention(scene: Scene, target: int, rng: random.Random) -> Instruction:
    thing = scene.things[target]
    others = [other for index, other in enumerate(scene.things) if index != target]
    shape = rng.choice(_SHAPE_WORDS.get(thing.shape, (thing.shape,)))
    if not others and rng.random() < 0.35:
        return Instruction("it")
    if any(other.shape == thing.shape for other in others) or rng.random() < 0.35:
        return Instruction(f"the {_colour(thing.colour, rng)} {shape}", True, True)
    return Instruction(f"the {shape}", True)


def _one(thing: Thing, rng: random.Random) -> str:
    noun = _noun(thing, rng, may_drop_colour=True)
    if thing.place == "centre" and rng.random() < 0.8:
        return noun
    place = _place(thing.place, rng)
    return f"{place}, {noun}" if rng.random() < 0.08 else f"{noun} {place}"


def _two(scene: Scene, rng: random.Random) -> str:
    first, second = scene.things
    places = (first.place, second.place)
    twins = (first.shape, first.colour, first.size) == (second.shape, second.colour, second.size)
    if twins and places == ("left", "right") and rng.random() < 0.7:
        return f"two {_plural(first, rng)}"
    a, b = _noun(first, rng), _noun(second, rng)
    if places == ("left", "right"):
        return rng.choice(_LEFT_RIGHT).format(a=a, b=b)
    if places == ("top", "bottom"):
        return rng.choice(_TOP_BOTTOM).format(a=a, b=b)
    pa, pb = _place(first.place, rng), _place(second.place, rng)
    return rng.choice(_TWO_PLACES).format(a=a, b=b, pa=pa, pb=pb)


def _noun(thing: Thing, rng: random.Random, *, may_drop_colour: bool = False) -> str:
    shape = rng.choice(_SHAPE_WORDS.get(thing.shape, (thing.shape,)))
    colour, size = _colour(thing.colour, rng), _size(thing.size, rng)
    manner = rng.random()
    if may_drop_colour and thing.colour == "black" and manner < 0.3:
        words = f"{size} {shape}"
    elif manner < 0.04:
        words = f"{size} {shape} in {colour}"
    elif manner < 0.08:
        words = f"{size} {shape} that is {colour}"
    elif manner < 0.12:
        words = f"{colour} {size} {shape}"
    elif manner < 0.14:
        words = f"{size} {colour}-{rng.choice(('coloured', 'colored'))} {shape}"
    else:
        words = f"{size} {colour} {shape}"
    words = " ".join(words.split())
    return words if rng.random() < 0.22 else f"{_article(words)} {words}"


def _plural(thing: Thing, rng: random.Random) -> str:
    ending = "es" if thing.shape == "cross" else "s"
    words = f"{_size(thing.size, rng)} {_colour(thing.colour, rng)} {thing.shape}{ending}"
    return " ".join(words.split())


def _size(size: str, rng: random.Random) -> str:
    return "" if size == "medium" and rng.random() < 0.85 else rng.choice(_SIZE_WORDS[size])


def _colour(colour: str, rng: random.Random) -> str:
    return rng.choice(_COLOUR_WORDS.get(colour, (colour,)))


def _place(place: str, rng: random.Random) -> str:
    if place == "centre":
        word = rng.choice(("centre", "center", "middle"))
        return rng.choice((f"in the {word}", f"in the {word}", f"at the {word}"))
    word = place
    if " " in place and rng.random() < 0.2:
        word = place.replace("top", "upper").replace("bottom", "lower")
    if " " in place:
        return rng.choice(_CORNER_PHRASES).format(word)
    return rng.choice(_SIDE_PHRASES if place in ("left", "right") else _EDGE_PHRASES).format(word)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _articles(phrase: str) -> str:
    return f" {phrase}".replace(" a orange", " an orange")[1:]


def _with_case(text: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.30:
        return text[0].upper() + text[1:]
    if draw < 0.33:
        return text.title()
    return text.upper() if draw < 0.34 else text
