"""The reference stage, of edits only: from reference images to latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from app.domain import ImageSpec, RawImage
from app.engine.modules.rope import Grid
from app.engine.pipeline import image_tensors
from app.engine.pipeline.components import PipelineComponents, pack
from app.engine.pipeline.reference_cache import ReferenceKey


@dataclass(frozen=True, slots=True)
class Source:
    """The source image of a masked edit.

    *latents* [1, tokens, c] and *weights* [1, tokens, 1] are per token; *pixels*, uint8 [h, w, 3],
    and *mask*, uint8 [h, w], are per pixel.
    """

    latents: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class References:
    """The latents of all references, concatenated to [1, tokens, c], and the grid of each.

    *are_cached* says of each whether its latents came from the cache; empty without a cache.
    """

    latents: torch.Tensor | None = None
    grids: tuple[Grid, ...] = ()
    source: Source | None = None
    are_cached: tuple[bool, ...] = ()


def encode_references(
    components: PipelineComponents, spec: ImageSpec, keys: Sequence[ReferenceKey] = ()
) -> References:
    """Encode the references, except those that are cached under their *keys*; () asks no cache.

    With a mask the first is the source, scaled to the output's size.
    """
    if not spec.references:
        return References()
    images = list(spec.references)
    if spec.mask is not None:
        images[0] = image_tensors.fit_source(images[0], spec.width, spec.height)
    cached = [components.references.get(key) for key in keys] or [None] * len(images)
    latents = list(_encode_missing(components, spec, images, cached))
    for number, key in enumerate(keys):
        components.references.put(key, latents[number])
    packed = [pack(each) for each in latents]
    grids = tuple((each.shape[2], each.shape[3]) for each in latents)
    source = None
    if spec.mask is not None:
        weights = image_tensors.mask_weights(spec.mask, spec.width, spec.height)
        source = Source(
            latents=packed[0],
            weights=image_tensors.mask_tokens(weights, components.architecture.token_side).to(
                components.device, components.dtype
            ),
            pixels=image_tensors.to_tensor(images[0]),
            mask=weights,
        )
    return References(
        torch.cat([each[0] for each in packed]).unsqueeze(0),
        grids,
        source,
        tuple(each is not None for each in cached) if keys else (),
    )


def _encode_missing(
    components: PipelineComponents,
    spec: ImageSpec,
    images: Sequence[RawImage],
    cached: Sequence[torch.Tensor | None],
) -> Iterator[torch.Tensor]:
    """Yield the latents of each of *images*: what is *cached*, or what the VAE encoder makes."""
    if all(each is not None for each in cached):
        # The encoder is not moved to the GPU for nothing.
        yield from (each for each in cached if each is not None)
        return
    with components.offloader.on_gpu(components.vae.encoder):
        for number, (image, found) in enumerate(zip(images, cached, strict=True)):
            if found is not None:
                yield found
            elif number == 0 and spec.mask is not None:
                yield _encode_image(components, image_tensors.source_tensor(image))
            else:
                pixels = image_tensors.reference_tensor(image, components.architecture)
                yield _encode_image(components, pixels)


def _encode_image(components: PipelineComponents, pixels: torch.Tensor) -> torch.Tensor:
    vae = components.vae
    pixels = pixels.to(components.device, vae.encoder.conv_in.weight.dtype)
    # [1, c, 2 * h, 2 * w] -> [1, 4 * c, h, w]
    latents = torch.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
    mean, std = components.latent_statistics(latents)
    normal: torch.Tensor = ((latents - mean) / std).to(components.dtype)
    return normal
