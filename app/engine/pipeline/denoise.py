"""The denoise stage: from noise to latents.

The operations and their order are those of `Flux2KleinPipeline.__call__` and, with a mask, of
`Flux2KleinInpaintPipeline` at strength 1, so the same noise gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from app.domain import ImageSpec
from app.engine.pipeline.components import PipelineComponents, pack
from app.engine.pipeline.references import References, Source
from app.engine.pipeline.text import Text
from app.errors import Cancelled

OnStep = Callable[[int, Callable[[], torch.Tensor]], None]
"""Called after each denoising step with its number and a function that estimates x0."""


def draw_noise(components: PipelineComponents, spec: ImageSpec) -> torch.Tensor:
    """Draw the initial noise [1, c, h, w] on the CPU, so that it is the same on every device."""
    generator = torch.Generator("cpu").manual_seed(spec.seed)
    shape = (1, components.transformer.network.config.in_channels, *components.grid(spec))
    # float32, then cast: the same values as a draw in bfloat16, in half the time.
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(components.dtype)


def denoise(
    components: PipelineComponents,
    spec: ImageSpec,
    text: Text,
    references: References,
    noise: torch.Tensor,
    *,
    on_step: OnStep,
    is_cancelled: Callable[[], bool],
) -> torch.Tensor:
    """Denoise *noise*, [1, c, h, w], to packed latents, [1, h * w, c].

    Raises:
        Cancelled: *is_cancelled* returned true between two steps.
    """
    if components.device.type == "cuda":
        noise = noise.pin_memory()
    latents = noise = pack(noise.to(components.device, non_blocking=True))
    sigmas, timesteps = components.schedule(spec.num_inference_steps, latents.shape[1])
    with components.offloader.on_gpu(components.transformer):
        velocity_of = _velocity(components, spec, text, references)
        for number in range(spec.num_inference_steps):
            if is_cancelled():
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


def _velocity(
    components: PipelineComponents, spec: ImageSpec, text: Text, references: References
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the velocity as a function of latents and timestep; the rest is computed once."""
    transformer = components.transformer
    prompts = (text.embeddings, text.negative)
    contexts = [transformer.embed_context(each) for each in prompts if each is not None]
    rope = components.rope(contexts[0].shape[1], (components.grid(spec), *references.grids))

    def velocity_of(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = latents
        if references.latents is not None:
            tokens = torch.cat([latents, references.latents.to(latents.dtype)], dim=1)
        wanted, *unwanted = [
            transformer.predict(tokens, timestep, context, *rope)[:, : latents.shape[1]]
            for context in contexts
        ]
        if not unwanted:
            return wanted
        return unwanted[0] + spec.guidance_scale * (wanted - unwanted[0])

    return velocity_of


def _estimate(latents: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Estimate the clean latents (x0) from *latents* at *sigma*: x - sigma * velocity."""
    return latents - sigma * velocity


def _keep_source(
    source: Source, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, number: int
) -> torch.Tensor:
    """Restore the source latents outside the mask, noised to the next step's sigma."""
    kept = source.latents
    if number < len(sigmas) - 1:
        sigma = sigmas.to(kept.dtype)[number]
        kept = sigma * noise + (1.0 - sigma) * kept
    return (1 - source.weights) * kept + source.weights * latents
