"""The mapping between Black Forest Labs' and diffusers' names of the transformer's weights.

A table only. Whole names are matched, never substrings: a rule for the substring
`img_attn.proj.weight` would also match `img_attn.proj.weight_scale` and overwrite the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rule:
    """One weight: *theirs* is BFL's module name, *ours* diffusers'."""

    ours: str
    theirs: str
    third: int | None = None
    """Which third of BFL's tensor it is: query, key or value; None for all of it."""
    is_swapped: bool = False
    """Whether its halves are swapped: BFL has (shift, scale), diffusers (scale, shift)."""
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
        return theirs if self.third is None else (theirs[0] // 3, *theirs[1:])

    def take(self, theirs: torch.Tensor) -> torch.Tensor:
        """Return diffusers' tensor, given BFL's."""
        if self.third is not None:
            return theirs.chunk(3)[self.third].clone()
        return theirs.roll(len(theirs) // 2, 0) if self.is_swapped else theirs


_TOP = (
    Rule("x_embedder", "img_in"),
    Rule("context_embedder", "txt_in"),
    Rule("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    Rule("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    Rule("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
    Rule("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    Rule("single_stream_modulation.linear", "single_stream_modulation.lin"),
    Rule("proj_out", "final_layer.linear"),
    Rule("norm_out.linear", "final_layer.adaLN_modulation.1", is_swapped=True),
)
_DOUBLE = (
    Rule("attn.to_q", "img_attn.qkv", third=0),
    Rule("attn.to_k", "img_attn.qkv", third=1),
    Rule("attn.to_v", "img_attn.qkv", third=2),
    Rule("attn.to_out.0", "img_attn.proj"),
    Rule("attn.norm_q", "img_attn.norm.query_norm", is_norm=True),
    Rule("attn.norm_k", "img_attn.norm.key_norm", is_norm=True),
    Rule("ff.linear_in", "img_mlp.0"),
    Rule("ff.linear_out", "img_mlp.2"),
    Rule("attn.add_q_proj", "txt_attn.qkv", third=0),
    Rule("attn.add_k_proj", "txt_attn.qkv", third=1),
    Rule("attn.add_v_proj", "txt_attn.qkv", third=2),
    Rule("attn.to_add_out", "txt_attn.proj"),
    Rule("attn.norm_added_q", "txt_attn.norm.query_norm", is_norm=True),
    Rule("attn.norm_added_k", "txt_attn.norm.key_norm", is_norm=True),
    Rule("ff_context.linear_in", "txt_mlp.0"),
    Rule("ff_context.linear_out", "txt_mlp.2"),
)
_SINGLE = (
    Rule("attn.to_qkv_mlp_proj", "linear1"),
    Rule("attn.to_out", "linear2"),
    Rule("attn.norm_q", "norm.query_norm", is_norm=True),
    Rule("attn.norm_k", "norm.key_norm", is_norm=True),
)


def rules(doubles: int, singles: int) -> list[Rule]:
    """List the rules of all weights, for *doubles* double and *singles* single blocks."""
    blocks = (
        (doubles, "transformer_blocks", "double_blocks", _DOUBLE),
        (singles, "single_transformer_blocks", "single_blocks", _SINGLE),
    )
    return [*_TOP] + [
        replace(
            rule, ours=f"{ours}.{number}.{rule.ours}", theirs=f"{theirs}.{number}.{rule.theirs}"
        )
        for count, ours, theirs, table in blocks
        for number in range(count)
        for rule in table
    ]
