"""Read compose files as `docker compose config` does, as far as ours go, where no engine is.

Variables are replaced after the file is read, so a `$` in a comment is never looked at; files are
merged key by key, later ones win, lists grow, `!reset` takes a key away, and a list after
`!override` replaces the one below it. A service may extend one of another file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$)|\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_]\w*)|(?P<broken>))"
)
INSIDE = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:(?P<operator>:?[-?+])(?P<word>.*))?", re.DOTALL)
RESET = object()


class Override(list[Any]):
    """A list that replaces the one below it."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Safe YAML that knows the tags our files use."""


_Loader.add_constructor("!reset", lambda _loader, _node: RESET)
_Loader.add_constructor(
    "!override", lambda loader, node: Override(loader.construct_sequence(node, deep=True))
)


def load(paths: list[Path], environ: Mapping[str, str]) -> dict[str, Any]:
    """Merge the compose files at *paths*, with the variables of *environ* filled in."""
    merged: dict[str, Any] = {}
    for path in paths:
        document = _read(path, environ)
        for name, service in document.get("services", {}).items():
            document["services"][name] = _extended(service, path, environ)
        merged = _merge(merged, document)
    return merged


def _read(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = _fill_in(yaml.load(path.read_text(), Loader=_Loader), environ)
    return document


def _extended(service: Any, path: Path, environ: Mapping[str, str]) -> Any:
    """Merge *service*, of the file at *path*, over the one that it extends, if it extends one.

    Paths of the other file are relative to that file, so they are made absolute.
    """
    if not isinstance(service, dict) or "extends" not in service:
        return service
    wanted = service["extends"]
    other = (path.parent / wanted["file"]).resolve()
    base = _extended(_read(other, environ)["services"][wanted["service"]], other, environ)
    if "context" in base.get("build", {}):
        base["build"]["context"] = str((other.parent / base["build"]["context"]).resolve())
    return _merge(base, {key: value for key, value in service.items() if key != "extends"})


def environment(service: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what *service*'s container gets; a name alone is passed on where *environ* has it."""
    declared: dict[str, Any] = service.get("environment", {})
    given = {
        name: environ.get(name) if value is None else value for name, value in declared.items()
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Replace `$NAME`, `${NAME}`, `${NAME:-word}` (and -, :+, +, :?, ?) as Compose does.

    Raises:
        ValueError: a `$` begins nothing that Compose knows, or a variable that must be set is not.
    """
    return VARIABLE.sub(lambda match: _value_of(match, environ), text)


def _value_of(match: re.Match[str], environ: Mapping[str, str]) -> str:
    if match["escaped"]:
        return "$"
    inside = INSIDE.fullmatch(match["braced"] or match["bare"] or "")
    if inside is None:
        raise ValueError(f"a $ that begins no variable: {match.string!r}")
    name, operator, word = inside["name"], inside["operator"] or "", inside["word"] or ""
    value = environ.get(name)
    is_set = value is not None and (value != "" or not operator.startswith(":"))
    match operator[-1:]:
        case "-":
            return (value or "") if is_set else word
        case "+":
            return word if is_set else ""
        case "?" if not is_set:
            raise ValueError(f"{name} must be set: {word}")
        case _:
            return value or ""


def _fill_in(node: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(node, str):
        return interpolate(node, environ)
    if isinstance(node, list):
        return type(node)(_fill_in(item, environ) for item in node)
    if isinstance(node, dict):
        return {key: _fill_in(value, environ) for key, value in node.items()}
    return node


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        keys = [*below, *(key for key in above if key not in below)]
        return {
            key: _merge(below.get(key), above[key]) if key in above else below[key]
            for key in keys
            if above.get(key) is not RESET
        }
    if isinstance(below, list) and isinstance(above, list):
        return list(above) if isinstance(above, Override) else below + above
    return below if above is None and below is not None else above
