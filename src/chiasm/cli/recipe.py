"""`recipe schema`, `recipe docs` and `recipe plan`: the keys of a recipe, and of a plan, for editors and for people."""

import sys

import typer

from chiasm.cli.app import app, example

recipe_app = typer.Typer(help="What a recipe may say.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")


@recipe_app.command("schema", epilog=example("chiasm recipe schema > recipes/schema.json"))
def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    from chiasm.training.reference import schema_text

    sys.stdout.write(schema_text())


@recipe_app.command("docs", epilog=example("chiasm recipe docs > docs/recipes.md"))
def docs() -> None:
    """Print every key of a recipe with its meaning, as Markdown."""
    from chiasm.training.reference import markdown

    sys.stdout.write(markdown())


@recipe_app.command("plan", epilog=example("chiasm recipe plan > docs/plan.md"))
def plan() -> None:
    """Print every key of a comparison's plan with its meaning, as Markdown."""
    from chiasm.comparison.reference import markdown

    sys.stdout.write(markdown())
