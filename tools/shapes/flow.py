"""Training of the text encoder and the transformer: first attributes, then rectified flow.

A picture is determined by its prompt, so the flow is straight and what counts is the transformer's
answer at the few noise levels that a four-step schedule visits; most training happens there.
Knows nothing of drawing: batches come from shelves.
"""

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from tools.shapes.attributes import AttributeHeads, attribute_loss, last_token
from tools.shapes.codec import Pace
from tools.shapes.feed import Order, Packers
from tools.shapes.fitting import Batch, FlatWeights, LossFunction, RunningFigures, Stepper
from tools.shapes.nets import READ_LAYERS, Rotary
from tools.shapes.passes import Operations, text_features, velocity_and_thought
from tools.shapes.shelves import BACKGROUND, CHANGED, PADDING, PLANS, ShelfPlan, Shelves

_log = logging.getLogger(__name__)

# The scheduler's shift at four steps is between 1.93 and 1.97 for all of our sizes.
SHIFT = math.exp(1.96)
_HEADS_SHARE = 0.02
_FINDER_SHARE = 0.1
_SHAPE_WEIGHT = 5.0
_TEXT_RATE, _FLOW_RATE = 1.5e-3, 1.5e-3
_EVERY = 40
_LEAST_RATE = 8.0


class Trainer:
    """Owns both networks' flat weights and all that feeds them; used by one loop."""

    def __init__(
        self,
        text: Qwen3ForCausalLM,
        transformer: Flux2Transformer2DModel,
        codec: AutoencoderKLFlux2,
        packers: Packers,
        *,
        pad: int,
        by: Operations,
        device: torch.device,
        prompt_rotary: Rotary,
        shrink: int = 1,
        plans: tuple[ShelfPlan, ...] = PLANS,
    ) -> None:
        self.text, self.transformer = text, transformer
        self._packers, self._pad, self._by, self._device = packers, pad, by, device
        self._shrink = shrink
        self.heads = AttributeHeads(text.config.hidden_size, len(READ_LAYERS)).to(device)
        self.prompt_rotary = Rotary(*(part.to(device) for part in prompt_rotary))
        core: Any = text.model
        # The layers above the last one that is read, and the final norm, take no part.
        read = [core.embed_tokens, *core.layers[: READ_LAYERS[-1]]]
        parts = [p for part in read for p in part.parameters()]
        self._reading = [*parts, *self.heads.parameters()]
        self._fixed: list[nn.Parameter] = []
        # Says of a reference's tokens what they are to the edit; thrown away in the end.
        self.finder = nn.Linear(transformer.inner_dim, CHANGED + 1).to(device)
        self._drawing = [*transformer.parameters(), *self.finder.parameters()]
        self.weights = FlatWeights([*self._reading, *self._drawing], device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._shelves = Shelves(packers, codec, transformer, device, shrink, plans)

    def values(self) -> list[Tensor]:
        """All weights in the order that `load` takes them."""
        learned = self.weights.split(self.weights.master)
        return [*(parameter.detach() for parameter in self._fixed), *learned]

    def load(self, values: list[Tensor]) -> None:
        """Go on from the weights that `values` gave, before anything was frozen.

        Those of a training without a finder end before its weights, which then start anew.
        """
        self.weights.load([*values, *self.values()[len(values) :]])

    def freeze_text(self) -> None:
        """Train the transformer alone from here on; each prompt is then read only once."""
        self._fixed = self._reading
        for parameter in self._fixed:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(False)
        self.weights = FlatWeights(self._drawing, self._device)
        self._shelves.read = self._read

    def learn_attributes(self, pace: Pace) -> dict[str, float]:
        """Teach the text encoder alone what its prompts say."""
        stepper = Stepper(
            self.weights, self._attribute_loss, pool=self._pool, simpler=self._go_simpler
        )
        prompts = _Prompts(self._packers, self._device, max(8, 512 // self._shrink))
        # Compiling and capturing happen in the first step and shall not eat the phase's time.
        stepper.step(prompts.batch())
        figures, started = RunningFigures(), time.monotonic()
        step, told, right = 0, started, 0.0
        while (passed := (time.monotonic() - started) / pace.seconds) < 1:
            self._set_rate(_TEXT_RATE, step, passed)
            figures.add(stepper.step(prompts.batch()))
            step += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                loss, right, norm = figures.take()
                _log.info(
                    "text step %d: loss %.3f, read without fault %.3f, gradient %.2f",
                    *(step, loss, right, norm),
                )
        self._packers.drop()
        return {"text_steps": step, "text_read_without_fault": right}

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        """What klein reads of prompts [n, 64], many at a time: [n, 64, 192]."""
        rotary = self.prompt_rotary
        parts = torch.split(ids, 256)
        return torch.cat([text_features(self.text, some, self._pad, rotary) for some in parts])

    def learn_flow(
        self,
        pace: Pace,
        span: tuple[float, float],
        every: Callable[[int], None],
        every_s: float = 120.0,
    ) -> dict[str, float]:
        """Teach what is not frozen; `span` is this call's part of the whole schedule.

        `every` is called with the step about every `every_s` seconds, for checks and copies.
        """
        steppers = [
            Stepper(
                self.weights,
                self._flow_loss(shelf.plan),
                pool=self._pool,
                simpler=self._go_simpler,
            )
            for shelf in self._shelves.each
        ]
        self._shelves.stock()
        figures, started = RunningFigures(), time.monotonic()
        step, told, kept, loss, counted = 0, started, started, 0.0, 0
        while (passed := (time.monotonic() - started) / pace.seconds) < 1:
            self._set_rate(_FLOW_RATE, step, span[0] + (span[1] - span[0]) * passed)
            number, batch = self._shelves.pick()
            figures.add(steppers[number].step(batch))
            step += 1
            if step % _EVERY == 0:
                self._shelves.restock()
            if (now := time.monotonic()) - told > 8:
                loss, first, found, asked, *read, norm = figures.take()
                found /= max(asked, 1e-6)
                _log.info(
                    "flow step %d (%.1f/s): loss %.4f, from noise %.4f, found %.3f, norm %.3f%s",
                    *(step, (step - counted) / (now - told), loss, first, found, norm),
                    ", heads {:.3f}, read {:.3f}".format(*read) if read else "",
                )
                self._check(loss, (step - counted) / (now - told), now - started)
                told, counted = now, step
            if now - kept > every_s and pace.seconds * (1 - passed) > 45:
                every(step)
                kept = told = time.monotonic()
                counted = step
        self._shelves.close()
        return {"flow_steps": step, "flow_loss": loss}

    def _check(self, loss: float, rate: float, seconds: float) -> None:
        """Stop at once where going on would waste the card's time."""
        if not math.isfinite(loss):
            raise RuntimeError("the loss is not a number")
        if self._pool is not None and seconds > 100 and rate < _LEAST_RATE:
            raise RuntimeError(f"only {rate:.1f} steps a second")

    def _go_simpler(self) -> bool:
        """Give up the compiler, if that has not happened yet."""
        was_compiled, self._by = self._by != Operations(), Operations()
        return was_compiled

    def _set_rate(self, rate: float, step: int, passed: float) -> None:
        shape = max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, passed))))
        # The gradient of a smaller batch is noisier; the average then looks back less far.
        smaller = self._shrink**-0.5
        self.weights.rate.fill_(rate * smaller * min(1.0, step / 200) * shape)
        self.weights.set_averaging(step, 500 * smaller)

    def _attribute_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = text_features(
            self.text, batch["ids"], self._pad, self.prompt_rotary, by=self._by
        )
        scores = self.heads(features, last_token(batch["ids"], self._pad))
        loss, right = attribute_loss(scores, batch["labels"])
        return loss + _idle(self._drawing), torch.stack((loss, right))

    def _flow_loss(self, plan: ShelfPlan) -> LossFunction:
        def loss(batch: Batch) -> tuple[Tensor, Tensor]:
            clean = batch["clean"].float()
            features = batch.get("features")
            # How well the prompt was read: its loss, and the share read without fault.
            reading: tuple[Tensor, ...] = ()
            if features is None:
                ids, by = batch["ids"], self._by
                features = text_features(self.text, ids, self._pad, self.prompt_rotary, by=by)
                scores = self.heads(features, last_token(ids, self._pad))
                reading = attribute_loss(scores, batch["labels"])
            noise, level = torch.randn_like(clean), sample_levels(len(clean), clean.device)
            at = level[:, None, None]
            tokens = ((1 - at) * clean + at * noise).to(features.dtype)
            if plan.is_edit:
                tokens = torch.cat((tokens, batch["reference"].to(tokens.dtype)), dim=1)
            rotary = Rotary(batch["cos"], batch["sin"])
            answer, thought = velocity_and_thought(
                self.transformer, tokens, features, level, rotary, batch.get("mask"), self._by
            )
            answer = answer[:, : clean.shape[1]].float()
            finding, *found = self._find(thought[:, clean.shape[1] :], batch.get("roles"))
            errors = (answer - (noise - clean)).square().mean(-1) * batch["weights"]
            each = errors.sum(1) / batch["weights"].sum(1)
            from_noise = (level > 0.99).float()
            first = (each * from_noise).sum() / from_noise.sum().clamp(min=1)
            mean = each.mean()
            total = mean + _FINDER_SHARE * finding
            if reading:
                total = total + _HEADS_SHARE * reading[0]
            return total, torch.stack((mean, first, *found, *reading))

        return loss

    def _find(self, thought: Tensor, roles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Have a reference's tokens say what they are to the edit: from that the transformer learns
        which of two things is meant long before its pictures tell.

        The loss, the share of things' tokens that are right, and whether there was a reference.
        """
        nothing = thought.new_zeros((), dtype=torch.float32)
        if roles is None:
            return _idle(self.finder.parameters()), nothing, nothing
        scores = self.finder(F.rms_norm(thought, thought.shape[-1:])).float()
        is_shape = (roles > BACKGROUND).float()
        weights = (1 + (_SHAPE_WEIGHT - 1) * is_shape) * (roles != PADDING)
        each = F.cross_entropy(scores.mT, roles.clamp(min=BACKGROUND), reduction="none")
        right = ((scores.argmax(-1) == roles) * is_shape).sum() / is_shape.sum().clamp(min=1)
        return (each * weights).sum() / weights.sum(), right, nothing + 1


def _idle(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Nothing, by way of *parameters*: all must have a gradient in every step, if only none."""
    return torch.stack([parameter.sum() for parameter in parameters]).sum().float() * 0.0


def sample_levels(count: int, device: torch.device) -> Tensor:
    """Noise levels: pure noise, around the four-step schedule, and anywhere, in three shares."""
    kind = torch.rand(count, device=device)
    steps = (1 + torch.floor(torch.rand(count, device=device) * 4)) / 4
    near = steps + 0.1 * (torch.rand(count, device=device) - 0.5)
    anywhere = torch.rand(count, device=device)
    time_left = torch.where(kind < 0.8, near, anywhere)
    time_left = torch.where(kind < 0.35, torch.ones_like(kind), time_left).clamp(0.01, 1.0)
    return SHIFT * time_left / (1 + (SHIFT - 1) * time_left)


class _Prompts:
    """Batches of prompts alone, from the most recent crates of both kinds."""

    def __init__(self, packers: Packers, device: torch.device, count: int) -> None:
        self._packers, self._device, self._count = packers, device, count
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=48)
        self._seed, self._steps, self._rng = 8_000_000, 0, random.Random(2)

    def batch(self) -> Batch:
        """A batch; now and then a new crate comes in."""
        if self._steps % 4 == 0:
            self._receive()
        self._steps += 1
        ids, labels = self._rng.choice(self._recent)
        chosen = torch.randint(len(ids), (self._count,), device=self._device)
        return {"ids": ids[chosen].long(), "labels": labels[chosen].long()}

    def _receive(self) -> None:
        while self._packers.is_hungry:
            self._seed += 1
            self._packers.ask(Order(16, 16, 1024, self._seed, self._seed % 4 == 0))
        crate = self._packers.take()
        ids = torch.from_numpy(crate.ids).flatten(0, 1).to(self._device)
        self._recent.append((ids, torch.from_numpy(crate.labels).flatten(0, 1).to(self._device)))
