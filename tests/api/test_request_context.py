"""One context for each request: what is noted of it stands in its own line, and in no other."""

from __future__ import annotations

import asyncio
import logging

from app.request_context import current_request


async def test_requests_at_the_same_time_have_contexts_of_their_own(client, service, caplog):
    """What the service notes for one stands in that one's line, beside its own outcome."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    admit = service.admit

    def note(**given):
        context = current_request.get()
        context.notes["seen"] = float(context.id)
        context.loras = (f"ink-{context.id}", "oil")
        return admit(**given)

    service.admit = note
    bodies = {"1": {"prompt": "a"}, "2": {"prompt": ""}, "3": {"prompt": "a"}}
    await asyncio.gather(
        *(
            client.post("/generate", json=body, headers={"x-request-id": name})
            for name, body in bodies.items()
        )
    )

    lines = [record for record in caplog.records if record.name == "app.api.access"]
    assert {(line.seen, line.outcome, line.loras) for line in lines} == {
        (1.0, "ok", "ink-1,oil"),
        (2.0, "invalid", "ink-2,oil"),
        (3.0, "ok", "ink-3,oil"),
    }
    assert current_request.get(None) is None
