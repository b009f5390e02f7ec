"""The autoencoder's first weights: already a plain linear codec of mean colours.

The encoder begins as averages of 4x4 blocks, twelve numbers to a latent; the decoder as a smooth
interpolation of them. Training then only adds what is sharp. Group normalisation stands at the end
of both halves and would take a flat colour away; here each colour passes it with its negative and
beside large constants, which hold the group's mean at zero and its deviation nearly fixed, and
since silu(z) - silu(-z) = z the pair's difference is the colour again.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn
from torch.nn import functional as F

# Anchored latents are mean colours in -1..1 times this.
ANCHOR_SIZE = 1.5
ANCHORED = 12
_CONSTANT = 4.0
_COLOURS = 3
_SMALL = 0.05


def anchors(pictures: Tensor) -> Tensor:
    """Mean colours of the four 4x4 blocks under each latent: [b, 3, h, w] to [b, 12, h/8, w/8]."""
    return ANCHOR_SIZE * F.pixel_unshuffle(F.avg_pool2d(pictures, 4), 2)


@torch.no_grad()
def start_linear(codec: AutoencoderKLFlux2) -> None:
    """Set the weights so that the codec passes colours; everything else starts small or silent."""
    for half in (codec.encoder, codec.decoder):
        for module in half.modules():
            if hasattr(module, "conv2"):
                _silence(module.conv2)
            if hasattr(module, "to_out"):
                _silence(module.to_out[0])
    _start_encoder(codec)
    _start_decoder(codec)


def _start_encoder(codec: AutoencoderKLFlux2) -> None:
    encoder = codec.encoder
    _pass(encoder.conv_in, _COLOURS)
    for index in (0, 1):
        block = encoder.down_blocks[index]
        _pass_shortcut(block, _COLOURS)
        # Strided, padded on the right and below: these taps are the four pixels of a block.
        conv = _cleared(block.downsamplers[0].conv, _COLOURS)
        for colour in range(_COLOURS):
            conv.weight[colour, colour, :2, :2] = 0.25
    block = encoder.down_blocks[2]
    _pass_shortcut(block, _COLOURS)
    conv = _cleared(block.downsamplers[0].conv, ANCHORED)
    for number in range(ANCHORED):
        colour, row, column = number // 4, number // 2 % 2, number % 2
        conv.weight[number, colour, row, column] = ANCHOR_SIZE
    _pair(encoder.down_blocks[3].resnets[0].conv_shortcut, ANCHORED, constants=8)
    _unpair(encoder, ANCHORED, constants=8)
    codec.quant_conv.weight.zero_()
    codec.quant_conv.weight[:, :, 0, 0] = torch.eye(codec.quant_conv.weight.shape[0])
    codec.quant_conv.bias.zero_()


def _start_decoder(codec: AutoencoderKLFlux2) -> None:
    decoder = codec.decoder
    codec.post_quant_conv.weight[:, :, 0, 0] = torch.eye(codec.config.latent_channels)
    codec.post_quant_conv.bias.zero_()
    _pass(decoder.conv_in, ANCHORED)
    # After doubling by repetition, the neighbours' nearer halves are half of the truth here.
    conv = _cleared(decoder.up_blocks[0].upsamplers[0].conv, _COLOURS)
    for number in range(ANCHORED):
        colour, row, column = number // 4, number // 2 % 2, number % 2
        conv.weight[colour, number, 2 * (1 - row), 2 * (1 - column)] = 0.25 / ANCHOR_SIZE
    linear = torch.tensor([0.25, 0.5, 0.25])
    for index in (1, 2):
        block = decoder.up_blocks[index]
        _pass_shortcut(block, _COLOURS)
        conv = _cleared(block.upsamplers[0].conv, _COLOURS)
        for colour in range(_COLOURS):
            conv.weight[colour, colour] = linear[:, None] * linear
    _pair(decoder.up_blocks[3].resnets[0].conv_shortcut, _COLOURS, constants=2)
    _unpair(decoder, _COLOURS, constants=2)


def _silence(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _cleared(conv: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """With the first outputs silent, and the others small."""
    conv.weight[:outputs] = 0
    _bias(conv)[:outputs] = 0
    return conv


def _pass(conv: nn.Conv2d, channels: int) -> None:
    """Let the first channels through as they are."""
    middle = conv.kernel_size[0] // 2
    _cleared(conv, channels)
    for channel in range(channels):
        conv.weight[channel, channel, middle, middle] = 1


def _pass_shortcut(block: Any, channels: int) -> None:
    shortcut = block.resnets[0].conv_shortcut
    if shortcut is not None:
        _pass(shortcut, channels)


def _pair(shortcut: nn.Conv2d, channels: int, *, constants: int) -> None:
    """Give the channels, their negatives, and as many positive as negative constants."""
    used = 2 * channels + constants
    _cleared(shortcut, used)
    for channel in range(channels):
        shortcut.weight[channel, channel] = 1
        shortcut.weight[channels + channel, channel] = -1
    constant = _bias(shortcut)[2 * channels : used]
    constant[:] = _CONSTANT
    constant[::2] = -_CONSTANT


def _unpair(half: Any, channels: int, *, constants: int) -> None:
    """Undo `_pair` behind the normalisation; the group must hold nothing else."""
    groups: nn.GroupNorm = half.conv_norm_out
    size = groups.num_channels // groups.num_groups
    assert size >= 2 * channels + constants
    # Colours in -1..1 are mostly light or dark, so their mean square is taken as a half.
    square = 0.5 * (ANCHOR_SIZE**2 if channels == ANCHORED else 1.0)
    total = 2 * channels * square + constants * _CONSTANT**2
    deviation = (total / size) ** 0.5
    conv: nn.Conv2d = half.conv_out
    middle = conv.kernel_size[0] // 2
    conv.weight.mul_(_SMALL)
    _bias(conv).zero_()
    conv.weight[:channels] *= torch.arange(groups.num_channels)[None, :, None, None] >= size
    for channel in range(channels):
        conv.weight[channel, channel, middle, middle] = deviation
        conv.weight[channel, channels + channel, middle, middle] = -deviation
