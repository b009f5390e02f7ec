"""Write docs/settings.md from the settings class: its fields, defaults and docstrings.

    python tools/settings_page.py

The docstring under a field of `app.settings.Settings` is its reference text, so the page cannot say
anything else than the program does; a test compares the two.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from app.engine.quantization.formats import choices
from app.settings import Settings, variable

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

_HEAD = """\
# Settings

<!-- Written by tools/settings_page.py from app/settings.py; change it there. -->

Every setting is an environment variable. It is read once, at the start; a value that does not fit,
or a variable with the prefix `KLEIN_` that is none of these, ends the start with one sentence. An
empty value counts as not set. Commands take the settings that people change as options too, such as
`--port`, and those win; `--env-file` reads variables from a file ([docs/cli.md](cli.md)).
`KLEIN_URL` and `KLEIN_KEY_FILE` are no settings, but the clients' own.

`HF_TOKEN`, the hub's own variable, is used for downloads where it is set.

| variable | values | default | meaning |
|---|---|---|---|
"""

_KINDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    Path: "path",
}
_SIGNS = {"ge": "at least", "le": "at most", "gt": "above", "lt": "below"}


def page() -> str:
    """The whole page."""
    rows = (_row(name, field) for name, field in Settings.model_fields.items())
    return _HEAD + "".join(rows)


def _row(name: str, field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    assert text, f"{name} has no docstring"
    limits = ", ".join(_limits(field.metadata))
    kinds = _quote(choices()) if name == "precision" else _values(field.annotation)
    values = kinds + (f", {limits}" if limits else "")
    return f"| `{variable(name)}` | {values} | {_default(field.default)} | {text} |\n"


def _values(annotation: Any) -> str:
    """Say in words what *annotation* admits."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Literal:
        return _quote(inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_values(part) for part in inner if part is not types.NoneType)
    if origin is tuple:
        return "list, separated by commas"
    return _KINDS[annotation]


def _quote(values: typing.Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _limits(metadata: list[Any]) -> typing.Iterator[str]:
    for entry in metadata:
        for name, words in _SIGNS.items():
            if (bound := getattr(entry, name, None)) is not None:
                yield f"{words} {bound}"


def _default(value: object) -> str:
    if value in ((), None):
        return "none"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
