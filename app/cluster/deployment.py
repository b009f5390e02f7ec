"""The deployment in Serve's own words: what its YAML says, from the service's settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import StartupError
from app.settings import PREFIX, Settings, complete_path, is_loopback, variable

NAME = "klein"
"""Of the application and of its one deployment."""
MAX_ONGOING_REQUESTS = 64
"""Requests that Serve lets a replica have at once, at least.

More than it has places in its queue: the refusal of what is too much is then the service's own,
with JSON and Retry-After, where Serve's would be plain text. Health and metrics need some, too.
"""
_OTHER_REQUESTS = 32
_LAST_ANSWERS_S = 60
_START_S = 60
"""Seconds that a start takes, where nobody measured it: 43 s on an H100 in fp8, and some more."""
_TARGET = 2
"""Requests at a replica before another is started: one that runs, and one that waits for it."""
_ANYWHERE = "0.0.0.0"
_OWN = frozenset({"api_keys", "device", "host", "port", "image_urls", "sleep_api"})
"""Settings that are not passed on as they are."""
_HEAP = {"MALLOC_MMAP_THRESHOLD_": "2097152", "MALLOC_TRIM_THRESHOLD_": "8388608"}


@dataclass(frozen=True, slots=True)
class Shape:
    """How many replicas there are to be, and what each of them may have."""

    nodes: int = 1
    replicas: int = 1
    min_replicas: int | None = None
    """From how many on Serve scales; None keeps *replicas*."""
    gpus: int = 1
    """Per replica; 0 computes on the CPU."""
    cores: int = 1
    """Of one node."""
    start_s: float = _START_S
    """Seconds that a replica needs until it is ready."""

    @property
    def per_node(self) -> int:
        """Replicas that one node gets at most."""
        return math.ceil(self.replicas / self.nodes)

    @property
    def threads(self) -> int:
        """Threads that one replica computes with on the CPU: its share of the cores."""
        return max(1, self.cores // self.per_node)


def check_exposure(settings: Settings, *, has_haproxy: bool) -> None:
    """Refuse replicas that other machines reach and that ask for no key.

    Raises:
        StartupError: there is no key, and nobody said that this is wanted.
    """
    if settings.api_keys or settings.trust_network:
        return
    if has_haproxy:
        raise StartupError(
            "In HAProxy mode every replica listens on all addresses of its node, and no key is "
            "set; set KLEIN_API_KEYS_FILE, or set KLEIN_TRUST_NETWORK=true where a firewall closes "
            "the ports that docs/scale.md lists."
        )
    if not is_loopback(settings.host):
        raise StartupError(
            f"{settings.host} can be reached from other machines and no key is set; set "
            "KLEIN_API_KEYS_FILE, or listen on 127.0.0.1, or set KLEIN_TRUST_NETWORK=true."
        )


def describe(settings: Settings, shape: Shape, environ: Mapping[str, str]) -> dict[str, object]:
    """Return Serve's configuration of one application: what its YAML says.

    *environ* is what *settings* were read from, options of the command included: variables are
    passed on as they are written there, but paths whole.

    Raises:
        StartupError: it would be reachable without a key or not at all, or would hold a secret.
    """
    _check(settings, shape, environ)
    return {
        "proxy_location": "EveryNode" if shape.nodes > 1 else "HeadOnly",
        "http_options": {"host": settings.host, "port": settings.port or 8000},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "app.cluster.replica:application",
                "args": {},
                "runtime_env": {"env_vars": _variables(settings, shape, environ)},
                "deployments": [_deployment(settings, shape)],
            }
        ],
    }


def _check(settings: Settings, shape: Shape, environ: Mapping[str, str]) -> None:
    least = shape.replicas if shape.min_replicas is None else shape.min_replicas
    if shape.nodes < 1 or shape.replicas < 1 or not 0 <= least <= shape.replicas:
        raise StartupError(
            "--nodes and --replicas take 1 or more, --min-replicas 0 to the number of replicas."
        )
    if environ.get(variable("api_keys")):
        raise StartupError(
            "Keys would stand in Serve's configuration, which Ray shows to everyone who reaches "
            "its dashboard; put them into a file on every node, and set KLEIN_API_KEYS_FILE "
            "instead of KLEIN_API_KEYS."
        )
    if shape.nodes > 1 and is_loopback(settings.host):
        raise StartupError(
            f"On {settings.host} the replicas of other nodes would start and never be asked; set "
            f"KLEIN_HOST={_ANYWHERE}, or an address that every node has."
        )
    check_exposure(settings, has_haproxy=True)


def _deployment(settings: Settings, shape: Shape) -> dict[str, object]:
    replicas: dict[str, object] = {"num_replicas": shape.replicas}
    if shape.min_replicas is not None:
        replicas = {
            "autoscaling_config": {
                "min_replicas": shape.min_replicas,
                "max_replicas": shape.replicas,
                "target_ongoing_requests": _TARGET,
                "upscale_delay_s": 5,
                "downscale_delay_s": 300,
            }
        }
    return {
        "name": NAME,
        **replicas,
        "max_ongoing_requests": max(MAX_ONGOING_REQUESTS, settings.queue_images + _OTHER_REQUESTS),
        "max_queued_requests": settings.queue_images * shape.replicas,
        "backpressure_config": {"status_code": 503, "retry_after_s": math.ceil(shape.start_s)},
        "graceful_shutdown_timeout_s": math.ceil(settings.deadline_s) + _LAST_ANSWERS_S,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        # What each asks for spreads them. `max_replicas_per_node` would too, but a replica beside
        # an old one that was deployed with a lower number is never placed.
        "ray_actor_options": {
            "num_cpus": shape.threads if shape.gpus == 0 else 1,
            "num_gpus": shape.gpus,
        },
    }


def _variables(settings: Settings, shape: Shape, environ: Mapping[str, str]) -> dict[str, str]:
    own: dict[str, str] = {}
    for name, field in ((variable(field), field) for field in sorted(settings.model_fields_set)):
        value = getattr(settings, field)
        if field in _OWN:
            continue
        if isinstance(value, Path):
            own[name] = str(value)
        elif field == "model" and os.sep in str(value):
            own[name] = str(complete_path(Path(value)))
        else:
            own[name] = environ[name]
    return own | {
        f"{PREFIX}HOST": settings.host,
        f"{PREFIX}DEVICE": "all" if shape.gpus else "cpu",
        f"{PREFIX}IMAGE_URLS": _word(settings.image_urls and shape.replicas == 1),
        f"{PREFIX}SLEEP_API": _word(settings.sleep_api and shape.replicas == 1),
        "OMP_NUM_THREADS": str(shape.threads),
        **_HEAP,
    }


def _word(value: object) -> str:
    return "true" if value else "false"


_REASONS = {
    "max_ongoing_requests": "above the queue, so that the service's own 503 answers",
    "max_queued_requests": "while no replica runs, so many requests wait for one; then 503 with",
    "retry_after_s": "seconds that a start takes",
    "graceful_shutdown_timeout_s": "what was accepted is finished first",
    f"{PREFIX}DEVICE": "what Ray leaves visible to the replica",
    f"{PREFIX}IMAGE_URLS": "a link leads to whichever replica is asked, not to the one that has it",
    f"{PREFIX}SLEEP_API": "it would send one of the replicas to sleep",
    "OMP_NUM_THREADS": "the replica's share of the cores; Ray would set 1",
}


def write_yaml(described: Mapping[str, object]) -> str:
    """Write what `describe` returned as YAML, with the reasons of single lines as comments."""
    return "\n".join(_lines(described, 0)) + "\n"


def _lines(value: Mapping[str, object], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            yield f"{indent}{key}:"
            yield from _lines(each, depth + 1)
        elif isinstance(each, list):
            yield f"{indent}{key}:"
            for entry in each:
                first, *rest = _lines(entry, depth + 1)
                yield f"{indent}- {first.strip()}"
                yield from rest
        else:
            reason = f"  # {_REASONS[key]}" if key in _REASONS else ""
            yield f"{indent}{key}: {json.dumps(each)}{reason}"
