"""How long a job will take, learnt from the jobs before it.

One number is learnt: seconds per unit of work, as an exponentially weighted mean. A unit of work is
one pixel through one denoising step; text encoding and decoding count as two steps together, and a
reference image makes every step longer by its own pixels, since its tokens run through the
transformer with the picture's.
"""

from __future__ import annotations

from app.domain import ImageSpec

_WEIGHT = 0.3
_FIXED_STEPS = 2


def work(spec: ImageSpec) -> float:
    """Units of work of *spec*; guidance above 1 runs the transformer twice per step."""
    branches = 2 if spec.guidance_scale > 1 else 1
    references = sum(image.width * image.height for image in spec.references)
    steps = spec.num_inference_steps * branches
    return float((spec.pixels + references) * steps + spec.pixels * _FIXED_STEPS)


class Estimator:
    """Learns from finished jobs; says 0 until it has seen one."""

    def __init__(self) -> None:
        self._seconds_per_work = 0.0

    def __repr__(self) -> str:
        return f"<Estimator {self._seconds_per_work:.3e} s per unit>"

    def learn(self, spec: ImageSpec, seconds: float) -> None:
        """Take the *seconds* that *spec* took into the mean."""
        seen = seconds / work(spec)
        if self._seconds_per_work == 0.0:
            self._seconds_per_work = seen
        else:
            self._seconds_per_work += _WEIGHT * (seen - self._seconds_per_work)

    def predict(self, spec: ImageSpec) -> float:
        """Seconds that *spec* will take on the card."""
        return self._seconds_per_work * work(spec)

    def predict_step(self, spec: ImageSpec) -> float:
        """Seconds that one denoising step of *spec* will take."""
        return self.predict(spec) / spec.num_inference_steps
