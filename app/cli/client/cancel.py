"""`klein cancel`: take back jobs of this client, those that wait and those that run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from urllib.parse import quote

from app.cli.client.service import ASKING, Service
from app.cli.console import Options, note, plain
from app.errors import InvalidRequest, KleinError

OPTIONS: Options = {
    "ids": {"nargs": "*", "metavar": "id", "help": "jobs of `klein queue`"},
    "--all": {"action": "store_true", "help": "each job of yours, instead of ids"},
    **ASKING,
}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Cancel what is named; return 0, or 1 where one of it was no job any more."""
    if bool(arguments.ids) == arguments.all:
        raise InvalidRequest("Say which: ids of `klein queue`, or --all.")
    service = Service.find(arguments.url, environ)
    ids = arguments.ids
    if arguments.all:
        ids = [str(job["id"]) for job in service.listed("/v1/jobs", "id")["data"]]
    done, missed = [], 0
    for id in ids:
        try:
            done.append(service.delete(f"/v1/jobs/{quote(id, safe='')}"))
        except KleinError as error:
            if error.code != "job_not_found":
                raise
            # One that ended meanwhile is what was asked for.
            missed += not arguments.all
            if not arguments.all:
                note(f"{plain(id)}: no job of yours, or it has ended")
    if arguments.json:
        print(json.dumps({"object": "list", "data": done}))
    else:
        for job in done:
            print(f"cancelled {plain(job['id'])}")
        if arguments.all and not done:
            print("No job of yours waits or runs.")
    return 1 if missed else 0
