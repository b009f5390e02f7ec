"""`klein sleep`: have a service that runs free the card, until the next request or `klein wake`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from app.cli.client.service import ASKING, Service
from app.cli.console import Options, plain

OPTIONS: Options = {**ASKING}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask, and print what the service answers; return 0."""
    return tell(Service.find(arguments.url, environ), "/sleep", as_json=arguments.json)


def tell(service: Service, path: str, *, as_json: bool) -> int:
    """POST to *path* and print what *service* answers; return 0."""
    answer = service.post(path)
    print(json.dumps(answer) if as_json else plain(answer.get("message", "")))
    return 0
