"""The VAE's decoder and encoder over the weights of diffusers' modules, without its passes.

The formulas are those of diffusers' `Decoder` and `Encoder`; what differs is how often an image
passes through memory. Convolutions run without their bias, norms as `kernels.group_norm` does, and
an upsampling convolution works on the small image with weights for each of four pixels, 4/9 of the
arithmetic. Nothing is compiled for a size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.kernels.group_norm import FeatureMap, add, measure, normalize, phase_weight
from app.engine.modules.attention import attend_wide


@torch.no_grad()
def fuse_vae(vae: Any) -> None:
    """Replace the parts of *vae*, diffusers' `AutoencoderKLFlux2`, which has its weights.

    They are reordered to channels_last, as the convolutions of a card take them.
    """
    vae.to(memory_format=torch.channels_last)
    vae.decoder, vae.encoder = FusedDecoder(vae.decoder), FusedEncoder(vae.encoder)
    if vae.post_quant_conv is not None:
        vae.post_quant_conv = _Points(vae.post_quant_conv)
    if vae.quant_conv is not None:
        vae.quant_conv = _Points(vae.quant_conv)


class FusedDecoder(nn.Module):
    """Decodes latents [1, c, h, w] to pixels [1, 3, 8 * h, 8 * w]."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.conv_in = decoder.conv_in
        self.middle = _Middle(decoder.mid_block, self.conv_in.bias)
        self.blocks = nn.ModuleList()
        pending = None
        for block in decoder.up_blocks:
            self.blocks.extend(_resnets(block.resnets, pending))
            if block.upsamplers:
                up = _Upsample(block.upsamplers[0].conv)
                self.blocks.append(up)
                pending = up.bias
        self.head = _Head(decoder.conv_norm_out, decoder.conv_out)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode."""
        image = self.middle(_start(latents, self.conv_in))
        for block in self.blocks:
            image = block(image)
        pixels: torch.Tensor = self.head(image)
        return pixels


class FusedEncoder(nn.Module):
    """Encodes pixels [1, 3, 8 * h, 8 * w] to the moments of latents, [1, 2 * c, h, w]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.conv_in = encoder.conv_in
        self.blocks = nn.ModuleList()
        pending = self.conv_in.bias
        for block in encoder.down_blocks:
            self.blocks.extend(_resnets(block.resnets, pending))
            pending = None
            if block.downsamplers:
                down = _Downsample(block.downsamplers[0].conv)
                self.blocks.append(down)
                pending = down.conv.bias
        self.middle = _Middle(encoder.mid_block, pending)
        self.head = _Head(encoder.conv_norm_out, encoder.conv_out)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode."""
        image = _start(pixels, self.conv_in)
        for block in self.blocks:
            image = block(image)
        moments: torch.Tensor = self.head(self.middle(image))
        return moments


class _Resnet(nn.Module):
    """Two norms and convolutions and the residual, which may have a *pending* bias."""

    bias: torch.Tensor

    def __init__(self, resnet: Any, pending: torch.Tensor | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = resnet.norm1, resnet.conv1
        self.norm2, self.conv2 = resnet.norm2, resnet.conv2
        self.shortcut = resnet.conv_shortcut
        bias = resnet.conv2.bias.float()
        if self.shortcut is not None:
            bias = bias + self.shortcut.bias.float()
        if pending is not None and self.shortcut is not None:
            bias = bias + self.shortcut.weight[:, :, 0, 0].float() @ pending.float()
        elif pending is not None:
            bias = bias + pending.float()
        self.register_buffer("bias", bias)

    def forward(self, image: FeatureMap) -> FeatureMap:
        hidden = _convolve(normalize(image, self.norm1), self.conv1)
        between = measure(FeatureMap(hidden, image.height, image.width, self.conv1.bias))
        del hidden
        made = _convolve(normalize(between, self.norm2), self.conv2)
        del between
        return add(made, self._residual(image), self.bias)

    def _residual(self, image: FeatureMap) -> FeatureMap:
        if self.shortcut is None:
            return image
        data = _convolve_points(image.data, self.shortcut.weight)
        return FeatureMap(data, image.height, image.width)


class _Attention(nn.Module):
    """Attention over all pixels, with its norm and the residual."""

    bias: torch.Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("bias", attention.to_out[0].bias.float())

    def forward(self, image: FeatureMap) -> FeatureMap:
        shape, attention = image.data.shape, self.attention
        rows = normalize(image, attention.group_norm, has_silu=False)
        rows = attend_wide(attention, rows.permute(0, 2, 3, 1).flatten(1, 2))
        made = functional.linear(rows, attention.to_out[0].weight)
        return add(made.view(1, *shape[2:], shape[1]).permute(0, 3, 1, 2), image, self.bias)


class _Points(nn.Module):
    """A convolution with a kernel of one pixel, diffusers' *conv*."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolve_points(x, self.weight, self.bias)


class _Middle(nn.Sequential):
    """Two resnets with attention between them."""

    def __init__(self, block: Any, pending: torch.Tensor | None) -> None:
        first, *others = block.resnets
        layers: list[nn.Module] = [_Resnet(first, pending)]
        for attention, resnet in zip(block.attentions, others, strict=True):
            layers += [_Attention(attention), _Resnet(resnet, None)]
        super().__init__(*layers)


class _Upsample(nn.Module):
    """Nearest-neighbour upsampling to twice the side, and a convolution."""

    weight: torch.Tensor

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.bias = conv.bias
        weight = phase_weight(conv.weight)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))

    def forward(self, image: FeatureMap) -> FeatureMap:
        data = functional.conv2d(image.data, self.weight, padding=1)
        return measure(FeatureMap(data, 2 * image.height, 2 * image.width, self.bias))


class _Downsample(nn.Module):
    """A convolution with a stride of two, padded at the right and below."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, image: FeatureMap) -> FeatureMap:
        padded = functional.pad(image.data, (0, 1, 0, 1))
        data = functional.conv2d(padded, self.conv.weight, stride=2)
        return measure(FeatureMap(data, data.shape[2], data.shape[3], self.conv.bias))


class _Head(nn.Module):
    """The last norm and convolution.

    The decoder's three colours become eight channels, five of them empty: convolutions in
    channels_last are written for multiples of eight.
    """

    weight: torch.Tensor

    def __init__(self, norm: nn.GroupNorm, conv: Any) -> None:
        super().__init__()
        self.norm, self.bias = norm, conv.bias
        weight = functional.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, -conv.out_channels % 8))
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))

    def forward(self, image: FeatureMap) -> torch.Tensor:
        made = functional.conv2d(normalize(image, self.norm), self.weight, padding=1)
        pixels: torch.Tensor = made[:, : len(self.bias)] + self.bias[:, None, None]
        return pixels


def _resnets(resnets: Any, pending: torch.Tensor | None) -> list[_Resnet]:
    """Wrap *resnets*, of which the first gets an image with a *pending* bias.

    A module of all would hold its first image until its last, half a gigabyte at a megapixel.
    """
    return [_Resnet(each, None if number else pending) for number, each in enumerate(resnets)]


def _start(x: torch.Tensor, conv: Any) -> FeatureMap:
    """Convolve the first image."""
    data = _convolve(x.contiguous(memory_format=torch.channels_last), conv)
    return measure(FeatureMap(data, data.shape[2], data.shape[3], conv.bias))


def _convolve(x: torch.Tensor, conv: Any) -> torch.Tensor:
    """Convolve without the bias."""
    data: torch.Tensor = functional.conv2d(x, conv.weight, padding=1)
    return data


def _convolve_points(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve with a kernel of one pixel, as a matmul: cuDNN plans milliseconds for each size.

    It has no neighbours, so each phase of a phased image is an image of its own.
    """
    wide, narrow = weight.shape[:2]
    rows = x.permute(0, 2, 3, 1).reshape(-1, narrow)
    flat = functional.linear(rows, weight.view(wide, narrow), bias)
    return flat.view(1, *x.shape[2:], -1).permute(0, 3, 1, 2)
