"""Recipes from YAML files, dictionaries and the command line; an error is one line with file, line and key."""

import difflib
import json
from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from chiasm.training.schema import (
    ADAPTERS,
    EXACT_LENGTHS,
    LENGTHS,
    LORA_KEYS,
    NESTED,
    PartPlan,
    Recipe,
    Settings,
    Stage,
)
from chiasm.training.yaml_lines import Keys, Origins, RecipeError, dotted, origin_of, read_yaml, reason_of

__all__ = ["Recipe", "RecipeError", "apply_overrides", "find_recipe", "load_recipe", "to_yaml"]

REPLACED = [["lr"], *([key] for key in LENGTHS)]
"""Settings of a stage that an override also removes where they stand in another place or under another name."""

EXPECTED = "a recipe is a mapping with the key 'stages'"


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, the name of one that comes with Chiasm (`llava`), or a dictionary.

    Args:
        overrides: `key=value` with a dotted key: `batch_size=8` is for every stage, `stages.align.lr=1e-3` for all
            that one tunes, `stages.align.parts.connector.lr=1e-3` for one part. `lr=1e-3` comes before the others.
    """
    if isinstance(source, Recipe):
        return apply_overrides(source, overrides)
    if isinstance(source, dict):
        return _validate(*_override(deepcopy(source), {}, overrides), "recipe")
    path = find_recipe(source)
    return _validate(*_override(*read_yaml(path, EXPECTED), overrides), str(path))


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides."""
    if not overrides:
        return recipe
    raw = deepcopy(recipe._written) or recipe.model_dump(mode="json", exclude_unset=True)
    return _validate(*_override(raw, {}, overrides), "recipe")


def find_recipe(source: str | Path) -> Path:
    """The file itself, or the one of that name among Chiasm's own recipes."""
    path = Path(source)
    if path.is_file():
        return path
    for folder in _folders():
        if (own := folder / f"{source}.yaml").is_file():
            return own
    files = [file.relative_to(folder) for folder in _folders() if folder.is_dir() for file in folder.rglob("*.yaml")]
    known = sorted(file.with_suffix("").as_posix() for file in files)
    close = difflib.get_close_matches(str(source), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise RecipeError(f"recipe {str(source)!r} is neither a file nor one of Chiasm's own; {hint}")


def recipes_in(source: str | Path) -> list[Path]:
    """The files of a folder, or of one of Chiasm's own folders of recipes (`claims`); none where one has its name."""
    if any((folder / f"{source}.yaml").is_file() for folder in _folders()):
        return []
    folders = [*(folder / source for folder in _folders()), Path(source)]
    return next((found for folder in folders if (found := sorted(folder.glob("*.yaml")))), [])


def _folders() -> list[Path]:
    package = Path(__file__).parents[1]
    return [package / "recipes", package.parents[1] / "recipes"]


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting spelled out, as a file that `load_recipe` reads."""
    raw = json.loads(recipe.model_dump_json(exclude_none=True))
    stages = [{"name": stage["name"], **stage} for stage in raw["stages"]]
    for stage in stages:
        for key in ("parts", "patterns"):
            stage[key] = {name: _without_defaults(plan) for name, plan in stage[key].items()}
    shared = {key: raw[key] for key in ("forgetting", "logs")}
    return yaml.safe_dump({**shared, "stages": stages}, sort_keys=False, allow_unicode=True)


def _without_defaults(plan: dict[str, Any]) -> Any:
    if plan["tune"] == "frozen":
        return "frozen"
    return {key: value for key, value in plan.items() if plan["tune"] in ADAPTERS or key not in LORA_KEYS}


def _override(raw: dict[str, Any], origins: Origins, overrides: Sequence[str]) -> tuple[dict[str, Any], Origins]:
    for text in sorted(overrides, key=lambda text: not text.startswith("lr=")):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {text!r}: expected key=value, such as stages.align.batch_size=8")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: {value!r} is not a YAML value") from error
        _set(raw, key.split("."), parsed, text, origins)
    return raw, origins


def _set(raw: dict[str, Any], keys: list[str], value: Any, text: str, origins: Origins) -> None:
    stages: list[Any] = raw["stages"] if isinstance(raw.get("stages"), list) else []
    if keys[0] in Settings.model_fields:
        for stage in stages:
            _drop(stage, keys)
    target: Any = raw
    at: Keys = ()
    if keys[0] == "stages" and len(keys) > 2:
        names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
        if keys[1] not in names:
            known = ", ".join(str(name) for name in names if name is not None)
            raise RecipeError(f"override {text!r}: no stage is named {keys[1]!r}; there are {known}")
        at = ("stages", names.index(keys[1]))
        target, keys = stages[at[1]], keys[2:]
    if keys in REPLACED:
        _drop(target, keys)
    for key in keys[:-1]:
        at = (*at, key)
        if isinstance(target.get(key), str):
            target[key] = {"tune": target[key]}
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise RecipeError(f"override {text!r}: {dotted(at)} has no keys")
    target[keys[-1]] = value
    origins[(*at, keys[-1])] = f"override {text!r}"


def _drop(target: Any, keys: list[str]) -> None:
    """Removes a setting that an override replaces; a stage has only one length, and `min_steps` is part of it. A
    learning rate is replaced where parts and patterns state their own too. What is no mapping is refused later."""
    if not isinstance(target, dict):
        return
    if keys == ["lr"]:
        plans = [target[key].values() for key in ("parts", "patterns") if isinstance(target.get(key), dict)]
        for plan in chain.from_iterable(plans):
            if isinstance(plan, dict):
                plan.pop("lr", None)
    if len(keys) == 1:
        for key in LENGTHS if keys[0] in LENGTHS else (keys[0],):
            target.pop(key, None)
        if keys[0] in EXACT_LENGTHS:
            target.pop("min_steps", None)
    elif isinstance(target.get(keys[0]), dict):
        target[keys[0]].pop(keys[1], None)


def _validate(raw: dict[str, Any], origins: Origins, name: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(raw)
        recipe._written = raw
        return recipe
    except ValidationError as error:
        raise RecipeError(_first_line(error, raw, origins, name)) from None


def _first_line(error: ValidationError, raw: dict[str, Any], origins: Origins, name: str) -> str:
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    at = first["loc"]
    shown = at[:-1] if at and at[-1] in ("literal['all-linear']", "list[str]", "int", "str", "bool") else at
    where = origin_of(shown, origins, name)
    if where == name and shown[:1] == ("stages",):
        where = origin_of(shown[2:], origins, name)
    key = dotted(_with_names(shown, raw))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {f'{key}: ' if key else ''}{reason_of(first, at, _keys_at)}{more}"


def _keys_at(at: Keys) -> list[str]:
    if at and at[-1] in NESTED:
        return list(NESTED[str(at[-1])].model_fields)
    if len(at) > 1 and at[-2] in ("parts", "patterns"):
        return list(PartPlan.model_fields)
    return list((Stage if at[:1] == ("stages",) else Recipe).model_fields)


def _with_names(at: Keys, raw: dict[str, Any]) -> Keys:
    """A stage's index replaced by its name, as overrides write it."""
    if len(at) > 1 and at[0] == "stages" and isinstance(at[1], int):
        stage = raw["stages"][at[1]]
        if isinstance(stage, dict) and isinstance(stage.get("name"), str):
            return ("stages", stage["name"], *at[2:])
    return at
