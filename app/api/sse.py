"""Server-sent events as an ASGI response, with heartbeats and an end when the client disconnects.

Comments are the only heartbeat that openai-python and openai-node survive; an `id:` line or an
event without data crashes them, and a stream that ends without an error event is taken for success.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.disconnect import until_disconnected
from app.api.pieces import Body, send_body
from app.errors import Cancelled
from app.request_context import current_request

_HEARTBEAT = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """A response that sends what *messages* yields, each a whole event with its blank line.

    Whatever ends it, *messages* is closed and then *on_close* called, even if nothing was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        messages: AsyncGenerator[bytes | Body, None],
        *,
        headers: Mapping[str, str],
        heartbeat_s: float,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._messages = messages
        self._heartbeat_s = heartbeat_s
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers at once, then events, until the last one or until the client disconnects."""
        disconnect = asyncio.ensure_future(until_disconnected(receive))
        coming = asyncio.ensure_future(anext(self._messages, None))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            while True:
                await asyncio.wait(
                    {disconnect, coming},
                    timeout=self._heartbeat_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if disconnect.done():
                    current_request.get().error = Cancelled()
                    return
                message = coming.result() if coming.done() else _HEARTBEAT
                if message is None:
                    break
                if isinstance(message, Body):
                    await send_body(message, scope, send, disconnect, is_last=False)
                else:
                    await send({"type": "http.response.body", "body": message, "more_body": True})
                if coming.done():
                    coming = asyncio.ensure_future(anext(self._messages, None))
            await send({"type": "http.response.body", "body": b""})
        finally:
            disconnect.cancel()
            coming.cancel()
            await asyncio.wait({disconnect, coming})
            await self._messages.aclose()
            self._on_close()
