"""`klein generate`: pictures into files, by the service that runs, else by a model of its own.

A service that answers is used, since a second model would need the card's memory once more; it is
only where none does, or with `--local`, that a model is loaded here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli.client.pictures import draw
from app.cli.client.request import requests_of
from app.cli.client.service import ASKING, NoService, Service
from app.cli.console import LOADING, SIZE, STEPS, Options, note, plain, progress_bar
from app.cli.drawing import Display, Drawn, Event
from app.cli.output import Output, choose_output, choose_seed
from app.cli.preview import AUTO, NONE, PROTOCOLS, find_previews
from app.errors import InvalidRequest, KleinError
from app.images.formats import OUTPUT_FORMATS

if TYPE_CHECKING:
    from app.telemetry.cards import Cards
    from app.worker.child import EngineFactory

MOST = 100
"""Pictures of one command."""
PREVIEWS = 3
"""The most that a service sends of one picture."""

_NAMES = {
    "loras": "--lora",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "size": "--size",
    "images": "--image",
    "mask": "--mask",
    "prompt": "The prompt",
}
OPTIONS: Options = {
    "prompt": {"help": "what the picture shows; of an edit, what is to change"},
    "-o --output": {
        "metavar": "PLACE",
        "help": "a file, a folder, or - for standard output; the current folder where left out, "
        "with a name from the seed",
    },
    "--overwrite": {"action": "store_true", "help": "replace files that are there"},
    "-n": {"type": int, "default": 1, "help": "how many; picture i has the seed + i"},
    "--image": {
        "action": "append",
        "type": Path,
        "metavar": "FILE",
        "help": "a picture to edit; up to four",
    },
    "--mask": {
        "type": Path,
        "metavar": "FILE",
        "help": "where the first picture is repainted: its transparent pixels, or white ones",
    },
    "--format": {"choices": tuple(OUTPUT_FORMATS), "help": "by the name where left out, else png"},
    **SIZE,
    **STEPS,
    "--guidance": {"type": float, "help": "how close to the prompt; a distilled model has one"},
    "--seed": {"type": int, "help": "-1 or nothing draws one"},
    "--lora": {
        "action": "append",
        "metavar": "NAME:SCALE",
        "help": "an adapter of `klein loras`, instead of those of KLEIN_LORAS; up to four",
    },
    "--preview": {
        "choices": (AUTO, NONE, *PROTOCOLS),
        "default": AUTO,
        "help": "how the terminal shows pictures (auto)",
    },
    **ASKING,
    "--local": {
        "action": "store_true",
        "help": "load a model here, whatever runs; --precision, --plan and --cache-dir are its",
    },
    **LOADING,
}


@dataclass(slots=True)
class Sink:
    """Writes pictures as they come, and tells of them."""

    output: Output
    display: Display
    as_json: bool
    url: str | None
    told: list[dict[str, Any]] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)

    def on(self, index: int, event: Event) -> None:
        """Show an event; a picture is written and told."""
        self.display.on(index, event)
        if not isinstance(event, Drawn):
            return
        self.output.write(index, event.data)
        self.display.clear()
        for each in sorted({*event.warnings} - self.warnings):
            note(each)
        self.warnings.update(event.warnings)
        self.told.append(
            {
                "path": None if self.output.is_stdout else self.output.name(index),
                "width": event.width,
                "height": event.height,
                "seed": event.seed,
                "format": self.output.format.format,
                "bytes": len(event.data),
                "seconds": {stage: round(each, 6) for stage, each in event.seconds.items()},
                "warnings": list(event.warnings),
            }
        )
        if not self.as_json:
            stages = "".join(f", {stage} {each:.2f} s" for stage, each in event.seconds.items())
            line = f"{self.output.name(index)}: {event.width}x{event.height}, seed {event.seed}"
            print(
                line + stages, file=sys.stderr if self.output.is_stdout else sys.stdout, flush=True
            )

    def end(self) -> None:
        """Print what was told as one document, where that is wanted."""
        if self.as_json:
            print(json.dumps({"url": self.url, "pictures": self.told}))


def run(
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    *,
    make_engine: EngineFactory | None = None,
    cards: Cards | None = None,
) -> int:
    """Make the pictures; return the exit code."""
    if not 1 <= arguments.n <= MOST:
        raise InvalidRequest(f"-n must lie between 1 and {MOST}.")
    if arguments.mask and not arguments.image:
        raise InvalidRequest("--mask says where to repaint a picture; name that by --image.")
    if arguments.local and arguments.url:
        raise InvalidRequest("--local asks no service, so --url says nothing; take one of them.")
    if arguments.json and arguments.output == "-":
        raise InvalidRequest("-o - and --json would both write to standard output; take one.")
    arguments.seed = choose_seed(arguments.seed, arguments.n)
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    output = choose_output(
        arguments.output, arguments.format, seeds, overwrites=arguments.overwrite
    )
    service = None if arguments.local else _find_service(arguments, environ)
    try:
        if service is not None:
            return _show(
                arguments,
                environ,
                output,
                service.url,
                lambda sink: draw(service, *requests_of(arguments, output.format), sink.on),
            )
        from app.cli.local import draw_here

        return _show(
            arguments,
            environ,
            output,
            None,
            lambda sink: draw_here(arguments, environ, output, sink.on, make_engine, cards),
        )
    except InvalidRequest as error:
        error.rename(_NAMES)
        raise


def _show(
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    output: Output,
    url: str | None,
    make: Callable[[Sink], None],
) -> int:
    """Have *make* make the pictures while a terminal shows them."""
    previews = find_previews(arguments.preview, environ)
    arguments.previews = 0 if previews is None else PREVIEWS
    with progress_bar() as progress:
        display = Display(arguments.n, progress, previews)
        sink = Sink(output, display, arguments.json, url)
        make(sink)
    sink.end()
    return 0


def _find_service(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Service | None:
    """Return the service that is to be asked; None where none runs here, and none was named.

    Raises:
        KleinError: the one that was named does not answer, or it serves another model.
    """
    service = Service.find(arguments.url, environ)
    try:
        service.state()
    except NoService:
        if service.is_named:
            raise
        return None
    given = [name for name in ("precision", "plan", "cache_dir") if getattr(arguments, name)]
    if given:
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} says how a model is loaded, but the service at "
            f"{service.url} has loaded its own; leave it out, or load another one by --local."
        )
    _check_model(service, arguments.model, environ)
    return service


def _check_model(service: Service, asked: str | None, environ: Mapping[str, str]) -> None:
    """Refuse a service that serves another model than the one that is wanted."""
    wanted = asked or environ.get("KLEIN_MODEL", AUTO)
    if wanted == AUTO:
        return
    if "/" in wanted or wanted.startswith(".") or os.path.lexists(wanted):
        if asked is not None:
            raise InvalidRequest(
                f"Whether the service at {service.url} serves {asked} cannot be told; leave "
                "--model out, or load the model here, beside it, by --local."
            )
        wanted = environ.get("KLEIN_VARIANT", "")
    served = [str(each["id"]) for each in service.listed("/v1/models", "id")["data"]]
    if wanted and wanted not in served:
        raise KleinError(
            f"The service at {service.url} serves {plain(served[0] if served else 'nothing')}, not "
            f"{plain(wanted)}; leave --model and KLEIN_MODEL out, or load that one here, beside "
            "it, by --local."
        )
