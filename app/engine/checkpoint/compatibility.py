"""Checks that a checkpoint's components fit each other: configs only, before any weight is read.

The usual mistakes are a wrong VAE (washed-out colours) and a wrong text encoder (shape errors in
the first image); the error for each is one sentence that names the component, what was found and
what is needed.
"""

from __future__ import annotations

from app.engine.checkpoint.files import Checkpoint
from app.engine.models.entry import Architecture
from app.engine.models.flux2_klein import TOKENIZER, TOKENIZER_WORDS
from app.errors import StartupError


def check_compatibility(
    checkpoint: Checkpoint, architecture: Architecture, *, is_ours: bool
) -> None:
    """Check that the components of *checkpoint* fit; *is_ours* for the registered model's files.

    Raises:
        StartupError: they do not; the message names the component, what was found and what is
        needed.
    """
    encoder = checkpoint.encoder.config
    kind = (encoder.get("architectures") or [encoder.get("model_type", "nothing")])[0]
    if encoder.get("model_type") != "qwen3":
        raise _misfit("text_encoder", f"is a {kind}", "a Qwen3ForCausalLM")
    read = architecture.text_layers
    layers = int(encoder.get("num_hidden_layers", 0))
    if layers < read[-1]:
        raise _misfit("text_encoder", f"has {layers} layers", f"at least {read[-1]}")
    hidden = int(encoder["hidden_size"])
    if is_ours and hidden != architecture.text_width:
        raise _misfit("text_encoder", f"has the hidden size {hidden}", f"{architecture.text_width}")
    joint = int(checkpoint.transformer.config["joint_attention_dim"])
    if joint != len(read) * hidden:
        raise _misfit(
            "text_encoder",
            f"has the hidden size {hidden}",
            f"{joint / len(read):g}, a third of the transformer's joint_attention_dim",
        )
    words = int(encoder.get("vocab_size", 0))
    if checkpoint.tokenizer == TOKENIZER and words < TOKENIZER_WORDS:
        raise _misfit(
            "text_encoder",
            f"has a vocabulary of {words}",
            f"at least {TOKENIZER_WORDS}, or the folder tokenizer that belongs to it",
        )
    _check_vae(checkpoint, architecture, is_ours=is_ours)


def _check_vae(checkpoint: Checkpoint, architecture: Architecture, *, is_ours: bool) -> None:
    part = "vae" if checkpoint.vae.label == "vae" else f"vae ({checkpoint.vae.label})"
    latent = int(checkpoint.vae.config["latent_channels"])
    if is_ours and latent != architecture.latent_channels:
        raise _misfit(part, f"has {latent} latent channels", f"{architecture.latent_channels}")
    channels = int(checkpoint.transformer.config["in_channels"])
    if channels != 4 * latent:
        raise _misfit(
            part,
            f"has {latent} latent channels",
            f"{channels / 4:g}, a quarter of the transformer's in_channels {channels}",
        )
    if not {"bn.running_mean", "bn.running_var"} <= set(checkpoint.vae.slots):
        raise _misfit(
            part, "has no batch-norm statistics (bn.running_mean, bn.running_var)", "FLUX.2's VAE"
        )


def _misfit(part: str, found: str, needed: str) -> StartupError:
    return StartupError(f"The model's parts do not fit: {part} {found}, needed is {needed}.")
