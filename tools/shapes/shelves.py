"""Shelves of encoded scenes: what the flow learns from, always being replaced.

A shelf holds crates that were drawn and encoded once and are used a few times, each with a canvas
size of its own. Tokens are padded to the shelf's capacity and masked, so that one captured step
serves all of its sizes. Knows the codec, not the networks that learn.
"""

import copy
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

from tools.shapes.codec import on_device
from tools.shapes.draw import render
from tools.shapes.feed import PHRASINGS, Crate, Order, Packers
from tools.shapes.fitting import Batch, compute_type
from tools.shapes.nets import TOKEN_PIXELS, Rotary, encode_tokens, rotary_for
from tools.shapes.vocabulary import SEQUENCE_LENGTH

_log = logging.getLogger(__name__)

_OBJECT_WEIGHT = 4.0
_CRATE_SCENES = 1024
# The least coverage of a token's fullest pixel that counts.
_SHOWN = 0.5


@dataclass(frozen=True)
class ShelfPlan:
    """Canvas sizes of up to `capacity` tokens, a batch, and the share of steps taken from there."""

    capacity: int
    batch: int
    share: float
    is_edit: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    crates: int = 24


def _sizes(above: int, upto: int) -> tuple[tuple[int, int], ...]:
    return tuple((r, c) for r, c in product(range(8, 33), repeat=2) if above < r * c <= upto)


PLANS = (
    ShelfPlan(256, 160, 0.40, sizes=((16, 16),), crates=64),
    ShelfPlan(256, 96, 0.14, is_edit=True, sizes=((16, 16),), crates=48),
    ShelfPlan(64, 256, 0.08, sizes=((8, 8),)),
    ShelfPlan(128, 192, 0.06, sizes=_sizes(64, 128)),
    ShelfPlan(256, 144, 0.08, sizes=_sizes(128, 256)),
    ShelfPlan(512, 80, 0.07, sizes=_sizes(256, 512)),
    ShelfPlan(1024, 40, 0.07, sizes=_sizes(512, 1024)),
    ShelfPlan(128, 144, 0.05, is_edit=True, sizes=_sizes(63, 128)),
    ShelfPlan(512, 48, 0.05, is_edit=True, sizes=_sizes(128, 512)),
)


# Edits are learnt last and from fewer samples: for the end of a short training, half of all steps
# and a few more, up to 512x512.
EDIT_PLANS = (
    ShelfPlan(256, 160, 0.22, sizes=((16, 16),), crates=64),
    ShelfPlan(256, 96, 0.24, is_edit=True, sizes=((16, 16),), crates=48),
    ShelfPlan(128, 192, 0.06, sizes=_sizes(63, 128)),
    ShelfPlan(256, 144, 0.07, sizes=_sizes(128, 256)),
    ShelfPlan(512, 80, 0.06, sizes=_sizes(256, 512)),
    ShelfPlan(1024, 40, 0.05, sizes=_sizes(512, 1024)),
    ShelfPlan(64, 160, 0.10, is_edit=True, sizes=((8, 8),), crates=48),
    ShelfPlan(128, 144, 0.11, is_edit=True, sizes=_sizes(63, 128)),
    ShelfPlan(512, 48, 0.05, is_edit=True, sizes=_sizes(128, 512)),
    ShelfPlan(1024, 24, 0.04, is_edit=True, sizes=_sizes(512, 1024)),
)

# For a processor, where 256x256 costs four times what 128x128 does: first small canvases.
SMALL_PLANS = (
    ShelfPlan(64, 256, 0.40, sizes=((8, 8),), crates=64),
    ShelfPlan(128, 192, 0.26, sizes=_sizes(64, 128), crates=48),
    ShelfPlan(256, 160, 0.10, sizes=((16, 16),)),
    ShelfPlan(64, 160, 0.12, is_edit=True, sizes=((8, 8),), crates=48),
    ShelfPlan(128, 144, 0.12, is_edit=True, sizes=_sizes(63, 128)),
)

# The same for edits: finding one of two things takes many steps, which small pictures make cheap.
SMALL_EDIT_PLANS = (
    ShelfPlan(64, 160, 0.42, is_edit=True, sizes=((8, 8),), crates=96),
    ShelfPlan(128, 144, 0.20, is_edit=True, sizes=_sizes(64, 128), crates=48),
    ShelfPlan(256, 96, 0.10, is_edit=True, sizes=((16, 16),)),
    ShelfPlan(64, 256, 0.08, sizes=((8, 8),)),
    ShelfPlan(128, 192, 0.06, sizes=_sizes(64, 128)),
    ShelfPlan(256, 160, 0.14, sizes=((16, 16),), crates=48),
)


# What a token of a reference shows; the last is to be changed.
BACKGROUND, KEPT, CHANGED, PADDING = 0, 1, 2, -1


def roles_of(coverage: Tensor, marks: Tensor) -> Tensor:
    """What each token of a reference is to an edit, [n, tokens], one of the four above.

    `coverage` [n, marks, height, width] is the reference's, `marks` [n, 2, marks, 7] are before
    and after.
    """
    cover, which = F.max_pool2d(coverage, TOKEN_PIXELS).flatten(2).max(dim=1)
    changed = (marks[:, 0] != marks[:, 1]).any(-1)
    roles = torch.where(changed.gather(1, which), CHANGED, KEPT)
    return torch.where(cover > _SHOWN, roles, BACKGROUND).to(torch.int8)


@dataclass(frozen=True)
class _Goods:
    """One crate on the device: latents of each picture, weights of the last, prompts.

    `features` [n, phrasings, 64, 192] is there where the text encoder is frozen, `roles`
    [n, tokens] (see `roles_of`) where there is a reference.
    """

    latents: Tensor
    weights: Tensor
    ids: Tensor
    labels: Tensor
    features: Tensor | None
    roles: Tensor | None
    rotary: Rotary
    mask: Tensor


class Shelf:
    """The crates of one plan, oldest replaced first."""

    def __init__(self, plan: ShelfPlan, number: int, shrink: int) -> None:
        self.plan = plan
        self.batch = max(2, plan.batch // shrink)
        self._goods: deque[_Goods] = deque(maxlen=plan.crates)
        self._rng = random.Random(number)
        self._scenes = max(8, min(_CRATE_SCENES, _CRATE_SCENES * 256 // plan.capacity) // shrink)
        self._seed = (number + 1) * 1_000_000

    def order(self) -> Order:
        """What this shelf wants next: a size of its own for each crate, squares more often."""
        sizes = self.plan.sizes
        squares = [size for size in sizes if size[0] == size[1]]
        few = squares if squares and self._rng.random() < 0.3 else sizes
        rows, columns = self._rng.choice(few)
        self._seed += 1
        return Order(rows, columns, self._scenes, self._seed, self.plan.is_edit)

    def put(self, goods: _Goods) -> None:
        """Add a crate."""
        self._goods.append(goods)

    def batch_of(self, rng: random.Random) -> Batch:
        """A batch from one random crate, as the captured step wants it."""
        goods = rng.choice(self._goods)
        device = goods.latents.device
        chosen = torch.randint(len(goods.latents), (self.batch,), device=device)
        phrasing = torch.randint(PHRASINGS, (self.batch,), device=device)
        if goods.features is None:
            prompts = {
                "ids": goods.ids[chosen, phrasing].long(),
                "labels": goods.labels[chosen, phrasing].long(),
            }
        else:
            prompts = {"features": goods.features[chosen, phrasing]}
        batch = prompts | {
            "clean": goods.latents[chosen, -1],
            "weights": goods.weights[chosen],
            "cos": goods.rotary.cos,
            "sin": goods.rotary.sin,
        }
        if self.plan.is_edit:
            batch["reference"] = goods.latents[chosen, 0]
            assert goods.roles is not None
            batch["roles"] = goods.roles[chosen].long()
        if len(self.plan.sizes) > 1:
            batch["mask"] = goods.mask
        return batch


class Shelves:
    """All shelves, and the making of their crates; used by one training loop."""

    def __init__(
        self,
        packers: Packers,
        codec: AutoencoderKLFlux2,
        transformer: Flux2Transformer2DModel,
        device: torch.device,
        shrink: int,
        plans: tuple[ShelfPlan, ...],
    ) -> None:
        self.read: Callable[[Tensor], Tensor] | None = None
        self._packers, self._transformer = packers, transformer
        self._codec = codec
        if device.type == "cpu":
            # Three times as fast, and the decoder forgives far more than the rounding.
            self._codec = copy.deepcopy(codec).to(compute_type(device))
            self._codec.to(memory_format=torch.channels_last)
            self._codec.bn = codec.bn
        self._device, self._shrink = device, shrink
        self.each = [Shelf(plan, number, shrink) for number, plan in enumerate(plans)]
        self._shares = [shelf.plan.share for shelf in self.each]
        self._due: deque[Shelf] = deque()
        self._rng = random.Random(0)

    def pick(self) -> tuple[int, Batch]:
        """A shelf's number, by the shelves' shares, and a batch from it."""
        number = self._rng.choices(range(len(self.each)), self._shares)[0]
        return number, self.each[number].batch_of(self._rng)

    def stock(self) -> None:
        """Put some crates on every shelf before the first step."""
        started = time.monotonic()
        few = (4, 2) if self._shrink > 1 else (10, 3)
        for shelf in self.each:
            for _ in range(few[0] if len(shelf.plan.sizes) == 1 else few[1]):
                self._due.append(shelf)
                self._packers.ask(shelf.order())
        while self._due:
            self._receive()
        _log.info("shelves stocked in %.1f s", time.monotonic() - started)
        self._keep_asking()

    def restock(self) -> None:
        """Replace the oldest crate of the shelf whose turn it is."""
        self._receive()
        self._keep_asking()

    def close(self) -> None:
        """Forget what was ordered."""
        self._packers.drop()
        self._due.clear()

    def _receive(self) -> None:
        shelf = self._due.popleft()
        shelf.put(self._loaded(self._packers.take(), shelf.plan.capacity))

    def _keep_asking(self) -> None:
        while self._packers.is_hungry:
            shelf = self._rng.choices(self.each, self._shares)[0]
            self._due.append(shelf)
            self._packers.ask(shelf.order())

    @torch.no_grad()
    def _loaded(self, crate: Crate, capacity: int) -> _Goods:
        """Draw and encode a crate, and pad it to its shelf's capacity."""
        order, device = crate.order, self._device
        marks, backgrounds = on_device(crate, device)
        size = (order.columns * TOKEN_PIXELS, order.rows * TOKEN_PIXELS)
        latents, touched, roles = [], [], []
        # A card wants much at once, a processor what its cache holds.
        most = 256 * 256 if device.type == "cuda" else 4 * 256
        at_once = max(1, most // (order.rows * order.columns))
        for at in range(0, len(marks), at_once):
            some = slice(at, at + at_once)
            drawn = [
                render(marks[some, i], backgrounds[some, i], *size) for i in range(marks.shape[1])
            ]
            codes = [encode_tokens(self._codec, image) for image, _ in drawn]
            latents.append(torch.stack(codes, 1))
            touched.append(F.max_pool2d(drawn[-1][1].amax(1, keepdim=True), TOKEN_PIXELS))
            if order.is_edit:
                roles.append(roles_of(drawn[0][1], marks[some]))
        real = order.rows * order.columns
        weights = 1 + _OBJECT_WEIGHT * torch.cat(touched).flatten(1).ceil()
        padding = (0, capacity - real)
        ids = torch.from_numpy(crate.ids).to(device)
        features = None
        if self.read is not None:
            features = torch.unflatten(self.read(ids.flatten(0, 1).long()), 0, ids.shape[:2])
        return _Goods(
            F.pad(torch.cat(latents), (0, 0, *padding)).to(compute_type(device)),
            F.pad(weights, padding),
            ids,
            torch.from_numpy(crate.labels).to(device),
            features,
            F.pad(torch.cat(roles), padding, value=PADDING) if roles else None,
            *self._positions(order, capacity),
        )

    def _positions(self, order: Order, capacity: int) -> tuple[Rotary, Tensor]:
        """Rotary positions and the mask, with padding after each picture's tokens."""
        pictures = 1 + order.is_edit
        real = order.rows * order.columns
        plain = rotary_for(self._transformer, order.rows, order.columns, references=pictures - 1)
        index = list(range(SEQUENCE_LENGTH))
        mask = [True] * SEQUENCE_LENGTH
        for picture in range(pictures):
            start = SEQUENCE_LENGTH + picture * real
            index += [*range(start, start + real), *[0] * (capacity - real)]
            mask += [True] * real + [False] * (capacity - real)
        chosen = torch.tensor(index)
        rotary = Rotary(plain.cos[chosen].to(self._device), plain.sin[chosen].to(self._device))
        return rotary, torch.tensor(mask, device=self._device)
