"""Predict how long a job takes, by linear regression over finished jobs.

The model is `seconds = fixed + slope * work`, both terms at least zero. A unit of work is one pixel
through one denoising step; text encoding and decoding count as two steps together, and a reference
image adds its own pixels to every step, since its tokens run through the transformer too.

Images are binned by work into ranges, each twice as wide as the one below, and each range is one
point of the fit: the median of its last few samples. So a thousand small images weigh no more than
one large one, and an outlier (a size's first picture, another process uses the GPU) is outvoted by
the next samples. The fit minimises relative errors and weighs down ranges without recent samples.
A prediction is scaled to the point of its own range, where it has one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from app.domain import ImageSpec

_FIXED_STEPS = 2
_REMEMBERED = 5
"""Samples kept per range; three of them move the median."""
_HALF_LIFE = 16
"""A range's weight halves with this many samples of other ranges."""
_LEAST_WEIGHT = 0.05
_MOST_GROWTH = 2.0
"""A sample counts as at most this many times its prediction."""
_SHORTEST_S = 1e-4


def work(spec: ImageSpec) -> float:
    """Compute the work of *spec*; guidance above 1 runs the transformer twice per step."""
    branches = 2 if spec.guidance_scale > 1 else 1
    references = sum(image.width * image.height for image in spec.references)
    steps = spec.num_inference_steps * branches
    return float((spec.pixels + references) * steps + spec.pixels * _FIXED_STEPS)


class _Range:
    """The last samples (work, seconds) of similar work, and the count at the latest."""

    def __init__(self) -> None:
        self.samples: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self.seen_at = 0
        self.point = (0.0, 0.0)

    def add(self, units: float, seconds: float, at: int) -> None:
        self.samples.append((units, seconds))
        self.seen_at = at
        by_rate = sorted(self.samples, key=lambda sample: sample[1] / sample[0])
        # The lower median: noise only ever makes an image slower.
        self.point = by_rate[(len(by_rate) - 1) // 2]


class Estimator:
    """Learns from finished jobs; predicts 0 before the first."""

    def __init__(self) -> None:
        self._ranges: dict[int, _Range] = {}
        self.count = 0
        """The samples."""
        self._fixed_s = 0.0
        self._slope_s = 0.0

    def __repr__(self) -> str:
        return f"<Estimator {self._fixed_s:.3e} s and {self._slope_s:.3e} s per unit>"

    def learn(self, spec: ImageSpec, seconds: float) -> None:
        """Add a sample: *spec* took *seconds*.

        The sample is clipped to twice its prediction or to what the next larger range took,
        whichever is more, so that one outlier changes little.
        """
        units = work(spec)
        seconds = max(_SHORTEST_S, min(seconds, self._most_s(units)))
        self.count += 1
        self._ranges.setdefault(_range_of(units), _Range()).add(units, seconds, self.count)
        self._fixed_s, self._slope_s = _fit(
            [(*known.point, self._weight(known)) for known in self._ranges.values()]
        )

    def predict(self, spec: ImageSpec) -> float:
        """Predict the seconds of *spec* on the GPU."""
        return self._predict(work(spec))

    def predict_step(self, spec: ImageSpec) -> float:
        """Predict an upper bound of the seconds of one denoising step of *spec*."""
        return self.predict(spec) / spec.num_inference_steps

    def _predict(self, units: float) -> float:
        line_s = self._fixed_s + self._slope_s * units
        known = self._ranges.get(_range_of(units))
        if known is None:
            return line_s
        known_units, known_s = known.point
        return line_s * known_s / (self._fixed_s + self._slope_s * known_units)

    def _most_s(self, units: float) -> float:
        """Return the seconds to which a sample of *units* is clipped."""
        if not self._ranges:
            return math.inf
        larger = [index for index in self._ranges if index > _range_of(units)]
        next_s = self._ranges[min(larger)].point[1] if larger else 0.0
        return max(_MOST_GROWTH * self._predict(units), next_s)

    def _weight(self, known: _Range) -> float:
        halved: float = 0.5 ** ((self.count - known.seen_at) / _HALF_LIFE)
        return max(_LEAST_WEIGHT, halved)


class Estimates:
    """An estimator for each device: two of a kind may differ, by their cooling for example.

    *reference* is the spec by which speeds are compared.
    """

    def __init__(self, reference: ImageSpec) -> None:
        self._reference = reference
        self._devices: dict[str, Estimator] = {}
        self._known: dict[str, tuple[int, float]] = {}
        """Of each device how many samples there were, and the reference's prediction then."""

    def __repr__(self) -> str:
        return f"<Estimates {self._devices}>"

    def of(self, uuid: str) -> Estimator:
        """Return the estimator of a device."""
        return self._devices.setdefault(uuid, Estimator())

    def predict(self, spec: ImageSpec) -> float:
        """Predict the seconds of *spec* on the fastest device; 0 before the first image."""
        known = (each for each in self._devices.values() if each.count)
        return min((each.predict(spec) for each in known), default=0.0)

    def speed(self, uuid: str) -> float:
        """Return a device's speed relative to the fastest; 1 before its first image."""
        own_s = self._reference_s(uuid)
        return min(filter(None, map(self._reference_s, self._devices))) / own_s if own_s else 1.0

    def _reference_s(self, uuid: str) -> float:
        estimator = self._devices[uuid]
        count, seconds = self._known.get(uuid, (0, 0.0))
        if count != estimator.count:
            seconds = estimator.predict(self._reference)
            self._known[uuid] = estimator.count, seconds
        return seconds


def _range_of(units: float) -> int:
    return math.frexp(units)[1]


def _fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit a line by weighted least squares of relative errors, both terms at least zero."""
    ones = sum(weight / y**2 for _, y, weight in points)
    x1 = sum(weight * x / y**2 for x, y, weight in points)
    x2 = sum(weight * (x / y) ** 2 for x, y, weight in points)
    y1 = sum(weight / y for _, y, weight in points)
    xy = sum(weight * x / y for x, y, weight in points)
    determinant = ones * x2 - x1 * x1
    if determinant <= 1e-9 * ones * x2:
        return 0.0, xy / x2
    fixed = (y1 * x2 - xy * x1) / determinant
    slope = (ones * xy - x1 * y1) / determinant
    if fixed < 0.0:
        return 0.0, xy / x2
    if slope < 0.0:
        return y1 / ones, 0.0
    return fixed, slope
