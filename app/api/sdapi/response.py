"""The answers of this dialect: pictures with their `info`, errors, and what clients list.

Nothing here waits for the GPU. There is one model, one sampler and one schedule, the model's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from app import __version__
from app.api.errors import REPLIES, Shape
from app.api.pieces import Body, Data
from app.api.sdapi.request import SdRequest
from app.domain import ModelSpec
from app.errors import KleinError
from app.service.adapters import Adapter
from app.service.recipes import SAMPLER, write_hashes, write_settings
from app.service.results import Picture
from app.service.ticket import Ticket

_STARTED = 0.01
"""The least progress of a client that has jobs; 0 means none."""

SAMPLERS = ({"name": SAMPLER, "aliases": ["euler"], "options": {}},)
SCHEDULERS = (
    {
        "name": "automatic",
        "label": "Automatic",
        "aliases": None,
        "default_rho": -1.0,
        "need_inner_model": False,
    },
)
UPSCALERS = (
    {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0},
)


def _envelope(error: KleinError) -> Mapping[str, object]:
    return {
        "error": error.code or REPLIES[error.kind].code,
        "detail": error.message,
        "body": "",
        "errors": error.message,
    }


ERRORS = Shape("/sdapi/", _envelope, 'Basic realm="klein-server", charset="UTF-8"')


def list_models(model: ModelSpec) -> list[dict[str, object]]:
    """Describe the served model; clients select it by `title` or by `model_name`."""
    return [
        {
            "title": model.id,
            "model_name": model.id,
            "hash": None,
            "sha256": None,
            "filename": model.id,
            "config": None,
        }
    ]


def list_loras(adapters: Iterable[Adapter]) -> list[dict[str, object]]:
    """Describe adapters; prompts name them as `<lora:name:0.8>`."""
    return [
        {
            "name": each.name,
            "alias": each.name,
            "path": "",
            "metadata": {},
        }
        for each in adapters
    ]


def options(model: ModelSpec) -> dict[str, object]:
    """Return those options that clients read; without Forge's, by which they recognize it."""
    return {
        "sd_model_checkpoint": model.id,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }


def progress(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Describe what a client waits for, as one piece of work."""
    advances = [ticket.advance() for ticket in tickets]
    images = sum(each.images for each in advances)
    step, steps = next(((e.step, e.steps) for e in advances if e.done < e.images), (0, 0))
    fraction = left_s = 0.0
    if images:
        made = sum(each.fraction * each.images for each in advances)
        fraction = max(_STARTED, min(1.0, made / images))
        left_s = max(0.0, time.time() - tickets[0].created) * (1 / fraction - 1)
    return {
        "progress": fraction,
        "eta_relative": left_s,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "",
            "job_count": images,
            "job_timestamp": "0",
            "job_no": sum(each.done for each in advances),
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": None,
        "textinfo": None,
    }


def warnings(pictures: Sequence[Picture], asked: SdRequest) -> list[str]:
    """Collect the request's notes and the pictures' warnings, each once."""
    made = (warning for picture in pictures for warning in picture.warnings)
    return list(dict.fromkeys((*asked.notes, *made)))


def answer(pictures: Sequence[Picture], asked: SdRequest, model: ModelSpec) -> Body:
    """Make the body: `images` in base64, `parameters` as they were read, `info` as a text."""
    tail = {
        "parameters": asked.parameters,
        "info": json.dumps(_info(pictures, asked, model), ensure_ascii=False),
    }
    parts: list[bytes | Data] = [b'{"images": [']
    for index, picture in enumerate(pictures):
        parts += [b', "' if index else b'"', Data(picture.data, is_base64=True), b'"']
    return Body(*parts, b"], " + json.dumps(tail, ensure_ascii=False).encode()[1:])


def _info(pictures: Sequence[Picture], asked: SdRequest, model: ModelSpec) -> dict[str, Any]:
    first, image = pictures[0], asked.image
    seeds = [picture.seed for picture in pictures]
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(pictures),
        "negative_prompt": "",
        "all_negative_prompts": [""] * len(pictures),
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": first.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": SAMPLER,
        "cfg_scale": image.guidance_scale,
        "steps": image.steps,
        "batch_size": len(pictures),
        "restore_faces": False,
        "sd_model_name": model.id,
        "sd_model_hash": None,
        "extra_generation_params": {"Lora hashes": hashes}
        if (hashes := write_hashes(first.loras))
        else {},
        "index_of_first_image": 0,
        "infotexts": [_infotext(picture, asked, model) for picture in pictures],
        "styles": [],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "version": f"klein-server {__version__}",
        "notes": warnings(pictures, asked),
    }


def _infotext(picture: Picture, asked: SdRequest, model: ModelSpec) -> str:
    settings = write_settings(
        steps=asked.image.steps,
        guidance=asked.image.guidance_scale,
        seed=picture.seed,
        size=f"{picture.width}x{picture.height}",
        model=model.id,
        loras=picture.loras,
    )
    return f"{asked.prompt}\n{settings}"
