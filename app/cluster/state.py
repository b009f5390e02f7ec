"""What Ray's controller says of the replicas; the only module that asks it.

The ports of single replicas are in no public interface of Ray's: HAProxy's manager asks the
controller for them, and so do we, hence the bound on Ray's version in pyproject.toml.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.serve.context import _get_global_client

from app.cluster.deployment import NAME
from app.cluster.targets import Target
from app.errors import StartupError

_ANSWER_S = 10.0


def connect(address: str | None) -> None:
    """Connect this process to the cluster, once; *address* is `host:port`, None the one here.

    Raises:
        StartupError: there is none, or it does not take this process's token.
    """
    try:
        ray.init(
            address=address or "auto",
            namespace="serve",
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(
            f"No Ray cluster lets this command in: {reason.rstrip('.')}. Start it with `ray "
            "start`, or name it by --address; its token is read from RAY_AUTH_TOKEN_PATH."
        ) from None


def read_targets() -> list[Target]:
    """Return the replicas that run; `connect` must have been called.

    Raises:
        StartupError: Serve does not run, or not in HAProxy mode, where replicas have no ports.
    """
    try:
        controller: Any = _get_global_client()._controller
        groups = ray.get(
            controller.get_target_groups.remote(NAME, from_proxy_manager=True), timeout=_ANSWER_S
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(
            f"Serve does not answer: {reason.rstrip('.')}. `serve status` says how it is."
        ) from None
    names = {node["NodeManagerAddress"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    return [
        Target(each.ip, each.port, each.name, names.get(each.ip, each.ip))
        for group in groups
        if group.app_name == NAME and group.protocol == "HTTP"
        for each in group.targets
    ]
