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


@dataclass(frozen=True)
class Where:
    """One condition. A value that is a list holds if one of its elements does; only `!=` holds where there is none."""

    key: str
    operator: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Raises ValueError for a text that is no condition."""
        found = re.fullmatch(r"\s*([^\s=!<>]+)\s*(!=|>=|<=|>|<|=)(?!=)\s*(.*?)\s*", text, re.DOTALL)
        if found is None:
            found = re.fullmatch(r"\s*([^\s=!<>]+)\s+(in)\s+(\S.*?)\s*", text, re.DOTALL)
        if found is None:
            raise ValueError(f"condition {text!r} is not understood, expected {UNDERSTOOD}")
        key, sign, value = found.groups()
        values = tuple(part.strip() for part in value.split(",")) if sign == "in" else (value,)
        if sign in RANGES and _number(_value(value)) is None:
            raise ValueError(f"condition {text!r} compares with {value!r}, expected a number after {sign}")
        return cls(key, sign, values)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item with this metadata is meant."""
        value = metadata.get(self.key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if self.operator in RANGES:
            limit = float(self.values[0])
            numbers = [number for one in found if (number := _number(one)) is not None]
            return any(RANGES[self.operator](number, limit) for number in numbers)
        same = any(_equal(one, text) for one in found for text in self.values)
        return not same if self.operator == "!=" else same

    def meanings(self) -> list[Any]:
        """The values that a text can stand for: `5` is a number and a text, `true` a truth value and a text."""
        return [meaning for text in self.values for meaning in dict.fromkeys([_value(text), text])]


def conditions(where: str | Where | Sequence[str | Where] | None) -> list[Where]:
    """One condition or several, as texts or parsed."""
    given = [] if where is None else [where] if isinstance(where, str | Where) else where
    return [one if isinstance(one, Where) else Where.parse(one) for one in given]


def _value(text: str) -> Any:
    """A number, a truth value, or the text itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _equal(value: Any, text: str) -> bool:
    meant = _value(text)
    return value == text or (value == meant and isinstance(value, bool) == isinstance(meant, bool))
