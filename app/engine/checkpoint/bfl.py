"""The mapping between Black Forest Labs' and diffusers' names of the transformer's weights.

A table only. Whole names are matched, never substrings: a rule for the substring
`img_attn.proj.weight` would also match `img_attn.proj.weight_scale` and overwrite the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class Piece(Enum):
    """Which part of BFL's tensor diffusers' tensor is."""

    WHOLE = "whole"
    QUERY = 0
    KEY = 1
    VALUE = 2
    SWAPPED = "swapped"
    """Its halves are swapped: BFL has (shift, scale), diffusers (scale, shift)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One weight: *theirs* is BFL's module name, *ours* diffusers'."""

    ours: str
    theirs: str
    piece: Piece = Piece.WHOLE
    is_norm: bool = False

    @property
    def our_name(self) -> str:
        """Diffusers' name of the tensor."""
        return f"{self.ours}.weight"

    @property
    def their_name(self) -> str:
        """BFL's name of the tensor."""
        return f"{self.theirs}.{'scale' if self.is_norm else 'weight'}"

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of diffusers' tensor, given that of BFL's."""
        if self.piece in _THIRDS:
            return (theirs[0] // 3, *theirs[1:])
        return theirs

    def take(self, theirs: torch.Tensor) -> torch.Tensor:
        """Return diffusers' tensor, given BFL's."""
        if self.piece in _THIRDS:
            third: torch.Tensor = theirs.chunk(3)[self.piece.value]
            return third.clone()
        if self.piece is Piece.SWAPPED:
            return torch.cat(theirs.chunk(2)[::-1])
        return theirs


_THIRDS = (Piece.QUERY, Piece.KEY, Piece.VALUE)

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}


def rules(doubles: int, singles: int) -> list[Rule]:
    """List the rules of all weights, for *doubles* double and *singles* single blocks."""
    found = [Rule(ours, theirs) for ours, theirs in _TOP.items()]
    found.append(Rule("norm_out.linear", "final_layer.adaLN_modulation.1", Piece.SWAPPED))
    for number in range(doubles):
        found += _double(f"transformer_blocks.{number}", f"double_blocks.{number}")
    for number in range(singles):
        ours, theirs = f"single_transformer_blocks.{number}.attn", f"single_blocks.{number}"
        found += [
            Rule(f"{ours}.to_qkv_mlp_proj", f"{theirs}.linear1"),
            Rule(f"{ours}.to_out", f"{theirs}.linear2"),
            Rule(f"{ours}.norm_q", f"{theirs}.norm.query_norm", is_norm=True),
            Rule(f"{ours}.norm_k", f"{theirs}.norm.key_norm", is_norm=True),
        ]
    return found


def _double(ours: str, theirs: str) -> list[Rule]:
    found = []
    for stream, qkv, out, added, feed in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "added_", "ff_context"),
    ):
        attention = f"{theirs}.{stream}_attn"
        found += [
            Rule(f"{ours}.attn.{name}", f"{attention}.qkv", piece)
            for name, piece in zip(qkv, _THIRDS, strict=True)
        ]
        found += [
            Rule(f"{ours}.attn.{out}", f"{attention}.proj"),
            Rule(f"{ours}.attn.norm_{added}q", f"{attention}.norm.query_norm", is_norm=True),
            Rule(f"{ours}.attn.norm_{added}k", f"{attention}.norm.key_norm", is_norm=True),
            Rule(f"{ours}.{feed}.linear_in", f"{theirs}.{stream}_mlp.0"),
            Rule(f"{ours}.{feed}.linear_out", f"{theirs}.{stream}_mlp.2"),
        ]
    return found
