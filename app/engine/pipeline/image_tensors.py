"""Between pixels and the VAE's tensors: references and masks on the way in, pictures on the way
out.

The way in is diffusers' own image processor, so that an edit sees exactly what the pipeline would;
it takes Pillow images, hence Pillow here.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch.nn import functional

from app.domain import Mask, RawImage
from app.errors import InvalidRequest

REFERENCE_PIXELS = 1024 * 1024
"""Larger references are scaled down to this, as the pipeline does."""

MULTIPLE = 16
"""One token of the transformer covers so many pixels each way."""


def reference_tensor(image: RawImage, processor: Flux2ImageProcessor) -> torch.Tensor:
    """Bring a reference to at most one megapixel and whole tokens, in [-1, 1], [1, 3, h, w]."""
    picture = _to_pillow(image)
    try:
        processor.check_image_input(picture)
    except ValueError:
        raise InvalidRequest(
            f"A reference image of {image.width}x{image.height} cannot be used: both sides must be "
            "at least 64 pixels, and neither more than 8 times the other.",
            param="image",
        ) from None
    if image.width * image.height > REFERENCE_PIXELS:
        picture = processor._resize_to_target_area(picture, REFERENCE_PIXELS)
    width, height = (side // MULTIPLE * MULTIPLE for side in picture.size)
    pixels: torch.Tensor = processor.preprocess(
        picture, height=height, width=width, resize_mode="crop"
    )
    return pixels


def fit_source(image: RawImage, width: int, height: int) -> RawImage:
    """Scale the picture that a mask belongs to to the size of the output."""
    if (image.width, image.height) == (width, height):
        return image
    picture = _to_pillow(image).resize((width, height), Image.Resampling.LANCZOS)
    return RawImage(width, height, picture.tobytes())


def source_tensor(image: RawImage, processor: Flux2ImageProcessor) -> torch.Tensor:
    """Turn a picture of the output's size into the VAE's input."""
    pixels: torch.Tensor = processor.preprocess(
        _to_pillow(image), height=image.height, width=image.width
    )
    return pixels


def mask_weights(mask: Mask, width: int, height: int) -> torch.Tensor:
    """Read *mask* at the output's size as [height, width] bytes: 255 repaints, 0 keeps."""
    picture = Image.frombytes("L", (mask.width, mask.height), mask.weights)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width)


def mask_tokens(weights: torch.Tensor) -> torch.Tensor:
    """Shrink a mask to one weight in [0, 1] per token, [1, tokens, 1], as the inpaint pipeline
    does.
    """
    height, width = (side // MULTIPLE for side in weights.shape)
    painted = (weights >= 128).float()[None, None]
    small = functional.interpolate(painted, size=(height, width), mode="bilinear")
    return small.reshape(1, height * width, 1)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Turn the decoder's [1, 3, h, w] in [-1, 1] into [h, w, 3] bytes, as diffusers does."""
    unit = (pixels[0] * 0.5 + 0.5).clamp(0, 1)
    # Reordered where the pixels are: on a card that is nothing, on the host it takes 9 ms.
    return (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8).contiguous()


def to_host(pixels: torch.Tensor) -> torch.Tensor:
    """Copy *pixels* from the card through pinned memory, three times as fast as any other."""
    if not pixels.is_cuda:
        return pixels
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    torch.cuda.current_stream(pixels.device).synchronize()
    return host


def paste(made: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Put the kept pixels of *source* back: exactly where the weight is 0, mixed in between."""
    share = weights.float()[..., None] / 255
    mixed = source.float() * (1 - share) + made.float() * share
    return mixed.round().to(torch.uint8)


def to_raw(pixels: torch.Tensor) -> RawImage:
    """View [h, w, 3] bytes on the host as a picture; nobody may write to them any more."""
    height, width = pixels.shape[:2]
    rows: Any = pixels.contiguous().numpy()
    return RawImage(width, height, memoryview(rows).cast("B"))


def to_tensor(image: RawImage) -> torch.Tensor:
    """View a picture as [h, w, 3] bytes."""
    flat = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3)


def _to_pillow(image: RawImage) -> Image.Image:
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)
