"""How long a job will take."""

import pickle
import random
from dataclasses import dataclass, replace

import pytest

from app.domain import ImageSpec, RawImage
from app.jobs.estimate import Estimator, work

SPEC = ImageSpec("x", 1024, 1024, 4, 1.0, 0)
TINY = replace(SPEC, width=64, height=64)
LARGE = replace(SPEC, width=2048, height=2048)


@dataclass(frozen=True)
class Machine:
    """A card that takes *fixed_s* for each picture and *megapixel_s* for 1024x1024 besides."""

    fixed_s: float
    megapixel_s: float
    noise: float = 0.0

    def seconds(self, spec: ImageSpec, chance: random.Random) -> float:
        true_s = self.fixed_s + self.megapixel_s * work(spec) / work(SPEC)
        return true_s * chance.uniform(1 - self.noise, 1 + self.noise)


MACHINES = {
    "a large card": Machine(0.1, 0.5),
    "a small card": Machine(0.4, 8.0),
    "mostly overhead": Machine(1.0, 0.05),
    "no overhead": Machine(0.0, 2.0),
    "a noisy card": Machine(0.1, 0.5, noise=0.2),
}


def test_before_the_first_picture_it_says_nothing() -> None:
    """Zero, so that no request is refused for a guess."""
    assert Estimator().predict(SPEC) == 0.0


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1.0),
        ({"width": 512, "height": 512}, 0.25),
        ({"num_inference_steps": 10}, 2.0),
        ({"guidance_scale": 4.0}, 10 / 6),
        ({"references": (RawImage(1024, 1024, b""),)}, 10 / 6),
    ],
)
def test_it_scales_with_the_work(change, factor) -> None:
    """Pixels, steps, branches and references each count."""
    estimator = Estimator()
    estimator.learn(SPEC, 3.0)

    assert estimator.predict(replace(SPEC, **change)) == pytest.approx(3.0 * factor)


def test_it_follows_a_change_of_speed() -> None:
    """A card that throttles to half its speed is believed within ten pictures."""
    estimator = Estimator()
    estimator.learn(SPEC, 1.0)
    for _ in range(10):
        estimator.learn(SPEC, 2.0)

    assert estimator.predict(SPEC) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_it_learns_what_every_picture_costs_beside_what_its_pixels_cost(machine) -> None:
    """After twenty pictures of mixed sizes, ones it has and ones it has not seen are predicted
    within a fifth, or a tenth of a second, of the truth; with a card as noisy as that, within
    two fifths."""
    chance, estimator = random.Random(7), Estimator()
    sides = (1024, 512, 768, 256)
    for turn in range(20):
        spec = replace(SPEC, width=sides[turn % 4], height=sides[turn % 4])
        estimator.learn(spec, machine.seconds(spec, chance))

    for side in (64, 256, 640, 1024, 1536, 2048):
        spec = replace(SPEC, width=side, height=side)
        true_s = replace(machine, noise=0.0).seconds(spec, chance)
        assert estimator.predict(spec) == pytest.approx(true_s, rel=0.2 + machine.noise, abs=0.1)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_tiny_pictures_do_not_change_what_is_known_of_large_ones(machine) -> None:
    """Twenty of 64x64 after the warm-up, and a picture of the default size is predicted as
    before."""
    chance, estimator = random.Random(7), Estimator()
    estimator.learn(SPEC, machine.seconds(SPEC, chance))
    before_s = estimator.predict(SPEC)
    for _ in range(20):
        estimator.learn(TINY, machine.seconds(TINY, chance))

    assert estimator.predict(SPEC) == pytest.approx(before_s, rel=0.1)
    true_s = replace(machine, noise=0.0).seconds(TINY, chance)
    assert estimator.predict(TINY) == pytest.approx(true_s, rel=0.25, abs=0.02)


def test_tiny_pictures_of_many_kinds_do_not_either() -> None:
    """A thousand small ones of every shape and number of steps, from a noisy card: the default
    size is predicted within a tenth of what it took."""
    chance, estimator = random.Random(7), Estimator()
    machine = Machine(0.1, 0.5, noise=0.3)
    estimator.learn(SPEC, 0.6)
    for _ in range(1000):
        width, height = (16 * chance.randint(4, 16) for _ in range(2))
        spec = replace(SPEC, width=width, height=height, num_inference_steps=chance.randint(1, 4))
        estimator.learn(spec, machine.seconds(spec, chance))

    assert estimator.predict(SPEC) == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize("spec", [TINY, SPEC, LARGE], ids=["tiny", "default", "large"])
@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_one_picture_that_something_held_up_changes_little(spec, factor) -> None:
    """A size's first picture, or somebody else on the card: after it no size is predicted at
    more than twice what it was, or than the next larger one took, and after three more at what it
    is."""
    chance, estimator = random.Random(7), Estimator()
    machine = MACHINES["a large card"]
    for _ in range(3):
        for known in (SPEC, replace(SPEC, width=512, height=512)):
            estimator.learn(known, machine.seconds(known, chance))

    estimator.learn(spec, factor * machine.seconds(spec, chance))
    for asked in (TINY, SPEC, LARGE):
        larger_s = machine.seconds(replace(SPEC, width=512, height=512), chance)
        most_s = max(2.01 * machine.seconds(asked, chance), larger_s)
        assert estimator.predict(asked) <= most_s
    for _ in range(3):
        estimator.learn(spec, machine.seconds(spec, chance))
    for asked in (TINY, SPEC, LARGE):
        assert estimator.predict(asked) == pytest.approx(machine.seconds(asked, chance), rel=0.1)


def test_a_first_picture_that_was_held_up_is_soon_forgotten() -> None:
    """A minute for the first and 0.6 s for each after it: after two of them it is believed."""
    estimator = Estimator()
    estimator.learn(SPEC, 60.0)
    for _ in range(2):
        estimator.learn(SPEC, 0.6)

    assert estimator.predict(SPEC) == pytest.approx(0.6, rel=0.1)


def test_a_slower_card_is_believed_though_other_sizes_were_faster() -> None:
    """Half the speed for one size, long after another was seen: within ten pictures it is
    believed for the one that is asked for."""
    estimator = Estimator()
    for _ in range(5):
        estimator.learn(SPEC, 0.6)
        estimator.learn(replace(SPEC, width=512, height=512), 0.2)
    for _ in range(10):
        estimator.learn(SPEC, 1.2)

    assert estimator.predict(SPEC) == pytest.approx(1.2, rel=0.05)


def test_it_keeps_few_samples_whatever_it_is_taught() -> None:
    """Three thousand pictures of all sizes, and it is still no more than a few kilobytes."""
    chance, estimator = random.Random(7), Estimator()
    for _ in range(3000):
        width, height = (16 * chance.randint(4, 128) for _ in range(2))
        estimator.learn(replace(SPEC, width=width, height=height), 0.6)

    assert len(pickle.dumps(estimator)) < 4096
