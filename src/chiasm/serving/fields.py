"""What the bodies of requests are made of: strict objects, numbers, and unions that are told apart."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MOST_FIELDS = 100
"""Of an object that has names of its own: more are not gone through one by one."""
MOST_BIASES = 1024
FIRST: Any = Field(fail_fast=True)
"""Of a list the first mistake is told: to collect a hundred thousand of them would take seconds."""


class Strict(BaseModel):
    """A field that is not known is refused, as OpenAI does; a number is no text, and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "more than {most} fields", {"most": MOST_FIELDS})
        return value


EMPTY: tuple[Any, ...] = (None, [], {}, False, 0, "auto", "none", "default")


def _unused(value: Any) -> None:
    """A field of OpenAI's that changes nothing here when it is empty, and is refused when it is not."""
    if value not in EMPTY:
        raise PydanticCustomError("unsupported_parameter", "not supported")


def _absent(value: Any) -> None:
    """A field of another kind of object: clients that send all of them send null."""
    if value is not None:
        raise PydanticCustomError("other_kind", "it belongs to another kind")


Unused = Annotated[None, BeforeValidator(_unused), WithJsonSchema({"enum": list(EMPTY)})]
Absent = Annotated[None, BeforeValidator(_absent)]
Ignored = Any
"""A field of OpenAI's that tells the service about the caller and does not change the answer."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=0, le=2**31), BeforeValidator(_whole)]
TopLogprobs = Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)]
Token = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]


def _some(value: Any) -> Any:
    """Not gone through where there are too many."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise PydanticCustomError("too_many_fields", "more than {most} tokens", {"most": MOST_BIASES})
    return value


TokenName = Annotated[str, Field(pattern="^[0-9]{1,7}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[TokenName, Bias], Field(max_length=MOST_BIASES), BeforeValidator(_some)]
"""Of tokens, by their ids."""


def by_shape(*tags: tuple[type, str]) -> Any:
    """A discriminator by the JSON type of a value."""

    def tag(value: Any) -> str | None:
        return next((name for kind, name in tags if isinstance(value, kind)), None)

    names = " or ".join(name.removeprefix("#") for _, name in tags)
    return Discriminator(tag, "invalid_type", f"expected {names}")


def by_kind(field: str, *kinds: str, hint: str = "") -> Any:
    """A discriminator by a field's value; an object without it is taken for the first kind, which says so."""

    def tag(value: Any) -> str | None:
        kind = value.get(field, kinds[0]) if isinstance(value, dict) else kinds[0]
        return f"#{kind}" if kind in kinds else None

    names = " or ".join(f"'{kind}'" for kind in kinds)
    return Discriminator(tag, f"{field}_unknown", f"expected {names}{hint}")
