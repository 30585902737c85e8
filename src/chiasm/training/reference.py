"""The recipe's keys, written down from the code that reads them: a JSON schema for editors, and docs/recipes.md."""

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from chiasm.training.schema import NESTED, OTHER_PARTS, PARTS, PartPlan, Recipe, Settings, Stage

TUNES = list(get_args(PartPlan.model_fields["tune"].annotation))

SECTIONS: list[tuple[str, str, type[BaseModel], type[BaseModel] | None]] = [
    ("Of the recipe", "At the top of the file only.", Recipe, Settings),
    ("Of a stage", "For each item of `stages`.", Stage, Settings),
    (
        "Of the recipe or a stage",
        "At the top they are for every stage that reads them; a stage that states one wins.",
        Settings,
        None,
    ),
    (
        "Of a part or pattern",
        f"For each entry of `parts` and `patterns`. The bare word of `tune` will do: `vision: {TUNES[0]}`.",
        PartPlan,
        None,
    ),
    *((f"Of `{name}`", "", model, None) for name, model in NESTED.items()),
]

INTRODUCTION = """\
# Every key of a recipe

A recipe is a YAML file with a list of `stages`. `chiasm train RECIPE` runs them in order; the same command goes on with
a run that was stopped, and passes over stages that are finished. `chiasm train RECIPE --model DIR --plan-only` shows
what would be trained. An unknown key or a wrong value is refused with file and line.

Any key can be changed on the command line: `--set batch_size=4` for every stage, `--set stages.align.lr=1e-3` for one,
`--set stages.align.parts.vision.tune=full` for a part. What to freeze, and what it costs: [training.md](training.md).

An editor that speaks JSON schema completes and checks recipes whose first line is
`# yaml-language-server: $schema=schema.json`, as in [recipes](../recipes); `chiasm recipe schema` prints the schema.

This page is written by `chiasm recipe docs` from the code that reads recipes.
"""


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file, with the short forms that files may use."""
    schema = Recipe.model_json_schema()
    plan = {"anyOf": [{"enum": TUNES}, {"$ref": "#/$defs/PartPlan"}]}
    stage = schema["$defs"]["Stage"]["properties"]
    stage["parts"] |= {"additionalProperties": plan, "propertyNames": {"enum": [*PARTS, OTHER_PARTS]}}
    stage["patterns"] |= {"additionalProperties": plan}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Chiasm recipe", **schema}


def schema_text() -> str:
    """The schema as the file recipes/schema.json holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def markdown() -> str:
    """The text of docs/recipes.md."""
    parts = [INTRODUCTION]
    for title, words, model, inherited in SECTIONS:
        known = inherited.model_fields if inherited is not None else {}
        fields = {name: field for name, field in model.model_fields.items() if name not in known}
        parts.append(f"\n## {title}\n\n{words}{chr(10) * 2 if words else ''}{key_table(fields)}")
    return "".join(parts)


def key_table(fields: Mapping[str, FieldInfo]) -> str:
    """A row for every key: its kind of value, its default, and what it is."""
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_cell(field)} |"
        for name, field in fields.items()
    ]
    return "| key | value | default | what it is |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, []):
        return "–"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _type(kind: Any) -> str:
    """An annotation in the words of a file."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is PartPlan:
        return "[plans](#of-a-part-or-pattern)"
    if isinstance(kind, type) and get_origin(kind) is None:
        if issubclass(kind, BaseModel):
            return "its own keys"
        return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}.get(kind, kind.__name__)
    arguments = [argument for argument in get_args(kind) if argument is not type(None)]
    if get_origin(kind) is list:
        return "list of " + ("[stages](#of-a-stage)" if arguments == [Stage] else _type(arguments[0]))
    if get_origin(kind) is dict:
        return f"names → {_type(arguments[-1])}" if arguments[-1] is not Any else "its own keys"
    if get_origin(kind) is tuple:
        return f"{len(arguments)} numbers"
    if hasattr(kind, "__metadata__"):
        return _type(arguments[0])
    return " or ".join(dict.fromkeys(_type(argument) for argument in arguments))
