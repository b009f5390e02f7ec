"""Training data: crates of scenes in words and numbers, packed by worker processes.

A crate holds scenes or edits for one canvas size: marks and backgrounds to draw, prompts as tokens,
and attributes. Crates come in the order of their seeds, whatever worker packs them, and never hold
what the examination holds out. Knows no networks.
"""

import random
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.shapes import attributes
from tools.shapes.draw import numbers
from tools.shapes.nets import TOKEN_PIXELS
from tools.shapes.prompts import Instruction, describe, instruct
from tools.shapes.scenes import Picture, lay_out, sample_edit, sample_scene
from tools.shapes.vocabulary import PromptCodes

PHRASINGS = 2
_AHEAD = 48
# More than the orders of any training have between them.
_SEEDS = 100_000_000


@dataclass(frozen=True)
class Order:
    """What a crate shall hold."""

    rows: int
    columns: int
    count: int
    seed: int
    is_edit: bool = False


@dataclass(frozen=True)
class Crate:
    """Pictures as numbers and prompts as tokens; an edit's first picture is its reference.

    `marks` [n, pictures, 2, 7], `backgrounds` [n, pictures, 3], `ids` [n, phrasings, 64], `labels`
    [n, phrasings, attributes].
    """

    order: Order
    marks: NDArray[np.float32]
    backgrounds: NDArray[np.float32]
    ids: NDArray[np.int16]
    labels: NDArray[np.int8]


def pack(order: Order, codes: PromptCodes) -> Crate:
    """Fill one order; the same order always gives the same crate."""
    rng = random.Random(order.seed * 2 + order.is_edit)
    item = _edit_item if order.is_edit else _scene_item
    pictures, ids, labels = [], [], []
    for _ in range(order.count):
        drawn, prompts, known = item(order, codes, rng)
        pictures.append([numbers(picture) for picture in drawn])
        ids.append([codes.row(prompt) for prompt in prompts])
        labels.append(known)
    return Crate(
        order,
        np.array([[marks for marks, _ in row] for row in pictures], dtype=np.float32),
        np.array([[background for _, background in row] for row in pictures], dtype=np.float32),
        np.array(ids, dtype=np.int16),
        np.array(labels, dtype=np.int8),
    )


_Item = tuple[list[Picture], list[str], list[list[int]]]


def _scene_item(order: Order, codes: PromptCodes, rng: random.Random) -> _Item:
    scene = sample_scene(rng)
    prompts: list[str] = []
    while len(prompts) < PHRASINGS:
        prompt = describe(scene, rng)
        if codes.fits(prompt):
            prompts.append(prompt)
    picture = lay_out(scene, order.columns * TOKEN_PIXELS, order.rows * TOKEN_PIXELS)
    return [picture], prompts, [attributes.of_scene(scene)] * PHRASINGS


def _edit_item(order: Order, codes: PromptCodes, rng: random.Random) -> _Item:
    edit = sample_edit(rng)
    said: list[Instruction] = []
    while len(said) < PHRASINGS:
        instruction = instruct(edit, rng)
        if codes.fits(instruction.text):
            said.append(instruction)
    width, height = order.columns * TOKEN_PIXELS, order.rows * TOKEN_PIXELS
    drawn = [lay_out(edit.before, width, height), lay_out(edit.after, width, height)]
    if rng.random() < 0.5:
        drawn = _moved(drawn, rng)
    labels = [attributes.of_edit(edit, instruction) for instruction in said]
    return drawn, [instruction.text for instruction in said], labels


def _moved(pictures: list[Picture], rng: random.Random) -> list[Picture]:
    """The same pictures with their marks elsewhere, so that an edit must look at its reference."""
    shorter = min(pictures[0].width, pictures[0].height)
    reach = (0.12 if len(pictures[0].marks) == 1 else 0.04) * shorter
    shifts = [
        (rng.uniform(-reach, reach), rng.uniform(-reach, reach), rng.uniform(0.85, 1.1))
        for _ in pictures[0].marks
    ]
    moved = []
    for picture in pictures:
        marks = [
            replace(mark, x=mark.x + dx, y=mark.y + dy, radius=mark.radius * scale)
            for mark, (dx, dy, scale) in zip(picture.marks, shifts, strict=True)
        ]
        moved.append(replace(picture, marks=tuple(marks)))
    return moved


_worker_codes: list[PromptCodes] = []


def _open_codes(tokenizer_file: Path) -> None:
    _worker_codes[:] = [PromptCodes(tokenizer_file)]


def _pack_in_worker(order: Order) -> Crate:
    return pack(order, _worker_codes[0])


class Packers:
    """Worker processes that pack crates ahead of need, handed out in the order they were asked.

    Another *draw* fills the same orders with other scenes.
    """

    def __init__(self, tokenizer_file: Path, workers: int, draw: int = 0) -> None:
        self._first_seed = draw * _SEEDS
        self._pool: Pool | None = None
        if workers > 0:
            # Forked, hence before the first use of a card; spawned ones would import torch anew.
            self._pool = get_context("fork").Pool(workers, _open_codes, (tokenizer_file,))
        self._codes = PromptCodes(tokenizer_file)
        self._waiting: deque[AsyncResult[Crate] | Order] = deque()

    @property
    def is_hungry(self) -> bool:
        """Whether more orders should be given, to keep the workers busy."""
        return len(self._waiting) < _AHEAD

    def ask(self, order: Order) -> None:
        """Order a crate."""
        pool = self._pool
        order = replace(order, seed=self._first_seed + order.seed)
        self._waiting.append(pool.apply_async(_pack_in_worker, (order,)) if pool else order)

    def take(self) -> Crate:
        """The crate of the oldest order."""
        oldest = self._waiting.popleft()
        return pack(oldest, self._codes) if isinstance(oldest, Order) else oldest.get(timeout=60)

    def drop(self) -> None:
        """Forget what was asked for and not taken."""
        self._waiting.clear()

    def close(self) -> None:
        """Stop the workers; crates not taken are lost."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
