"""Serve's application with scripted pictures: what Serve's YAML names in the tests.

    import_path: tests.support.ray_replica:application
    args: {script: [slow=0.4]}

Each answer names the process that gave it in `X-Replica-Pid`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from starlette.types import Message, Receive, Scope, Send

from app.cluster import replica
from tests.support.scripted_engine import MakeScriptedEngine, Script


class NamedApp(replica.HeldApp):
    """The service's app, whose answers name its process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                pid = (b"x-replica-pid", str(os.getpid()).encode())
                message["headers"] = [*message["headers"], pid]
            await send(message)

        await super().__call__(scope, receive, named)


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of `app.cluster.replica`, with another engine; without a script its own."""
    script = Script.parse(arguments["script"])
    return replica.bind(MakeScriptedEngine(script), make_app=NamedApp)
