"""Validation by tables of fields: one reader for JSON and forms, and one OpenAPI schema.

Not pydantic, because its errors do not carry OpenAI's codes and a form's values are all text. A
table validates its values in the order of its fields, then looks for unknown names, so the same
mistake gives the same error on every route. `null` means absent everywhere, as does an empty text
in a form.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from app.api.schema.json_scanner import LongText
from app.errors import InvalidRequest
from app.limits import check_characters

MAX_TEXT = 1_000
"""Characters of a text for which its field sets no other limit."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_MAX_NAME = 64
_MAX_DIGITS = 100
"""Characters of a number in a form; the pattern takes quadratic time."""

# JSON Schema of values that mean absent, and so are valid for any name.
ABSENT = {"type": "null"}
ABSENT_IN_FORM = {"const": ""}


class Type(Enum):
    """The types of a value; each member's value is JSON Schema's type."""

    TEXT = "string"
    WHOLE = "integer"
    NUMBER = "number"
    FLAG = "boolean"
    LIST = "array"
    OBJECT = "object"
    ANY = "any"
    """Of a field whose every value is refused."""


_ARTICLES = {
    Type.TEXT: "a string",
    Type.WHOLE: "an integer",
    Type.NUMBER: "a number",
    Type.FLAG: "true or false",
    Type.LIST: "a list",
    Type.OBJECT: "an object",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request: name, type, limits and description."""

    name: str
    type: Type
    about: str
    choices: tuple[str, ...] = ()
    minimum: float = -math.inf
    maximum: float = math.inf
    max_length: int | None = MAX_TEXT
    """Of a text, in characters; an image has none here, since it is checked when it is decoded."""
    default: object = None
    example: object = None
    refusal: str | None = None
    """For an unsupported field: why any value is refused."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Texts that are valid for the API but not supported here, each with the error's sentence."""
    veto: Callable[[Any], None] | None = None
    """For a field whose unsupported values follow a rule: raises the error of one."""
    json_only: bool = False
    parse: Callable[[str], object] | None = None
    """For a field that is more than one value: reads what a form sends as one text."""
    schema: Mapping[str, Any] | None = None
    """The JSON Schema, where it is more than type and limits."""

    def read(self, value: object, *, is_form: bool) -> Any:
        """Validate *value* and convert it to its type.

        Raises:
            InvalidRequest: it is not valid; `param` is the field's name.
        """
        if self.refusal is not None:
            raise InvalidRequest(self.refusal, param=self.name, code="unsupported_parameter")
        typed = self._convert(self._parse(value) if is_form else value)
        if self.choices and typed not in self.choices:
            raise InvalidRequest(
                f"{self.name} must be one of {', '.join(self.choices)}.", param=self.name
            )
        if isinstance(typed, str | LongText):
            typed = self._check_text(typed)
        elif self.type in {Type.WHOLE, Type.NUMBER}:
            self._check_range(typed)
        if self.veto is not None:
            self.veto(typed)
        return typed

    def describe(self) -> dict[str, Any]:
        """Return the field's JSON Schema, with null, which means absent."""
        if self.schema is not None:
            return {"description": self.about, **self.schema}
        schema = {
            "description": self.about,
            "type": [self.type.value, "null"] if self.refusal is None else "null",
            "enum": [*self.choices, None] if self.choices else None,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "maxLength": None if self.choices or self.type is not Type.TEXT else self.max_length,
            "default": self.default,
            "examples": None if self.example is None else [self.example],
        }
        unset = (None, -math.inf, math.inf)
        return {key: value for key, value in schema.items() if value not in unset}

    def _parse(self, value: object) -> object:
        """Turn a form's text into the value that JSON has for it, or return it as it is."""
        if not isinstance(value, str) or self.type is Type.TEXT:
            return value
        if self.parse is not None:
            return self.parse(value)
        text = value.strip() if len(value) <= _MAX_DIGITS else ""
        if self.type is Type.WHOLE and _WHOLE.fullmatch(text):
            return int(text)
        if self.type is Type.NUMBER and _NUMBER.fullmatch(text):
            return float(text)
        return _FLAGS.get(text.lower(), text) if self.type is Type.FLAG else text

    def _convert(self, value: Any) -> object:
        matches = {
            Type.TEXT: isinstance(value, str | LongText),
            Type.WHOLE: _is_whole(value),
            Type.NUMBER: _is_number(value),
            Type.FLAG: isinstance(value, bool),
            Type.LIST: isinstance(value, list),
            Type.OBJECT: isinstance(value, dict),
        }
        if not matches[self.type]:
            raise InvalidRequest(
                f"{self.name} must be {_ARTICLES[self.type]}.", param=self.name, code="invalid_type"
            )
        return int(value) if self.type is Type.WHOLE else value

    def _check_text(self, text: str | LongText) -> str | LongText:
        most = self.max_length
        # A `LongText` may count both halves of a surrogate pair; only decoding it counts right.
        if isinstance(text, LongText) and most is not None and text.length <= 2 * most:
            text = text.text()
        length = text.length if isinstance(text, LongText) else len(text)
        if most is not None and length > most:
            raise InvalidRequest(
                f"{self.name} has {length:,} characters; the most is {most:,}.",
                param=self.name,
                code="string_above_max_length",
            )
        if isinstance(text, str):
            check_characters(text, self.name)
            if text in self.unsupported:
                raise InvalidRequest(
                    self.unsupported[text], param=self.name, code="unsupported_value"
                )
        return text

    def _check_range(self, number: Any) -> None:
        # Compared, not converted: an integer may be larger than any float.
        if not self.minimum <= number <= self.maximum or abs(number) > sys.float_info.max:
            raise InvalidRequest(
                f"{self.name} must lie between {self.minimum:g} and {self.maximum:.16g}.",
                param=self.name,
            )


@dataclass(frozen=True, slots=True)
class FieldTable:
    """The fields of one kind of request, in the order in which they are checked."""

    fields: tuple[Field, ...]
    is_strict: bool = True
    """Whether an unknown name is refused."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Advice by the pattern of unknown names that are easily taken for known ones."""

    def find(self, name: str, *, is_form: bool = False) -> Field | None:
        """Return the field *name*; None where it is unknown."""
        return next((each for each in self._fields(is_form=is_form) if each.name == name), None)

    def read(self, values: Mapping[str, object], *, is_form: bool = False) -> dict[str, Any]:
        """Validate *values* and return those that are present, converted to their types.

        Raises:
            InvalidRequest: a value is not valid, or a name is unknown and refused.
        """
        present = {
            name: value
            for name, value in values.items()
            if value is not None and not (is_form and value == "")
        }
        fields = self._fields(is_form=is_form)
        typed = {
            each.name: each.read(present[each.name], is_form=is_form)
            for each in fields
            if each.name in present
        }
        unknown = set(present) - {each.name for each in fields}
        if self.is_strict and unknown:
            name = shorten(min(unknown))
            raise InvalidRequest(
                f"{name} is not a field of this request; {self._advice(name)}.",
                param=name,
                code="unknown_parameter",
            )
        return typed

    def describe(self, *, required: Iterable[str], is_form: bool = False) -> dict[str, Any]:
        """Return the table's JSON Schema."""
        absent = ABSENT_IN_FORM if is_form else ABSENT
        return {
            "type": "object",
            "required": list(required),
            "properties": {each.name: each.describe() for each in self._fields(is_form=is_form)},
            "additionalProperties": absent if self.is_strict else True,
        }

    def _fields(self, *, is_form: bool) -> list[Field]:
        return [each for each in self.fields if not (is_form and each.json_only)]

    def _advice(self, name: str) -> str:
        found = (hint for pattern, hint in self.hints.items() if re.fullmatch(pattern, name))
        return next(found, "leave it out, or see /docs for the fields there are")


def shorten(name: str) -> str:
    """Make a caller's name fit for a message: short, printable, whole characters."""
    clean = "".join(each if each.isprintable() else "?" for each in name[:_MAX_NAME])
    return clean if len(name) <= _MAX_NAME else f"{clean}..."


def _is_whole(value: object) -> bool:
    """Whether it is an integer; one of a thousand digits is, though no float can hold it."""
    return value.is_integer() if isinstance(value, float) else _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
