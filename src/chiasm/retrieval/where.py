"""Conditions on metadata: `colour=red`, `colour!=red`, `year>=2020`, `colour in red,blue`; all of them must hold."""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANGES: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
UNDERSTOOD = "key=value, key!=value, key>=number, key<=number, key>number, key<number or 'key in a,b'"
KEY = r"\s*([^\s=!<>](?:[^=!<>]*?[^\s=!<>])?)"
IN = re.compile(KEY + r"\s+in\s+([^\s=!<>].*?)\s*", re.DOTALL)
COMPARED = re.compile(KEY + r"\s*(!=|>=|<=|>|<|=)(?!=)\s*(.*?)\s*", re.DOTALL)
PART = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]*?)\s*,', re.DOTALL)


@dataclass(frozen=True)
class Where:
    """One condition. A value that is a list holds if one of its elements does; only `!=` holds where there is none."""

    key: str
    operator: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Raises ValueError for a text that is no condition."""
        if (found := IN.fullmatch(text)) is not None:
            return cls(found[1], "in", tuple(PART.findall(found[2] + ",")))
        if (found := COMPARED.fullmatch(text)) is None:
            raise ValueError(f"condition {text!r} is not understood, expected {UNDERSTOOD}")
        key, sign, value = found.groups()
        if sign in RANGES and _number(_value(value)) is None:
            raise ValueError(f"condition {text!r} compares with {value!r}, expected a number after {sign}")
        return cls(key, sign, (value,))

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item with this metadata is meant."""
        if self.operator in RANGES:
            limit = float(self.values[0])
            return any(RANGES[self.operator](number, limit) for number in self._numbers(metadata))
        same = any(_equal(one, text) for one in self._found(metadata) for text in self.values)
        return not same if self.operator == "!=" else same

    def reads(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item with this metadata has what is compared: the key, or a number under it."""
        return bool(self._numbers(metadata)) if self.operator in RANGES else self.key in metadata

    def _found(self, metadata: Mapping[str, Any]) -> list[Any]:
        value = metadata.get(self.key)
        return value if isinstance(value, list) else [] if value is None else [value]

    def _numbers(self, metadata: Mapping[str, Any]) -> list[float]:
        return [number for one in self._found(metadata) if (number := _number(one)) is not None]

    def meanings(self) -> list[Any]:
        """The values that a text can stand for: `5` is a number and a text, `true` a truth value and a text, and what
        stands in quotes a text without them."""
        return [meaning for text in self.values for meaning in dict.fromkeys([_value(text), text])]


def conditions(where: str | Where | Sequence[str | Where] | None) -> list[Where]:
    """One condition or several, as texts or parsed."""
    given = [] if where is None else [where] if isinstance(where, str | Where) else where
    return [one if isinstance(one, Where) else Where.parse(one) for one in given]


def _value(text: str) -> Any:
    """A number, a truth value, or the text itself, without quotes around it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _equal(value: Any, text: str) -> bool:
    meant = _value(text)
    return value == text or (value == meant and isinstance(value, bool) == isinstance(meant, bool))
