"""Conversion between raw images and the VAE's tensors, for references, masks and outputs.

References are scaled and cut as diffusers' `Flux2ImageProcessor` does it, so that the VAE encoder
gets exactly what the pipeline's would; it takes Pillow images, hence Pillow here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from app.domain import Mask, RawImage
from app.engine.models.entry import Architecture
from app.errors import InvalidRequest

_LEAST_SIDE, _MOST_RATIO = 64, 8
"""Of a reference, as `Flux2ImageProcessor.check_image_input` asks of what was uploaded."""


def reference_tensor(image: RawImage, architecture: Architecture) -> torch.Tensor:
    """Scale down to the model's size of references, crop to whole tokens: [1, 3, h, w] in [-1, 1].

    Raises:
        InvalidRequest: the image is too small or too narrow.
    """
    token = architecture.token_side
    short, long = sorted((image.width, image.height))
    # It was judged as it was uploaded, and cut since: its short side may have lost most of a token.
    if short < _LEAST_SIDE or long > _MOST_RATIO * (short + token):
        raise InvalidRequest(
            f"A reference image of {image.width}x{image.height} cannot be used: both sides must be "
            f"at least {_LEAST_SIDE} pixels, and neither more than {_MOST_RATIO} times the other.",
            param="image",
        )
    picture = _to_pillow(image)
    pixels, limit = image.width * image.height, architecture.reference_pixels
    if pixels > limit:
        # As diffusers' pipeline does.
        scale = math.sqrt(limit / pixels)
        size = int(image.width * scale), int(image.height * scale)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    width, height = (side // token * token for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return _normal(picture.crop((left, top, left + width, top + height)))


def fit_source(image: RawImage, width: int, height: int) -> RawImage:
    """Scale the mask's source image to the output's size."""
    if (image.width, image.height) == (width, height):
        return image
    picture = _to_pillow(image).resize((width, height), Image.Resampling.LANCZOS)
    return RawImage(width, height, picture.tobytes())


def source_tensor(image: RawImage) -> torch.Tensor:
    """Convert an image of the output's size to the VAE encoder's input, [1, 3, h, w] in [-1, 1]."""
    return _normal(_to_pillow(image))


def mask_weights(mask: Mask, width: int, height: int) -> torch.Tensor:
    """Read *mask* at the output's size as [height, width] bytes: 255 repaints, 0 keeps."""
    picture = Image.frombytes("L", (mask.width, mask.height), mask.weights)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width)


def mask_tokens(weights: torch.Tensor, token_side: int) -> torch.Tensor:
    """Downsample a mask to one weight in [0, 1] per token, [1, tokens, 1].

    As `Flux2KleinInpaintPipeline` does: thresholded at 128, then bilinear.
    """
    height, width = (side // token_side for side in weights.shape)
    painted = (weights >= 128).float()[None, None]
    small = functional.interpolate(painted, size=(height, width), mode="bilinear")
    return small.reshape(1, height * width, 1)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels [1, 3, h, w] in [-1, 1] to uint8 [h, w, 3], as diffusers does."""
    unit = (pixels[0] * 0.5 + 0.5).clamp(0, 1)
    # Permuted on the pixels' device: negligible on a GPU, 9 ms on the host.
    return (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8).contiguous()


def to_host(pixels: torch.Tensor) -> torch.Tensor:
    """Copy *pixels* to the host through pinned memory, three times as fast as pageable memory."""
    if not pixels.is_cuda:
        return pixels
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    torch.cuda.current_stream(pixels.device).synchronize()
    return host


def paste(made: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Blend *source* and *made* by *weights*: 0 keeps the source's pixels exactly, 255 replaces."""
    share = weights.float()[..., None] / 255
    mixed = source.float() * (1 - share) + made.float() * share
    return mixed.round().to(torch.uint8)


def to_raw(pixels: torch.Tensor) -> RawImage:
    """Wrap uint8 [h, w, 3] on the host as an image without a copy; it must not change any more."""
    height, width = pixels.shape[:2]
    rows: Any = pixels.contiguous().numpy()
    return RawImage(width, height, memoryview(rows).cast("B"))


def to_tensor(image: RawImage) -> torch.Tensor:
    """Copy an image to a uint8 tensor [h, w, 3]."""
    flat = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3)


def _to_pillow(image: RawImage) -> Image.Image:
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def _normal(picture: Image.Image) -> torch.Tensor:
    """Convert to float32 [1, 3, h, w] in [-1, 1], laid out as channels_last like diffusers'."""
    unit = torch.from_numpy(np.array(picture).astype(np.float32) / 255)
    return 2.0 * unit[None].permute(0, 3, 1, 2) - 1.0
