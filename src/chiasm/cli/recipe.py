"""`recipe schema` and `recipe docs`: the keys of a recipe for editors and for people."""

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
