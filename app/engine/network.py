"""One pass of the transformer, with what does not change between steps taken out of it.

diffusers' own forward computes the rotary table in float64 at every step and embeds the prompt
anew; here both are given. The rest is the same operations in the same order, so the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
Grid = tuple[int, int]

_REFERENCE_TIME = 10
"""References stand at the times 10, 20, ...: `Flux2KleinPipeline._prepare_image_ids`."""


def predict(
    transformer: Any,
    tokens: torch.Tensor,
    timestep: torch.Tensor,
    context: torch.Tensor,
    rope: Rope,
) -> torch.Tensor:
    """Predict the velocity of *tokens* (picture first, then references) at *timestep* in 0..1.

    *context* is the prompt after the transformer's context embedder, *rope* from `RopeTable`.
    """
    embedding = transformer.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
    image_modulation = transformer.double_stream_modulation_img(embedding)
    text_modulation = transformer.double_stream_modulation_txt(embedding)
    single_modulation = transformer.single_stream_modulation(embedding)
    hidden = transformer.x_embedder(tokens)
    text_length = context.shape[1]
    for block in transformer.transformer_blocks:
        context, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            temb_mod_img=image_modulation,
            temb_mod_txt=text_modulation,
            image_rotary_emb=rope,
        )
    hidden = torch.cat([context, hidden], dim=1)
    for block in transformer.single_transformer_blocks:
        hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=None,
            temb_mod=single_modulation,
            image_rotary_emb=rope,
        )
    hidden = transformer.norm_out(hidden[:, text_length:], embedding)
    velocity: torch.Tensor = transformer.proj_out(hidden)
    return velocity


class RopeTable:
    """Rotary tables by shape, the last few kept. The engine's thread alone uses it."""

    def __init__(self, embed: Any, device: torch.device, *, kept: int = 8) -> None:
        self._embed = embed
        self._device = device
        self._kept = kept
        self._tables: OrderedDict[tuple[int, tuple[Grid, ...]], Rope] = OrderedDict()

    def get(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        """Return the table for a prompt of *text_length* and *grids*: picture first, then
        references.
        """
        key = (text_length, grids)
        if key not in self._tables:
            self._tables[key] = self._compute(text_length, grids)
            while len(self._tables) > self._kept:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def _compute(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        one = torch.arange(1)
        text = torch.cartesian_prod(one, one, one, torch.arange(text_length))
        pictures = [
            torch.cartesian_prod(
                torch.tensor([number * _REFERENCE_TIME]),
                torch.arange(height),
                torch.arange(width),
                one,
            )
            for number, (height, width) in enumerate(grids)
        ]
        # Apart, as the model's own forward does: vectorised cosines differ by where a row lies.
        tables = [self._embed(ids.to(self._device)) for ids in (text, torch.cat(pictures))]
        cos, sin = (torch.cat(halves) for halves in zip(*tables, strict=True))
        return cos, sin
