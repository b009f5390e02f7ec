"""The field `loras`: which adapters a request names, and how it is read from JSON and from forms.

In JSON it is a list of objects with a name and perhaps a scale. A form sends the same as pairs of
parts, `loras[][name]` and `loras[][scale]`, as one text of JSON, or as `a:0.8,b:0.5`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.api.errors import own_names
from app.api.schema.table import Field, Type, shorten
from app.domain import Lora
from app.errors import InvalidRequest
from app.limits import MAX_LORA_SCALE, MAX_LORAS, Limits
from app.service.adapters import Adapters, UnknownAdapter
from app.service.results import write_loras

NAME = "loras"
_PART = re.compile(r"loras\[([0-9]{0,3})\]\[(name|scale)\]")
_NUMBER = re.compile(r"[+-]?([0-9]{1,9}\.?[0-9]{0,18}|\.[0-9]{1,18})")
_LARGE = 1e9
_MAX_TEXT = 2_000
_FORM = "a list of objects with name and scale"


def loras_field() -> Field:
    """Return the field."""
    return Field(
        NAME,
        Type.LIST,
        "Adapters (LoRA) to make the picture with, instead of those that the service uses by "
        "default; an empty list is none. `GET /v1/loras` lists their names. In a form also "
        "`loras[][name]` and `loras[][scale]`, or one text such as `a:0.8,b:0.5`.",
        parse=_parse,
        schema={
            "type": ["array", "null"],
            "maxItems": MAX_LORAS,
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "scale": {
                        "type": ["number", "null"],
                        "minimum": -MAX_LORA_SCALE,
                        "maximum": MAX_LORA_SCALE,
                        "default": 1,
                    },
                },
                "additionalProperties": False,
            },
        },
    )


class Parts:
    """The adapters of a form's parts, in their order.

    Parts with the same index are one adapter. Without indexes the first scale is the first name's,
    and so on, since clients send them in pairs or, as OpenAI's package does, all names and then all
    scales.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, object]] = {}
        self._order = ""
        """The first letter of each part without an index: of `name` or of `scale`."""

    def take(self, name: str, text: str) -> None:
        """Take a part, of which `is_part` has approved.

        Raises:
            InvalidRequest: there are too many adapters, or one has two names or scales.
        """
        index, word = _PART.findall(name)[0]
        if not index:
            index = f"[{self._order.count(word[0])}]"
            self._order += word[0]
        entry = self._entries.setdefault(index, {})
        if len(self._entries) > MAX_LORAS:
            raise _too_many(len(self._entries))
        value: object = text
        if word == "scale":
            value = _number_or(text) if text else None
        if entry.setdefault(word, value) != value:
            raise InvalidRequest(
                f"{name} is there more than once, with different values; send it once.", param=NAME
            )

    def add_to(self, texts: dict[str, object]) -> None:
        """Put them among a form's fields, where there are any.

        Raises:
            InvalidRequest: the form names adapters in another way, too, or a scale may be of either
                of two names.
        """
        names, scales = self._order.count("n"), self._order.count("s")
        if scales < names and "nns" in self._order:
            raise InvalidRequest(
                "loras has fewer scales than names; send a scale for each, or number them, as in "
                "loras[0][name].",
                param=NAME,
            )
        found = list(self._entries.values())
        if found and texts.setdefault(NAME, found) is not found:
            raise InvalidRequest(
                "loras is there as parts and as one text; send only one of the two.", param=NAME
            )


def is_part(name: str) -> bool:
    """Return whether *name* is of a form's part with an adapter's name or scale."""
    return _PART.fullmatch(name) is not None


def read_loras(
    values: Mapping[str, Any], adapters: Adapters, limits: Limits, *, chosen: str = ""
) -> tuple[Lora, ...]:
    """Return the adapters that a request's typed *values* name, or those that are used by default.

    *chosen* is the adapter that the request names as its model.

    Raises:
        InvalidRequest: one is not listed, or they break a rule.
    """
    sent = values.get(NAME)
    if chosen and sent:
        raise InvalidRequest(
            "loras cannot be sent beside an adapter as the model; send the adapter in loras too.",
            param=NAME,
        )
    if chosen:
        found = (adapters.use(chosen, 1.0),)
        with own_names({NAME: "model"}):
            limits.check_loras(found)
        return found
    if sent is None:
        return adapters.default
    if len(sent) > MAX_LORAS:
        raise _too_many(len(sent))
    pairs = [_read_entry(each, f"{NAME}[{index}]") for index, each in enumerate(sent)]
    return use_all(pairs, adapters, limits)


def use_all(
    pairs: Sequence[tuple[str, float]], adapters: Adapters, limits: Limits
) -> tuple[Lora, ...]:
    """Return the adapters of names and scales.

    Raises:
        InvalidRequest: one is not listed, or they break a rule.
    """
    found = []
    for index, (name, scale) in enumerate(pairs):
        try:
            found.append(adapters.use(name, scale))
        except UnknownAdapter:
            word = shorten(name)
            near = say_near(name, adapters) or "; GET /v1/loras lists those there are"
            raise InvalidRequest(
                f"There is no adapter `{word}`{near}.",
                param=f"{NAME}[{index}].name",
                code="model_not_found",
                word=word,
            ) from None
    limits.check_loras(found)
    return tuple(found)


def say_near(name: str, adapters: Adapters) -> str:
    """Say which adapters have names like *name*; nothing where none has."""
    near = ", ".join(f"`{each}`" for each in adapters.near(name))
    return f"; names like it are {near}" if near else ""


def headers(loras: Iterable[Lora]) -> dict[str, str]:
    """Return the header of an answer that says which adapters took part, where any did."""
    return {"X-Klein-Loras": written} if (written := write_loras(loras)) else {}


def _too_many(count: int) -> InvalidRequest:
    return InvalidRequest(
        f"loras holds {count} adapters; the most is {MAX_LORAS}.",
        param=NAME,
        code="array_above_max_length",
    )


def _parse(text: str) -> object:
    """Read a form's one text: JSON, or names with scales."""
    if len(text) > _MAX_TEXT:
        raise InvalidRequest(
            f"loras has {len(text):,} characters; the most is {_MAX_TEXT:,}.",
            param=NAME,
            code="string_above_max_length",
        )
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidRequest(
                f"loras is no valid JSON; send {_FORM}, or a text such as a:0.8,b:0.5.", param=NAME
            ) from None
    entries: list[dict[str, object]] = []
    for each in text.split(","):
        name, colon, scale = each.strip().partition(":")
        scales = {"scale": _number_or(scale.strip())} if colon else {}
        entries.append({"name": name.strip(), **scales})
    return entries


def _read_entry(entry: object, param: str) -> tuple[str, float]:
    if not isinstance(entry, dict):
        raise InvalidRequest(
            f"{param} must be an object with name and scale.", param=param, code="invalid_type"
        )
    present = {key: value for key, value in entry.items() if value is not None}
    name = present.pop("name", None)
    scale = _typed(present.pop("scale", 1.0))
    if not isinstance(name, str) or not name:
        raise InvalidRequest(
            f"{param}.name must be the name of an adapter.",
            param=f"{param}.name",
            code="invalid_type" if name else "missing_required_parameter",
        )
    if present:
        raise InvalidRequest(
            f"{param} must have name and scale and nothing else.",
            param=param,
            code="unknown_parameter",
        )
    if scale is None or not abs(scale) <= MAX_LORA_SCALE:
        raise InvalidRequest(
            f"{param}.scale must be a number between -{MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}.",
            param=f"{param}.scale",
            code="invalid_type" if scale is None else None,
        )
    return name, scale


def read_number(text: str) -> float | None:
    """Return the scale that a text holds; None where it is no number."""
    return float(text) if _NUMBER.fullmatch(text) else None


def _number_or(text: str) -> float | str:
    """Return the number that a form's text holds, or the text, which is refused as a scale."""
    number = read_number(text)
    return text if number is None else number


def _typed(value: object) -> float | None:
    """Return a scale; None where it is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # Compared, not converted: an integer may be larger than any float.
    return float(value) if abs(value) <= _LARGE else math.inf
