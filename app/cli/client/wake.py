"""`klein wake`: have a service whose worker sleeps load the model again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from app.cli.client.service import ASKING, Service
from app.cli.client.sleep import tell
from app.cli.console import Options

OPTIONS: Options = {**ASKING}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask, and print what the service answers; return 0."""
    return tell(Service.find(arguments.url, environ), "/wake", as_json=arguments.json)
