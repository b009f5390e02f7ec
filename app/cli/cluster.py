"""`klein cluster config|environ|targets`: what Ray Serve is given, and where its replicas are."""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

from app.cli.console import LOADING, Options, note
from app.cluster.deployment import Shape, describe, write_yaml
from app.cluster.environ import exports, variables
from app.cluster.targets import replace_file, write_document
from app.errors import InvalidRequest, StartupError
from app.model_choice import choose_model, largest_card
from app.settings import Settings, variable
from app.telemetry.cards import Cards

OPTIONS: Options = {
    "action": {
        "choices": ("config", "environ", "targets"),
        "help": "config: Serve's YAML, from the settings; environ: what to export before `ray "
        "start`, on every node; targets: the replicas that run, for Prometheus",
    },
    "--nodes": {"type": int, "default": 1, "help": "config: machines"},
    "--replicas": {
        "type": int,
        "help": "config: services, each with a card; those of this machine times the nodes",
    },
    "--min-replicas": {
        "type": int,
        "help": "config: scale from so many, 0 too, to --replicas; all run always where left out",
    },
    "--cores": {"type": int, "help": "config: cores of a machine; those of this one"},
    "--start-seconds": {
        "type": float,
        "default": 60.0,
        "help": "config: what a start takes, for Retry-After while no replica runs",
    },
    "--address": {"help": "targets: the cluster's host:port; the one that runs here"},
    "--every": {
        "type": float,
        "metavar": "SECONDS",
        "help": "targets: write the file again and again, until Ctrl-C",
    },
    "-o --output": {"type": Path, "help": "config, targets: the file; else standard output"},
    **LOADING,
}


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write what was asked for; return 0."""
    if arguments.action == "environ":
        found = variables(settings)
        document = json.dumps({each.name: each.value for each in found})
        print(document if arguments.json else "\n".join(exports(found)))
        return 0
    if arguments.action == "targets":
        return _targets(arguments)
    described = describe(settings, _shape(arguments, settings), _environ(arguments))
    text = json.dumps(described) + "\n" if arguments.json else write_yaml(described)
    _write(arguments.output, text)
    return 0


def _shape(arguments: argparse.Namespace, settings: Settings) -> Shape:
    """Choose how many replicas there are, and whether each has a card, where nobody said it."""
    cards = Cards()
    seen = len(cards.visible())
    is_named = "device" in settings.model_fields_set
    is_demo = choose_model(settings, largest_card(settings, cards)).is_demo
    gpus = 0 if settings.is_cpu or (is_demo and not seen and not is_named) else 1
    here = max(1, seen if gpus else len(settings.device))
    nodes = arguments.nodes
    return Shape(
        nodes=nodes,
        replicas=here * nodes if arguments.replicas is None else arguments.replicas,
        min_replicas=arguments.min_replicas,
        gpus=gpus,
        cores=arguments.cores or len(os.sched_getaffinity(0)),
        start_s=arguments.start_seconds,
    )


def _environ(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment with what options say instead of it."""
    given = ("model", "precision", "plan", "cache_dir")
    said = {variable(each): getattr(arguments, each) for each in given}
    return {**os.environ, **{name: str(value) for name, value in said.items() if value is not None}}


def _targets(arguments: argparse.Namespace) -> int:
    if find_spec("ray") is None:
        raise StartupError("Ray is not installed here; `pip install '.[ray]'` brings it.")
    if arguments.every is not None and (arguments.every <= 0 or arguments.output is None):
        raise InvalidRequest("--every takes seconds above 0, and needs -o FILE.")
    # Not earlier: it takes seconds, and only this action needs it.
    from app.cluster import state

    state.connect(arguments.address)
    while True:
        try:
            _write(arguments.output, write_document(state.read_targets()))
        except StartupError as error:
            if arguments.every is None:
                raise
            # The file stays as it was: Prometheus goes on with what it knows.
            note(error.message)
        if arguments.every is None:
            return 0
        time.sleep(arguments.every)


def _write(path: Path | None, text: str) -> None:
    if path is None:
        print(text, end="")
        return
    try:
        replace_file(path, text)
    except OSError as error:
        raise StartupError(
            f"{path} cannot be written ({error.strerror}); give another file."
        ) from None
