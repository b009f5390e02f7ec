"""`POST /v1/tokens`: how many tokens a prompt has, and where it will be cut."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.deps import Running
from app.api.schema.body import JSON, read_json, require_media_type
from app.errors import InvalidRequest
from app.limits import MAX_PROMPT

router = APIRouter(prefix="/v1/tokens", tags=["models"])


@router.post("", summary="Count a prompt's tokens, and say where it will be cut")
async def tokens(request: Request, runtime: Running) -> dict[str, object]:
    """Count them as the model does; it makes no picture and needs no worker."""
    require_media_type(request, JSON)
    prompt = (await read_json(request)).get("prompt")
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise InvalidRequest(
            f"prompt must be a text of at most {MAX_PROMPT:,} characters.", param="prompt"
        )
    counted = await runtime.tokens.count(prompt)
    return {
        "object": "tokens",
        "tokens": counted.tokens,
        "limit": counted.limit,
        "cut_at": counted.cut_at,
    }
