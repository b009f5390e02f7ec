"""What `klein generate` asks a service for: a request for each picture, as OpenAI's API has it."""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest
from app.images import OutputFormat

_MEDIA_TYPES = {b"\xff\xd8": "jpeg", b"RI": "webp"}
"""By a file's first two bytes; the service itself looks at what a file holds."""


def requests_of(
    arguments: argparse.Namespace, output: OutputFormat
) -> tuple[str, list[dict[str, Any]]]:
    """Return the path, and the body of the request for each picture.

    Raises:
        InvalidRequest: a picture cannot be read, or an adapter's scale is no number.
    """
    body: dict[str, Any] = {
        "prompt": arguments.prompt,
        "output_format": output.format,
        "stream": True,
        "partial_images": arguments.previews,
    }
    if arguments.size is not None:
        body["size"] = arguments.size
    if arguments.steps is not None:
        body["num_inference_steps"] = arguments.steps
    if arguments.guidance is not None:
        body["guidance_scale"] = arguments.guidance
    if arguments.lora is not None:
        body["loras"] = [_lora(each) for each in arguments.lora]
    path = "/v1/images/generations"
    if arguments.image:
        path = "/v1/images/edits"
        body["images"] = [{"image_url": _data_url(each)} for each in arguments.image]
    if arguments.mask:
        body["mask"] = {"image_url": _data_url(arguments.mask)}
    return path, [{**body, "seed": arguments.seed + index} for index in range(arguments.n)]


def _lora(text: str) -> dict[str, Any]:
    """Read a name and its scale, such as `style:0.8`; the service judges both."""
    name, colon, scale = (part.strip() for part in text.partition(":"))
    try:
        return {"name": name, "scale": float(scale)} if colon else {"name": name}
    except ValueError:
        raise InvalidRequest("--lora must be a name and a scale, such as style:0.8.") from None


def _data_url(path: Path) -> str:
    data = read_picture(path)
    kind = _MEDIA_TYPES.get(data[:2], "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_picture(path: Path) -> bytes:
    """Read the file of a picture.

    Raises:
        InvalidRequest: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}).") from None
