"""`/v1/jobs`: what a client waits for, and how it takes that back.

A job is one accepted request. A client sees and cancels its own only: those of its key, or of its
address where there is none. Since several people may share either, nothing says what is drawn.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from app.api.deps import Running
from app.errors import Kind, KleinError
from app.request_context import current_request
from app.service.ticket import Ticket

MAX_LISTED = 1000
"""More would hold up the event loop."""

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("", summary="List your own jobs that wait or run")
async def jobs(runtime: Running) -> Response:
    """List them in the order of their arrival, the first thousand."""
    tickets = runtime.service.own_tickets(current_request.get().client)
    data = [
        _describe(ticket, "running" if position is None else "queued", position)
        for ticket, position in islice(tickets.items(), MAX_LISTED)
    ]
    return JSONResponse({"object": "list", "data": data, "has_more": len(tickets) > len(data)})


@router.delete("/{id}", summary="Cancel one of your own jobs")
async def cancel(id: str, runtime: Running) -> Response:
    """Cancel one that waits, or one that runs at its next step; its request is answered with 499.

    Another client's is answered as one that does not exist.
    """
    ticket = runtime.service.find_ticket(current_request.get().client, id)
    if ticket is None:
        raise KleinError(
            "No job of yours has this id, or it has ended; GET /v1/jobs lists those there are.",
            kind=Kind.NOT_FOUND,
            param="id",
            code="job_not_found",
        )
    answer = JSONResponse(_describe(ticket, "cancelled", None))
    ticket.cancel()
    return answer


def _describe(ticket: Ticket, state: str, position: int | None) -> dict[str, Any]:
    advance = ticket.advance()
    return {
        "id": ticket.id,
        "object": "job",
        "created": int(ticket.created),
        "request_id": ticket.request_id,
        "state": state,
        "position": position,
        "images": advance.images,
        "images_done": advance.done,
        "progress": round(advance.fraction, 3),
    }
