"""The weights of FLUX.2's VAE, under the names of diffusers' `AutoencoderKLFlux2`, without passes.

`app.engine.modules.fused_vae` brings the passes. Importing diffusers takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn

_EPS = 1e-6
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


class AutoencoderKLFlux2(nn.Module):
    """Encoder, decoder and statistics; only what FLUX.2's VAEs vary is a parameter.

    Raises:
        ValueError: the config is of another kind of VAE.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = 4 * (_BLOCKS["down_block_types"],),
        up_block_types: Sequence[str] = 4 * (_BLOCKS["up_block_types"],),
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        decoder_block_out_channels: Sequence[int] | None = None,
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 32,
        norm_num_groups: int = 32,
        sample_size: int = 1024,  # of diffusers' own tiling
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        batch_norm_eps: float = 1e-4,
        batch_norm_momentum: float = 0.1,  # of training
        patch_size: Sequence[int] = (2, 2),
    ) -> None:
        kinds = {*down_block_types, *up_block_types}
        are_even = len(down_block_types) == len(block_out_channels)
        if (
            not are_even
            or kinds != set(_BLOCKS.values())
            or act_fn != "silu"
            or not mid_block_add_attention
        ):
            raise ValueError("another kind of VAE")
        super().__init__()
        self.config = SimpleNamespace(batch_norm_eps=batch_norm_eps)
        groups, wide = norm_num_groups, decoder_block_out_channels or block_out_channels
        self.encoder = _Encoder(
            in_channels, latent_channels, block_out_channels, layers_per_block, groups
        )
        self.decoder = _Decoder(latent_channels, out_channels, wide, layers_per_block + 1, groups)
        moments = 2 * latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else None
        self.post_quant_conv = (
            nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        )
        packed = math.prod(patch_size) * latent_channels
        self.bn = nn.BatchNorm2d(packed, eps=batch_norm_eps, affine=False)

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """Encode [1, 3, 8 * h, 8 * w] as diffusers does; of the distribution there is the mode."""
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: moments.chunk(2, dim=1)[0]))


class _Encoder(nn.Module):
    def __init__(
        self, channels: int, latent: int, widths: Sequence[int], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = _conv(channels, widths[0])
        self.down_blocks = nn.ModuleList(
            _Block(
                (widths[max(number - 1, 0)], width),
                layers,
                groups,
                downsamplers=_sampler(width, stride=2) if number < len(widths) - 1 else None,
            )
            for number, width in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = _conv(widths[-1], 2 * latent)


class _Decoder(nn.Module):
    def __init__(
        self, latent: int, channels: int, widths: Sequence[int], layers: int, groups: int
    ) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = _conv(latent, widths[0])
        self.up_blocks = nn.ModuleList(
            _Block(
                (widths[max(number - 1, 0)], width),
                layers,
                groups,
                upsamplers=_sampler(width, stride=1) if number < len(widths) - 1 else None,
            )
            for number, width in enumerate(widths)
        )
        self.mid_block = _Middle(widths[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = _conv(widths[-1], channels)


class _Block(nn.Module):
    def __init__(
        self,
        widths: tuple[int, int],
        layers: int,
        groups: int,
        **samplers: nn.ModuleList | None,
    ) -> None:
        super().__init__()
        narrow, wide = widths
        self.resnets = nn.ModuleList(
            _Resnet(wide if number else narrow, wide, groups) for number in range(layers)
        )
        for name, module in samplers.items():
            setattr(self, name, module)


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(width, groups)])
        self.resnets = nn.ModuleList(_Resnet(width, width, groups) for _ in range(2))


class _Resnet(nn.Module):
    def __init__(self, narrow: int, wide: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, narrow, _EPS), _conv(narrow, wide)
        self.norm2, self.conv2 = nn.GroupNorm(groups, wide, _EPS), _conv(wide, wide)
        self.conv_shortcut = nn.Conv2d(narrow, wide, 1) if narrow != wide else None


class _Attention(nn.Module):
    """One head over all channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.group_norm = nn.GroupNorm(groups, width, _EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class _Sampler(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, padding=2 - stride)


def _sampler(width: int, stride: int) -> nn.ModuleList:
    return nn.ModuleList([_Sampler(width, stride)])


def _conv(narrow: int, wide: int) -> nn.Conv2d:
    return nn.Conv2d(narrow, wide, 3, padding=1)
