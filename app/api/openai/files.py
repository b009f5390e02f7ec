"""`GET /v1/images/files/{name}`: the images whose URLs `response_format=url` returns."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from app.api.openai.image_store import ImageStore
from app.api.pieces import Body, Data, PieceResponse
from app.errors import Kind, KleinError

PATH = "/v1/images/files/"


def build_router(links: ImageStore) -> APIRouter:
    """Make the router that serves the image store *links*."""
    router = APIRouter(tags=["openai"])

    @router.get(PATH + "{name}", summary="Fetch a picture behind a link", response_class=Response)
    async def file(name: str) -> Response:
        link = links.get(name)
        if link is None:
            raise KleinError(
                "There is no picture behind this link, or no longer; ask for it again.",
                kind=Kind.NOT_FOUND,
            )
        headers = {"Cache-Control": f"private, max-age={int(links.lifetime_s)}"}
        return PieceResponse(Body(Data(link.data)), media_type=link.media_type, headers=headers)

    return router
