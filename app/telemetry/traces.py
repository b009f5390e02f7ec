"""Whether traces are sent: where the standard variables name a collector, and never otherwise.

OpenTelemetry reads `OTEL_*` itself. This looks only whether it is wanted, before its packages are
imported, and says in one sentence where it cannot be had.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.telemetry.tracing import Traces

_log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


def start_traces(environ: Mapping[str, str]) -> Traces | None:
    """Start what sends traces, or return None: they are not asked for, or it logs why not."""
    if _first(environ, _ENDPOINTS) is None or _is_disabled(environ):
        return None
    reason = _unusable(environ)
    if reason is None:
        try:
            from app.telemetry.tracing import Traces

            return Traces()
        except ImportError:
            reason = (
                "OpenTelemetry's packages are not installed; install them with "
                "pip install 'fastapi[opentelemetry]'"
            )
        except ValueError as error:
            reason = f"a variable OTEL_* cannot be understood ({error})"
    _log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: %s.", reason)
    return None


def _is_disabled(environ: Mapping[str, str]) -> bool:
    is_disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return is_disabled or _exporter(environ) == "none"


def _unusable(environ: Mapping[str, str]) -> str | None:
    """Return which variable asks for what cannot be had here."""
    if _exporter(environ) != "otlp":
        return "OTEL_TRACES_EXPORTER may be otlp or none here"
    if (_first(environ, _PROTOCOLS) or _PROTOCOL) != _PROTOCOL:
        return (
            f"OTEL_EXPORTER_OTLP_PROTOCOL may be {_PROTOCOL} only here, which collectors take at "
            "port 4318"
        )
    return None


def _exporter(environ: Mapping[str, str]) -> str:
    return environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"


def _first(environ: Mapping[str, str], names: tuple[str, str]) -> str | None:
    """Return the first of *names* that is set: the one for traces goes before the one for all."""
    return next(filter(None, (environ.get(name, "").strip() for name in names)), None)
