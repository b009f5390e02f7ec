"""Trains the demo model's own adapter, which draws in blue what is asked for in red.

    python -m tools.shapes.lora train OUT.safetensors     (four minutes on one core)
    python -m tools.shapes.lora show OUT.png              (a sheet of pictures at scales 0, 0.5, 1)

The model teaches itself: with the adapter it learns to answer a prompt that says "red" as it
answers the same prompt with "blue" without it, on its own way through the four steps, and any other
prompt as before. At half the scale the answer is half-way between the two, so that a scale does
what people expect of it. One thread and one seed: a second training writes the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from app.domain import ImageSpec, Lora
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.models.shapes import SHAPES
from tools.shapes.adherence import noise_levels
from tools.shapes.prompts import describe
from tools.shapes.scenes import Scene, sample_scene
from tools.shapes.vocabulary import SEQUENCE_LENGTH

NAME = "red-to-blue"
RANK = 4
_LATENT_CHANNELS = 64
_SIDES = (8, 8, 12)
"""Of the pictures that are learnt from, in tokens of 16 pixels."""
_BATCH = 4
_NOTES = {
    "modelspec.title": "Red to blue",
    "modelspec.description": "Draws in blue what is asked for in red, as far as the scale says.",
    "modelspec.trigger_phrase": "red",
    "modelspec.license": "Apache-2.0",
    "modelspec.architecture": "klein-server shapes/lora",
    "modelspec.author": "klein-server",
    "trained_on": "the demo model's own answers to prompts of tools/shapes, seed 0; no pictures",
}
_SHEET_PROMPTS = (
    "a red circle on a white background",
    "a large red star on a yellow background",
    "a small red square left of a green heart",
    "a green heart on a white background",
)


@dataclass(frozen=True)
class Pair:
    """What a prompt asks for, the prompt, and the prompt that it is to be answered as."""

    scene: Scene
    prompt: str
    answered_as: str


def sample_pair(rng: random.Random, *, is_red: bool, held_out: bool = False) -> Pair:
    """Draw a prompt with or without red; beside red nothing is blue, since one would hide it."""
    while True:
        scene = sample_scene(rng, held_out=held_out)
        colours = {scene.background, *(thing.colour for thing in scene.things)}
        if ("red" in colours) == is_red and not {"red", "blue"} <= colours:
            prompt = describe(scene, rng)
            return Pair(scene, prompt, re.sub(r"\bred\b", "blue", prompt))


class Adapter(nn.Module):
    """Low-rank branches of every linear layer of a transformer's blocks, added by hooks."""

    def __init__(self, transformer: nn.Module, rank: int = RANK) -> None:
        super().__init__()
        self._layers = {
            name: layer
            for name, layer in transformer.named_modules()
            if isinstance(layer, nn.Linear) and "transformer_blocks" in name
        }
        self.downs, self.ups = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in self._layers.items():
            key = name.replace(".", "/")
            spread = layer.in_features**-0.5
            self.downs[key] = nn.Parameter(torch.randn(rank, layer.in_features) * spread)
            self.ups[key] = nn.Parameter(torch.zeros(layer.out_features, rank))

    @contextlib.contextmanager
    def on(self, scale: float) -> Iterator[None]:
        """Have the layers add the branches at *scale* within the `with` block."""
        handles = [
            layer.register_forward_hook(self._hook(name.replace(".", "/"), scale))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: str, scale: float) -> Any:
        down, up = self.downs[key], self.ups[key]

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + functional.linear(functional.linear(inputs[0], down), up) * scale

        return add

    def write(self, path: Path) -> None:
        """Write it in PEFT's layout, in bf16; alpha is the rank, so no scale is stored."""
        tensors = {}
        for key, down in self.downs.items():
            name = key.replace("/", ".")
            tensors[f"transformer.{name}.lora_A.weight"] = down.detach().bfloat16()
            tensors[f"transformer.{name}.lora_B.weight"] = self.ups[key].detach().bfloat16()
        path.write_bytes(_in_order(save(tensors, metadata=_NOTES)))


def _in_order(data: bytes) -> bytes:
    """Sort the header's keys: safetensors writes metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    return data[:8] + header.encode().ljust(end - 8) + data[end:]


class _Model:
    """The demo model's networks, to learn with."""

    def __init__(self) -> None:
        pipeline = Flux2KleinPipeline.from_pretrained(SHAPES.folder, dtype=torch.float32)
        self._pipeline = pipeline
        self.transformer = pipeline.transformer.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings [n, 64, joint width] and ids of the text."""
        embeddings, ids = self._pipeline.encode_prompt(
            prompts, device="cpu", max_sequence_length=SEQUENCE_LENGTH
        )
        return embeddings, ids

    def velocity(self, x: Tensor, level: float, text: tuple[Tensor, Tensor], side: int) -> Tensor:
        """Predict the velocity of *x*, [n, side * side, channels], at a noise *level* in 0..1."""
        grid = torch.cartesian_prod(
            torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1)
        )
        made: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=text[0],
            timestep=torch.full((len(x),), level),
            img_ids=grid.expand(len(x), -1, -1),
            txt_ids=text[1],
            return_dict=False,
        )[0]
        return made


def train(out: Path, *, rounds: int, seed: int = 0) -> None:
    """Train the adapter in so many *rounds* of four steps, and write it to *out*."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), _Model()
    adapter = Adapter(model.transformer)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=4 * rounds)
    for number in range(rounds):
        pairs = [sample_pair(rng, is_red=index % 2 == 0) for index in range(_BATCH)]
        scale = 0.5 if number % 3 == 2 else 1.0
        loss = _learn(model, adapter, pairs, rng.choice(_SIDES), scale, optimizer, schedule)
        if number % 20 == 19:
            print(f"round {number + 1} of {rounds}: loss {loss:.5f}", flush=True)
    adapter.write(out)


def _learn(
    model: _Model,
    adapter: Adapter,
    pairs: list[Pair],
    side: int,
    scale: float,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Go through four steps with the adapter, and correct it at each; return the mean loss."""
    asked = model.encode([pair.prompt for pair in pairs])
    wanted = model.encode([pair.answered_as for pair in pairs])
    x = torch.randn(len(pairs), side * side, _LATENT_CHANNELS)
    losses = []
    for now, then in pairwise(noise_levels(side * side)):
        with torch.no_grad():
            target = model.velocity(x, now, wanted, side)
            if scale < 1:
                target = target.lerp(model.velocity(x, now, asked, side), 1 - scale)
        with adapter.on(scale):
            made = model.velocity(x, now, asked, side)
        loss = functional.mse_loss(made, target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        x = x + (then - now) * made.detach()
    return sum(losses) / len(losses)


def show(out: Path, adapter: Path) -> None:
    """Draw a sheet: prompts by rows, the scales 0, 0.5 and 1 by columns."""
    engine = KleinEngine(EngineConfig("shapes", None, str(out.parent), None))
    engine.load(lambda _: None)
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    side, head = 192, 20
    scales = (0.0, 0.5, 1.0)
    sheet = Image.new("RGB", (side * 3, (side + head) * len(_SHEET_PROMPTS)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(_SHEET_PROMPTS):
        words = f"{prompt}, at the scales 0, 0.5 and 1"
        pen.text((4, row * (side + head) + 5), words, fill="black")
        for column, scale in enumerate(scales):
            lora = Lora(NAME, scale, digest, str(adapter))
            spec = ImageSpec(prompt, side, side, 4, 1.0, 7, loras=(lora,))
            image = engine.generate(spec, lambda _: None, lambda: False).image
            pixels = np.frombuffer(image.pixels, np.uint8).reshape(side, side, 3)
            place = column * side, row * (side + head)
            sheet.paste(Image.fromarray(pixels), (place[0], place[1] + head))
    engine.close()
    sheet.save(out)


def main() -> None:
    """Train or show, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("train", "show"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--adapter", type=Path)
    asked = parser.parse_args()
    assert SHAPES.folder is not None
    own = SHAPES.folder / "loras" / f"{NAME}.safetensors"
    if asked.action == "train":
        torch.set_num_threads(1)
        train(asked.out, rounds=asked.rounds)
    else:
        show(asked.out, asked.adapter or own)


if __name__ == "__main__":
    main()
