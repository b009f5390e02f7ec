"""ComfyUI's graph for FLUX.2 klein, distilled: four steps of Euler, no guidance.

A graph is one node for each key: its class and its inputs, of which those that come from another
node are a pair, that node's key and the number of its output.
"""

from __future__ import annotations

from typing import Any

TRANSFORMER = "flux-2-klein-4b-fp8.safetensors"
ENCODER = "qwen_3_4b.safetensors"
VAE = "flux2-vae.safetensors"
FILES = {"diffusion_models": TRANSFORMER, "text_encoders": ENCODER, "vae": VAE}
"""The files of both services, by ComfyUI's folders."""

Graph = dict[str, dict[str, Any]]


def klein(prompt: str, side: int, seed: int, steps: int = 4) -> Graph:
    """Make the graph of one square picture, saved as PNG by the node `save`."""
    size = {"width": side, "height": side}
    return {
        "transformer": _node("UNETLoader", unet_name=TRANSFORMER, weight_dtype="default"),
        "encoder": _node("CLIPLoader", clip_name=ENCODER, type="flux2"),
        "vae": _node("VAELoader", vae_name=VAE),
        "text": _node("CLIPTextEncode", text=prompt, clip=["encoder", 0]),
        "guider": _node("BasicGuider", model=["transformer", 0], conditioning=["text", 0]),
        "noise": _node("RandomNoise", noise_seed=seed),
        "sampler": _node("KSamplerSelect", sampler_name="euler"),
        "sigmas": _node("Flux2Scheduler", steps=steps, **size),
        "empty": _node("EmptyFlux2LatentImage", batch_size=1, **size),
        "latents": _node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "picture": _node("VAEDecode", samples=["latents", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["picture", 0], filename_prefix="beside"),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
