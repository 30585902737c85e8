"""Plans of comparisons from YAML files and dictionaries; an error is one line with file, line and key."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from chiasm.comparison.schema import Axes, Base, Budget, CellSpec, Claim, Data, Evaluation, Plan, Training
from chiasm.training.recipe import find_recipe
from chiasm.training.schema import PartPlan
from chiasm.training.yaml_lines import Keys, Origins, RecipeError, dotted, origin_of, read_yaml, reason_of

EXPECTED = "a plan is a mapping with the keys data, budget and grid"

SECTIONS: dict[str, type[BaseModel]] = {
    "base": Base,
    "data": Data,
    "budget": Budget,
    "grid": Axes,
    "cells": CellSpec,
    "training": Training,
    "evaluation": Evaluation,
    "strategies": PartPlan,
    "claims": Claim,
}
"""A key of a plan → what its keys are read by."""


def load_plan(source: str | Path | dict[str, Any] | Plan) -> Plan:
    """A plan from a YAML file, the name of one that comes with Chiasm (`compare`), or a dictionary.

    Raises:
        RecipeError: one line with file, line, key and what is wrong.
    """
    if isinstance(source, Plan):
        return source
    if isinstance(source, dict):
        return _validate(deepcopy(source), {}, "plan")
    path = find_recipe(source)
    return _validate(*read_yaml(path, EXPECTED), str(path))


def _validate(raw: dict[str, Any], origins: Origins, name: str) -> Plan:
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
        at = tuple(part for part in first["loc"] if part not in ("str", "dict[str,any]", "int", "float"))
        where, key = origin_of(at, origins, name), f"{dotted(at)}: " if at else ""
        raise RecipeError(f"{where}: {key}{reason_of(first, at, _keys_at)}") from None


def _keys_at(at: Keys) -> list[str]:
    return list((SECTIONS[str(at[0])] if at else Plan).model_fields)
