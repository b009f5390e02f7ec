"""Run by `test_packages.py` in an environment of its own: LiteLLM, LangChain and semantic-kernel
against a service.

    python python_clients.py http://127.0.0.1:8000/v1 picture.png mask.png

Writes one JSON object: what each client got.
"""

import asyncio
import json
import sys
import urllib.request
from pathlib import Path

import litellm
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import (
    OpenAITextToImage,
    OpenAITextToImageExecutionSettings,
)

litellm.suppress_debug_info = True


async def kernel(base_url: str, picture: Path) -> tuple[list[str], list[str]]:
    """Ask semantic-kernel's service for two pictures and for an edit."""
    async with AsyncOpenAI(base_url=base_url, api_key="none-at-all") as client:
        service = OpenAITextToImage(ai_model_id="flux.2-klein-4b", async_client=client)
        settings = OpenAITextToImageExecutionSettings(n=2, width=256, height=256)
        made = await service.generate_images("a", settings=settings)
        return made, await service.edit_image("a", image_paths=[str(picture)])


def fetch(url: str) -> str:
    """Follow a link without a key and return its type."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.headers["content-type"]


def run(base_url: str, picture: Path, mask: Path) -> dict[str, object]:
    """Ask for pictures in every way that the three have."""
    service = {"model": "openai/flux.2-klein-4b", "api_base": base_url, "api_key": "none-at-all"}
    made = litellm.image_generation(prompt="a", n=2, size="256x256", seed=5, **service)
    with picture.open("rb") as image, mask.open("rb") as layer:
        edited = litellm.image_edit(image=[image], mask=layer, prompt="a", **service)
    try:
        litellm.image_generation(prompt="a", size="1000x1000", max_retries=0, **service)
        refused = ""
    except litellm.BadRequestError as error:
        refused = str(error)
    kernel_made, kernel_edited = asyncio.run(kernel(base_url, picture))
    wrapper = DallEAPIWrapper(base_url=base_url, api_key="none-at-all", n=2, size="256x256")
    return {
        "litellm_made": [item.b64_json for item in made.data],
        "litellm_edited": [item.b64_json for item in edited.data],
        "litellm_refused": refused,
        # Followed here: on the server of the tests a link ends after a second.
        "langchain_links": [fetch(url) for url in wrapper.run("a").split("\n")],
        "kernel_made": kernel_made,
        "kernel_edited": kernel_edited,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
