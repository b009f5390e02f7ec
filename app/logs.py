"""Logging, set up once per process by `serve` or the worker; a contextvar holds the request's ids.

Lines go to standard error, as text or as one JSON object each. They contain no prompts, keys or
images. What a client wrote, such as the name of a field, is a value of its own: quoted where it is
ambiguous, so that no text forges a pair or a line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from app.log_writer import LineHandler, write_to
from app.request_context import current_request

hidden: ContextVar[tuple[str, ...]] = ContextVar("hidden", default=())
"""A client's texts that no line may contain, should a library put one into an error's message."""

_SHORTEST_HIDDEN = 4
_MAX_WORD = 64
_MAX_VALUE = 256
_BARE = re.compile(r"[^\s\"'=\\]+")

_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


def set_up(*, style: str, level: str) -> None:
    """Send all logging of this process to standard error in *style*, `text` or `json`.

    Logging does not wait for a reader; call `flush` before the process ends in a way that skips
    Python's finalisation.
    """
    handler = LineHandler(write_to(sys.stderr))
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    root = logging.getLogger()
    for before in _handlers():
        before.close()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("app").setLevel(level.upper())
    # Its messages about a malformed form repeat the form's bytes, and the request is answered
    # anyway.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)


def flush() -> None:
    """Wait until all lines so far are written: two seconds at most, if nobody reads them."""
    for handler in _handlers():
        handler.flush()


def say(text: str) -> None:
    """Write *text* to standard error unchanged, after all lines so far."""
    if handlers := _handlers():
        handlers[0].say(text)
    else:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - there is no log yet


def clip(text: str, length: int = _MAX_WORD) -> str:
    """Truncate a client's word to 64 characters for a log line, or another text to *length*."""
    return text if len(text) <= length else text[: length - 3] + "..."


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        extra = " ".join(f"{key}={_bare(value)}" for key, value in _extras(record).items())
        message = _visible(_hide(record.getMessage()))
        line = f"{when}Z {record.levelname.lower():7} {message} {extra}".rstrip()
        if record.exc_info:
            # Indented, so that no line of an error's message can be taken for a log line.
            lines = _hide(self.formatException(record.exc_info)).splitlines()
            line += "".join(f"\n  {_visible(each)}" for each in lines)
        return line


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
        return _visible(json.dumps(entry, ensure_ascii=False, default=str))


def _handlers() -> list[LineHandler]:
    return [each for each in logging.getLogger().handlers if isinstance(each, LineHandler)]


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """Return what a call passed as `extra=`, and the ids of request and trace where they are."""
    extras = {
        key: clip(_hide(value), _MAX_VALUE) if isinstance(value, str) else value
        for key, value in vars(record).items()
        if key not in _FIELDS
    }
    if (context := current_request.get(None)) and context.id:
        extras.setdefault("request_id", context.id)
        if context.trace is not None:
            extras["trace_id"] = context.trace.id
    return extras


def _hide(text: str) -> str:
    """Redact the secrets in *text*, as they are and as `repr` writes them."""
    for secret in hidden.get():
        if len(secret) >= _SHORTEST_HIDDEN:
            text = text.replace(secret, "[hidden]").replace(repr(secret)[1:-1], "[hidden]")
    return text


def _bare(value: object) -> str:
    """Format a value after `key=`: in double quotes, unless it is one unambiguous word."""
    text = str(value)
    if _BARE.fullmatch(text) and text.isprintable():
        return text
    return _visible(json.dumps(text, ensure_ascii=False))


def _visible(text: str) -> str:
    """Escape control and invisible characters as JSON does.

    These are line breaks, terminal escape sequences, and marks that change the direction of
    writing.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
