"""`POST /v1/tokens`: how many tokens a prompt has, and where it will be cut."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.config import ApiConfig
from app.api.deps import Running
from app.api.schema.body import JSON, read_json, require_media_type
from app.api.schema.request import require_prompt
from app.api.schema.table import Field, FieldTable, Type
from app.limits import MAX_PROMPT

_PROMPT = Field(
    "prompt",
    Type.TEXT,
    "What is counted; it may be blank.",
    max_length=MAX_PROMPT,
    schema={"type": "string", "maxLength": MAX_PROMPT},
)


def table(config: ApiConfig) -> FieldTable:
    """Make the table of fields."""
    return FieldTable((_PROMPT,), is_strict=config.is_strict)


def build_router(config: ApiConfig) -> APIRouter:
    """Make the router."""
    router = APIRouter(prefix="/v1/tokens", tags=["models"])
    fields = table(config)

    @router.post("", summary="Count a prompt's tokens, and say where it will be cut")
    async def tokens(request: Request, runtime: Running) -> dict[str, object]:
        """Count them as the model does; it makes no picture and needs no worker."""
        require_media_type(request, JSON)
        prompt = require_prompt(fields.read(await read_json(request)))
        counted = await runtime.tokens.count(prompt)
        return {
            "object": "tokens",
            "tokens": counted.tokens,
            "limit": counted.limit,
            "cut_at": counted.cut_at,
        }

    return router
