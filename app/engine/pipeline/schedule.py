"""The noise levels of an image's steps, as klein's scheduler and pipeline compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

_PLAIN = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "time_shift_type": "exponential",
}
_LONG = 4300
"""More tokens than so are shifted alike at any number of steps."""


Schedule = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""Returns, of a number of steps and of tokens, the sigmas, one more than the steps, and the
timesteps in 0..1000, float32 on the model's device."""


def make_schedule(config: Mapping[str, Any], device: torch.device) -> Schedule:
    """Return the schedule of a scheduler's *config*: ours for klein's own, else diffusers'."""
    named = all(config.get(name, usual) == usual for name, usual in _PLAIN.items())
    is_plain = named and bool(config.get("use_dynamic_shifting"))
    return partial(_own if is_plain else _librarys, config, device)


def shift_of(tokens: int, steps: int) -> float:
    """Return mu, fitted by klein's authors (`compute_empirical_mu` of diffusers' pipeline)."""
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    if tokens > _LONG:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)


def _own(
    config: Mapping[str, Any], device: torch.device, steps: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute in numpy's float32, as `FlowMatchEulerDiscreteScheduler` does."""
    levels = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shift = math.exp(shift_of(tokens, steps))
    shifted = torch.from_numpy(shift / (shift + (1 / levels - 1)))
    sigmas = shifted.to(dtype=torch.float32, device=device)
    timesteps = sigmas * config.get("num_train_timesteps", 1000)
    return torch.cat([sigmas, torch.zeros(1, device=device)]), timesteps


def _librarys(
    config: Mapping[str, Any], device: torch.device, steps: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask diffusers' scheduler."""
    # Imports torch's compiler, which takes seconds.
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = shift_of(tokens, steps)
    if getattr(scheduler.config, "use_flow_sigmas", False):
        scheduler.set_timesteps(steps, device=device, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    return scheduler.sigmas, scheduler.timesteps
