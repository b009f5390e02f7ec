"""The checkpoint on disk: klein's folder layout in 16 bits, and what a training needs to go on."""

import copy
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from tools.shapes.flow import Trainer
from tools.shapes.nets import build_scheduler, build_text_encoder, build_transformer

FOLDER = "shapes"
_RAW = "raw.safetensors"
_TAR = "shapes.tar"


def write(
    trainer: Trainer, codec: AutoencoderKLFlux2, tokenizer: Qwen2TokenizerFast, folder: Path
) -> None:
    """Write the averaged weights as a folder that `Flux2KleinPipeline` loads."""
    with trainer.weights.averaged():
        text = _copied(trainer.text, build_text_encoder())
        transformer = _copied(trainer.transformer, build_transformer())
    pipeline = Flux2KleinPipeline(
        scheduler=build_scheduler(),
        vae=copy.deepcopy(codec).cpu().to(torch.bfloat16),
        text_encoder=text,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )
    pipeline.save_pretrained(folder)
    for config in folder.rglob("*config.json"):
        _forget_origin(config)


def _forget_origin(config: Path) -> None:
    """Take out where a network was loaded from: it says nothing to others."""
    values = json.loads(config.read_text())
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copied(source: Any, fresh: Any) -> Any:
    state = {name: value.detach().cpu().clone() for name, value in source.state_dict().items()}
    fresh.load_state_dict(state)
    return fresh.to(torch.bfloat16)


def send(trainer: Trainer, folder: Path, out: Path) -> None:
    """Put the folder as one file, and the weights to go on from, where results are collected."""
    parts = [value.to(torch.bfloat16, copy=True).cpu() for value in trainer.values()]
    save_file({f"{i:04}": part for i, part in enumerate(parts)}, out / f"{_RAW}.new")
    with tarfile.open(out / f"{_TAR}.new", "w") as tar:
        tar.add(folder, FOLDER)
    for name in (_RAW, _TAR):
        (out / f"{name}.new").replace(out / name)


def unpack(place: Path, into: Path) -> Path:
    """The folder inside a sent tar; *place* itself where it is such a folder."""
    if is_folder(place):
        return place
    with tarfile.open(place / _TAR) as tar:
        tar.extractall(into, filter="data")
    return into / FOLDER


def is_folder(place: Path) -> bool:
    """Whether *place* is a finished checkpoint and not what `send` left."""
    return (place / "model_index.json").is_file()


def go_on(trainer: Trainer, place: Path) -> None:
    """Load the weights that `send` saved, or those of a finished checkpoint: the average, in 16
    bits and without the heads, which then start anew.
    """
    if not is_folder(place):
        state = load_file(place / _RAW)
        trainer.load([state[name] for name in sorted(state)])
        return
    stored: dict[int, torch.Tensor] = {}
    for network, kind, name in (
        (trainer.text, Qwen3ForCausalLM, "text_encoder"),
        (trainer.transformer, Flux2Transformer2DModel, "transformer"),
    ):
        source = dict(kind.from_pretrained(place / name).named_parameters())
        stored |= {id(own): source[key] for key, own in network.named_parameters()}
    parameters = trainer.weights.parameters
    trainer.load([stored.get(id(each), each).detach() for each in parameters])
