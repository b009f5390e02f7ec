"""The first stage: from a prompt to its embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from app.domain import ImageSpec
from app.engine.pipeline.components import PipelineComponents
from app.engine.runtime.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt; *negative* is the empty prompt's, where guidance needs it."""

    embeddings: torch.Tensor
    negative: torch.Tensor | None
    token_count: int
    is_cut: bool
    is_cached: bool


def encode_text(components: PipelineComponents, spec: ImageSpec) -> Text:
    """Encode the prompt, and the empty one where guidance is real."""
    tokens, embeddings, is_cached = _embed(components, spec.prompt)
    negative = _embed(components, "")[1] if is_guided(components, spec) else None
    return Text(embeddings, negative, tokens.count, tokens.is_cut, is_cached)


def is_guided(components: PipelineComponents, spec: ImageSpec) -> bool:
    """Whether both branches run: only a model that is not distilled knows guidance."""
    return spec.guidance_scale > 1 and not components.is_distilled


def _embed(components: PipelineComponents, prompt: str) -> tuple[Tokens, torch.Tensor, bool]:
    """Encode *prompt* or take it from the cache; say which."""
    found = components.cache.get(prompt)
    if found is not None:
        return *found, True
    tokens = components.tokenizer(prompt)
    with components.offloader.on_gpu(components.encoder):
        embeddings = components.encoder(tokens, components.device)
    components.cache.put(prompt, tokens, embeddings)
    return tokens, embeddings, False
