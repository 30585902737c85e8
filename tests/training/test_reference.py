"""The schema and the page of a recipe's keys are current, and every recipe that ships is what they say."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from chiasm.training.recipe import load_recipe
from chiasm.training.reference import SECTIONS, json_schema, markdown, schema_text
from chiasm.training.schema import PartPlan, Recipe

ROOT = Path(__file__).parents[2]
PLANS = ("compare",)
"""Beside the recipes, and read by `chiasm compare`."""
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in PLANS)


class Yaml12(yaml.SafeLoader):
    """Reads 1e-4 as a number, as editors do."""


Yaml12.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Yaml12)


def test_the_committed_schema_is_current() -> None:
    assert (ROOT / "recipes" / "schema.json").read_text(encoding="utf-8") == schema_text(), "chiasm recipe schema"


def test_the_committed_page_is_current() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == markdown(), "chiasm recipe docs"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_fits_the_schema_and_loads(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.validate(read(path), json_schema())
    assert load_recipe(path.stem).stages


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_sise", 3), ("batch_size", 0), ("logs", ["tensorbored"]), ("forgetting", {"image": 3})],
)
def test_the_schema_refuses_what_the_code_refuses(key: str, value: Any) -> None:
    raw = {**read(RECIPES[0]), key: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, json_schema())
    with pytest.raises(ValueError, match="recipe: "):
        load_recipe(raw)


@pytest.mark.parametrize("parts", [{"vison": "frozen"}, {"vision": "frozn"}, {"vision": {"tune": "full", "rnk": 1}}])
def test_the_schema_knows_parts(parts: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"stages": [{"name": "a", "parts": parts}]}, json_schema())


def test_every_key_is_described() -> None:
    models: list[type[BaseModel]] = [model for _, _, model, _ in SECTIONS]
    assert Recipe in models and PartPlan in models
    for model in models:
        silent = [name for name, field in model.model_fields.items() if not field.description]
        assert not silent, f"{model.__name__} does not say what {', '.join(silent)} are"
