"""Logging, set up once per process by `serve` or the worker; the request id travels in a
contextvar.

Lines go to standard error, for people or as one JSON object each. Prompts, keys and pictures are in
none of them.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being answered, for every line logged on its way."""

request_notes: ContextVar[dict[str, float] | None] = ContextVar("request_notes", default=None)
"""What is added to the one line of the request that is being answered: numbers, no words."""

hidden: ContextVar[tuple[str, ...]] = ContextVar("hidden", default=())
"""Texts of a caller's that no line may hold, should a library put one into an error's message."""

_SHORTEST_HIDDEN = 4

_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


def set_up(*, style: str, level: str) -> None:
    """Send all logging of this process to standard error in *style*, `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("app").setLevel(level.upper())
    logging.captureWarnings(True)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        extra = " ".join(f"{key}={value}" for key, value in _extras(record).items())
        line = f"{when}Z {record.levelname.lower():7} {record.getMessage()}"
        line = _one_line(f"{line} {extra}".rstrip())
        if record.exc_info:
            # Indented, so that no line of an error's message can pass for one of ours.
            line += "\n" + textwrap.indent(self.formatException(record.exc_info), "  ", _always)
        return _hide(line)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _hide(record.getMessage()),
            **_extras(record),
        }
        if record.exc_info:
            entry["exception"] = _hide(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False, default=str)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """What a call gave as `extra=`, and the request id where there is one."""
    extras = {key: value for key, value in vars(record).items() if key not in _FIELDS}
    if current := request_id.get():
        extras.setdefault("request_id", current)
    return extras


def _hide(text: str) -> str:
    """Take out what is hidden, as it is and as Python would write it."""
    for secret in hidden.get():
        if len(secret) >= _SHORTEST_HIDDEN:
            text = text.replace(secret, "[hidden]").replace(repr(secret)[1:-1], "[hidden]")
    return text


def _always(line: str) -> bool:
    return True


def _one_line(text: str) -> str:
    """Keep a caller's CR and LF from forging a line of their own."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
