"""Answers to the examination by the networks in training, and by a checkpoint on disk.

The first is a batched sampler on the training passes; the second is the library's own pipeline, as
anybody would load it. Tests hold the parts of the first to those of the second.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tools.shapes.draw import draw, render, tensors
from tools.shapes.exam import Question
from tools.shapes.flow import Trainer
from tools.shapes.nets import (
    LATENT_CHANNELS,
    TOKEN_PIXELS,
    Rotary,
    build_scheduler,
    decode_tokens,
    encode_tokens,
    rotary_for,
)
from tools.shapes.passes import text_features, velocity
from tools.shapes.vocabulary import SEQUENCE_LENGTH, PromptCodes

STEPS = 4


def noise_levels(tokens: int) -> list[float]:
    """The noise levels that klein's schedule visits in four steps, and the last, which is none."""
    scheduler = build_scheduler()
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    scheduler.set_timesteps(STEPS, sigmas=sigmas, mu=compute_empirical_mu(tokens, STEPS))
    levels: list[float] = scheduler.sigmas.tolist()
    return levels


class TrainedSampler:
    """Answers questions with a trainer's averaged weights, many at a time."""

    def __init__(self, trainer: Trainer, codec: AutoencoderKLFlux2, codes: PromptCodes) -> None:
        self._trainer, self._codec, self._codes = trainer, codec, codes

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[NDArray[np.uint8]]:
        """Pictures for the questions, in their order."""
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            asked = question.asked
            groups[asked.width, asked.height, question.reference is not None].append(index)
        answers: dict[int, NDArray[np.uint8]] = {}
        with self._trainer.weights.averaged():
            for indices in groups.values():
                for at in range(0, len(indices), 32):
                    some = indices[at : at + 32]
                    images = self._sample([questions[index] for index in some])
                    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                    answers.update(zip(some, pixels, strict=True))
        return [answers[index] for index in range(len(questions))]

    def _sample(self, questions: list[Question]) -> Tensor:
        trainer, size = self._trainer, questions[0].asked
        rows, columns = size.height // TOKEN_PIXELS, size.width // TOKEN_PIXELS
        device = trainer.weights.master.device
        ids = self._codes.rows([question.prompt for question in questions]).to(device)
        text = text_features(trainer.text, ids, self._codes.pad, trainer.prompt_rotary)
        references = [question.reference for question in questions if question.reference]
        seen = self._seen(references, device) if references else None
        plain = rotary_for(trainer.transformer, rows, columns, references=seen is not None)
        rotary = Rotary(plain.cos.to(device), plain.sin.to(device))
        generator = torch.Generator().manual_seed(rows * columns)
        shape = (len(ids), rows * columns, 4 * LATENT_CHANNELS)
        x = torch.randn(shape, generator=generator).to(device)
        levels = noise_levels(rows * columns)
        for now, then in pairwise(levels):
            tokens = x if seen is None else torch.cat((x, seen), dim=1)
            answer = velocity(
                trainer.transformer,
                tokens.to(text.dtype),
                text=text,
                level=torch.full((len(ids),), now, device=device),
                rotary=rotary,
            )
            x = x + (then - now) * answer[:, : x.shape[1]].float()
        return decode_tokens(self._codec, x, rows, columns)

    def _seen(self, references: list[Any], device: torch.device) -> Tensor:
        marks, backgrounds = (part.to(device) for part in tensors(references))
        image, _ = render(marks, backgrounds, references[0].width, references[0].height)
        return encode_tokens(self._codec, image)


class PipelineSampler:
    """Answers questions with a checkpoint folder, by the library's own pipeline."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def answer(self, questions: Sequence[Question]) -> list[NDArray[np.uint8]]:
        """Pictures for the questions, in their order."""
        return [self._one(index, question) for index, question in enumerate(questions)]

    def _one(self, seed: int, question: Question) -> NDArray[np.uint8]:
        reference = question.reference
        size = question.asked
        image = Image.fromarray(draw(reference)) if reference else None
        return self.render(question.prompt, size.width, size.height, image=image, seed=seed)

    def render(
        self,
        prompt: str,
        width: int,
        height: int,
        *,
        image: Image.Image | None = None,
        seed: int = 0,
    ) -> NDArray[np.uint8]:
        """One picture of height x width x 3 bytes."""
        result = self._pipeline(
            image=image,
            prompt=prompt,
            width=width,
            height=height,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            max_sequence_length=SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(seed),
        )
        return np.asarray(result.images[0].convert("RGB"))
