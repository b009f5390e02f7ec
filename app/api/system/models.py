"""`GET /v1/models`: the served model, known before anything is loaded, and its adapters."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.config import ApiConfig
from app.api.deps import Running
from app.api.openai.request import is_model
from app.api.schema.table import shorten
from app.domain import ModelSpec
from app.errors import Kind, KleinError
from app.service.adapters import Adapter

# n8n's picker shows only names of this form; Open WebUI's default is the last one.
_LISTED_ALIASES = ("gpt-image-1", "dall-e-3", "dall-e-2")


def build_router(config: ApiConfig) -> APIRouter:
    """Make the router for the served model."""
    router = APIRouter(tags=["openai"])

    @router.get("/v1/models", summary="List the served model and its adapters")
    async def models(runtime: Running) -> dict[str, object]:
        served = runtime.service.model
        names = [served.id]
        if config.has_aliases and config.lists_aliases:
            names += _LISTED_ALIASES
        listed = runtime.service.adapters.listed()
        data = [_model(name, served) for name in names] + [
            _adapter(each, served) for each in listed
        ]
        return {"object": "list", "data": data}

    # The hub id holds a slash, which the SDK sends as %2F: hence `:path`.
    @router.get("/v1/models/{id:path}", summary="Describe the served model or an adapter")
    async def model(id: str, runtime: Running) -> dict[str, object]:
        served = runtime.service.model
        if (adapter := runtime.service.adapters.find(id)) is not None:
            return _adapter(adapter, served)
        if not id or not is_model(id, served, config):
            name = shorten(id)
            raise KleinError(
                f"The model `{name}` is not served here; the one that is has the id `{served.id}`.",
                kind=Kind.NOT_FOUND,
                param="model",
                code="model_not_found",
                word=name,
            )
        return _model(id, served)

    return router


def _model(name: str, model: ModelSpec) -> dict[str, object]:
    return {"id": name, "object": "model", "created": model.created, "owned_by": model.owned_by}


def _adapter(adapter: Adapter, model: ModelSpec) -> dict[str, object]:
    """Describe *adapter* as the model that *model* is with it."""
    return {
        "id": adapter.name,
        "object": "model",
        "created": adapter.created,
        "owned_by": "local",
        "parent": model.id,
    }
