"""`/v1/loras`: the adapters that requests may name, as the directory holds them now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from app.api.deps import Running
from app.api.schema.table import shorten
from app.errors import Kind, KleinError
from app.request_context import current_request
from app.runtime import Runtime
from app.service.adapters import Adapter
from app.service.previews import FORMAT

router = APIRouter(prefix="/v1/loras", tags=["loras"])


@router.get("", summary="List the adapters (LoRA) that requests may name")
async def loras(runtime: Running) -> dict[str, object]:
    """List them by name; none until the model is loaded."""
    listed = runtime.service.adapters.listed()
    return {"object": "list", "data": [_describe(each, runtime) for each in listed]}


@router.get("/{name}", summary="Describe one adapter")
async def lora(name: str, runtime: Running) -> dict[str, Any]:
    """Describe it as in the list."""
    return _describe(_find(name, runtime), runtime)


@router.get("/{name}/preview", summary="The picture beside an adapter's file, made small")
async def preview(name: str, runtime: Running) -> Response:
    """Show it; `preview` in the list says whether there is one."""
    client = current_request.get().client
    data = await runtime.previews.get(_find(name, runtime), client)
    if data is None:
        raise KleinError(
            "This adapter has no picture that could be shown.",
            kind=Kind.NOT_FOUND,
            param="name",
            code="preview_not_found",
        )
    return Response(
        data,
        media_type=FORMAT.media_type,
        headers={"Cache-Control": "private, max-age=60", "X-Content-Type-Options": "nosniff"},
    )


def _find(name: str, runtime: Runtime) -> Adapter:
    adapters = runtime.service.adapters
    found = adapters.find(name)
    if found is None:
        word = shorten(name)
        near = ", ".join(f"`{each}`" for each in adapters.near(name))
        like = f"names like it are {near}" if near else "GET /v1/loras lists those there are"
        raise KleinError(
            f"There is no adapter `{word}`; {like}.",
            kind=Kind.NOT_FOUND,
            param="name",
            code="model_not_found",
            word=word,
        )
    return found


def _describe(adapter: Adapter, runtime: Runtime) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "lora",
        "parent": runtime.service.model.id,
        "rank": adapter.rank,
        "size_bytes": adapter.size_bytes,
        "sha256": adapter.sha256,
        "created": adapter.created,
        "scale": runtime.service.adapters.default_scale(adapter.name),
        "preview": f"{router.prefix}/{adapter.name}/preview" if adapter.preview else None,
    }
