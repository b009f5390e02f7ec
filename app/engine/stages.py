"""The three stages of a picture and the fourth of an edit: text, references, denoise, decode.

Each is one function over `Parts`; together they are `Flux2KleinPipeline.__call__` (and, with a
mask, `Flux2KleinInpaintPipeline` at strength 1) with its operations in its order, so that the
pixels are the pipeline's own for the same noise. Between steps they ask whether to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from app.domain import ImageSpec
from app.engine import faults, pictures
from app.engine.memory import EXACT_PIXELS
from app.engine.network import Grid
from app.engine.parts import Parts
from app.engine.text_encoder import Tokens
from app.engine.tiles import decode_tiled
from app.errors import Cancelled

_log = logging.getLogger(__name__)

OnStep = Callable[[int, Callable[[], torch.Tensor]], None]
"""Called after each step with its number and a way to the present estimate of the clean latents."""


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt; *negative* is the empty prompt's, where guidance needs it."""

    embeddings: torch.Tensor
    negative: torch.Tensor | None
    token_count: int
    is_cut: bool
    is_cached: bool


@dataclass(frozen=True, slots=True)
class Source:
    """The picture under a mask: latents and weights per token, pixels and mask per pixel."""

    latents: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class References:
    """Encoded references, one after the other: [1, tokens, channels], and the grid of each."""

    latents: torch.Tensor | None = None
    grids: tuple[Grid, ...] = ()
    source: Source | None = None


def draw_noise(parts: Parts, spec: ImageSpec) -> torch.Tensor:
    """Draw the starting noise on the CPU, so that a seed means the same on every card."""
    height, width = grid(spec)
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    channels = parts.transformer.config.in_channels
    # Drawn in float32: the values are those of a draw in bfloat16, and come in half the time.
    noise = torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)
    return noise.to(parts.dtype)


def encode_text(parts: Parts, spec: ImageSpec) -> Text:
    """Encode the prompt, and the empty one where guidance is real."""
    tokens, embeddings, is_cached = _embed(parts, spec.prompt)
    negative = _embed(parts, "")[1] if is_guided(parts, spec) else None
    return Text(embeddings, negative, tokens.count, tokens.is_cut, is_cached)


def encode_references(parts: Parts, spec: ImageSpec) -> References:
    """Encode the references; with a mask the first is the source, at the output's size."""
    if not spec.references:
        return References()
    processor = Flux2ImageProcessor(vae_scale_factor=pictures.MULTIPLE)
    images = list(spec.references)
    if spec.mask is not None:
        images[0] = pictures.fit_source(images[0], spec.width, spec.height)
    with parts.residency.on_card(parts.vae.encoder):
        latents = [
            _encode_image(
                parts,
                pictures.prepare_source(image, processor)
                if number == 0 and spec.mask is not None
                else pictures.prepare_reference(image, processor),
            )
            for number, image in enumerate(images)
        ]
    packed = [_pack(each) for each in latents]
    grids = tuple((each.shape[2], each.shape[3]) for each in latents)
    source = None
    if spec.mask is not None:
        weights = pictures.mask_weights(spec.mask, spec.width, spec.height)
        source = Source(
            latents=packed[0],
            weights=pictures.mask_tokens(weights).to(parts.device, parts.dtype),
            pixels=pictures.to_tensor(images[0]),
            mask=weights,
        )
    return References(torch.cat([each[0] for each in packed]).unsqueeze(0), grids, source)


def denoise(
    parts: Parts,
    spec: ImageSpec,
    text: Text,
    references: References,
    noise: torch.Tensor,
    *,
    on_step: OnStep,
    should_stop: Callable[[], bool],
) -> torch.Tensor:
    """Turn noise into packed latents, [1, tokens, channels].

    Raises:
        Cancelled: *should_stop* said so between two steps.
    """
    if parts.device.type == "cuda":
        noise = noise.pin_memory()
    latents = noise = _pack(noise.to(parts.device, non_blocking=True))
    sigmas, timesteps = _schedule(parts, spec, latents.shape[1])
    with parts.residency.on_card(parts.transformer):
        velocity_of = _velocity(parts, spec, text, references)
        for number in range(spec.num_inference_steps):
            if should_stop():
                raise Cancelled
            sigma, following = sigmas[number], sigmas[number + 1]
            timestep = timesteps[number].expand(1).to(latents.dtype) / 1000
            velocity = velocity_of(latents, timestep)
            before = latents
            latents = (latents.float() + (following - sigma) * velocity).to(velocity.dtype)
            if references.source is not None:
                latents = _keep_source(references.source, latents, noise, sigmas, number + 1)
            on_step(number + 1, partial(_estimate, before, sigma, velocity))
    return latents


def decode(parts: Parts, latents: torch.Tensor, shape: Grid) -> torch.Tensor:
    """Turn packed latents of *shape* into the VAE's pixels, [1, 3, h, w] in [-1, 1].

    In tiles where the plan or the size asks for it, or, once, where the whole finds no room.
    """
    vae = parts.vae
    with parts.residency.on_card(vae.decoder):
        packed = latents.permute(0, 2, 1).reshape(1, -1, *shape)
        mean, std = _statistics(vae, packed)
        clean = _unpatchify(packed * std + mean).to(vae.decoder.conv_in.weight.dtype)
        if parts.is_tiled or _pixels(shape) > EXACT_PIXELS:
            return decode_tiled(parts.decode, clean)
        try:
            return parts.decode(clean)
        except torch.OutOfMemoryError as error:
            faults.release(error)
        _log.warning("The decode found no room and is done in tiles.")
        return decode_tiled(parts.decode, clean)


def grid(spec: ImageSpec) -> Grid:
    """The picture's tokens: rows and columns."""
    return spec.height // pictures.MULTIPLE, spec.width // pictures.MULTIPLE


def _pixels(shape: Grid) -> int:
    return shape[0] * shape[1] * pictures.MULTIPLE**2


def is_guided(parts: Parts, spec: ImageSpec) -> bool:
    """Whether both branches run: only a model that is not distilled knows guidance."""
    return spec.guidance_scale > 1 and not parts.is_distilled


def _embed(parts: Parts, prompt: str) -> tuple[Tokens, torch.Tensor, bool]:
    """Encode *prompt* or take it from the cache; say which."""
    found = parts.cache.get(prompt)
    if found is not None:
        return *found, True
    tokens = parts.tokenizer(prompt)
    with parts.residency.on_card(parts.encoder):
        embeddings = parts.encoder(tokens, parts.device)
    parts.cache.put(prompt, tokens, embeddings)
    return tokens, embeddings, False


def _velocity(
    parts: Parts, spec: ImageSpec, text: Text, references: References
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Bind everything that stays the same over the steps."""
    transformer = parts.transformer
    contexts = [transformer.context_embedder(text.embeddings)]
    if text.negative is not None:
        contexts.append(transformer.context_embedder(text.negative))
    length = contexts[0].shape[1]
    rope = parts.rope.get(length, (grid(spec), *references.grids))

    def velocity_of(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = latents
        if references.latents is not None:
            tokens = torch.cat([latents, references.latents.to(latents.dtype)], dim=1)
        branches: Sequence[torch.Tensor] = [
            parts.predict(tokens, timestep, context, rope)[:, : latents.shape[1]]
            for context in contexts
        ]
        if len(branches) == 1:
            return branches[0]
        wanted, unwanted = branches
        return unwanted + spec.guidance_scale * (wanted - unwanted)

    return velocity_of


def _schedule(parts: Parts, spec: ImageSpec, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise levels, one more than the steps, and the timesteps in 0..1000."""
    steps = spec.num_inference_steps
    scheduler = parts.make_scheduler()
    sigmas: Any = np.linspace(1.0, 1 / steps, steps)
    if getattr(scheduler.config, "use_flow_sigmas", False):
        sigmas = None
    mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    if sigmas is None:
        scheduler.set_timesteps(steps, device=parts.device, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=sigmas, device=parts.device, mu=mu)
    return scheduler.sigmas, scheduler.timesteps


def _estimate(latents: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Where the present velocity would lead at once: the clean latents as they look by now."""
    return latents - sigma * velocity


def _keep_source(
    source: Source, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, number: int
) -> torch.Tensor:
    """Put the source back where the mask keeps it, noised to the level of the step that follows."""
    kept = source.latents
    if number < len(sigmas) - 1:
        sigma = sigmas.to(kept.dtype)[number]
        kept = sigma * noise + (1.0 - sigma) * kept
    return (1 - source.weights) * kept + source.weights * latents


def _encode_image(parts: Parts, pixels: torch.Tensor) -> torch.Tensor:
    vae = parts.vae
    pixels = pixels.to(parts.device, vae.encoder.conv_in.weight.dtype)
    latents = vae.encode(pixels).latent_dist.mode()
    latents = _patchify(latents)
    mean, std = _statistics(vae, latents)
    normal: torch.Tensor = ((latents - mean) / std).to(parts.dtype)
    return normal


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like.device, like.dtype)
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return mean, torch.sqrt(variance).to(like.device, like.dtype)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """[1, channels, h, w] -> [1, h * w, channels]."""
    return latents.flatten(2).permute(0, 2, 1)


def _patchify(latents: torch.Tensor) -> torch.Tensor:
    """[1, c, 2h, 2w] -> [1, 4c, h, w]."""
    return torch.pixel_unshuffle(latents, 2)


def _unpatchify(latents: torch.Tensor) -> torch.Tensor:
    """[1, 4c, h, w] -> [1, c, 2h, 2w]."""
    return torch.pixel_shuffle(latents, 2)
