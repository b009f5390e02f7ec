"""The text stage: from a prompt to its embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from app.domain import ImageSpec
from app.engine.pipeline.components import PipelineComponents
from app.engine.runtime.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Text:
    """The prompt embeddings, [1, tokens, 3 * hidden size], and how they were made.

    *negative* is the empty prompt's embeddings, where classifier-free guidance needs them.
    """

    embeddings: torch.Tensor
    negative: torch.Tensor | None
    tokens: Tokens
    is_cached: bool


def encode_text(components: PipelineComponents, spec: ImageSpec) -> Text:
    """Encode the prompt, and the empty prompt where classifier-free guidance runs.

    It never runs for a distilled model.
    """
    tokens, embeddings, is_cached = _embed(components, spec.prompt)
    is_guided = spec.guidance_scale > 1 and not components.is_distilled
    negative = _embed(components, "")[1] if is_guided else None
    return Text(embeddings, negative, tokens, is_cached)


def _embed(components: PipelineComponents, prompt: str) -> tuple[Tokens, torch.Tensor, bool]:
    """Return tokens and embeddings of *prompt*, and whether they came from the cache."""
    if (found := components.cache.get(prompt)) is not None:
        return *found, True
    tokens = components.tokenizer(prompt)
    with components.offloader.on_gpu(components.encoder):
        embeddings = components.encoder(tokens, components.device)
    components.cache.put(prompt, tokens, embeddings)
    return tokens, embeddings, False
