"""What the verbs share: the application, its consoles, common options, and how options are read."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from chiasm import __version__

ORDER = (
    *("demo", "pull", "connect", "inspect", "data", "train", "report", "eval", "chat", "serve", "compare"),
    *("index", "search", "draw", "convert", "recipe"),
)
"""Of the verbs in the help: as a model comes about."""


class Ordered(TyperGroup):
    """Lists the verbs in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="chiasm",
    cls=Ordered,
    help="Give a language model eyes: connect, train, talk, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Look after training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Model = Annotated[str, typer.Argument(help="A model folder or hub id.", show_default=False)]
DATA = "LLaVA JSON, image folder, dataset, .tar shards, a YAML mixture of them, or emoji-scenes."
Data = Annotated[str, typer.Option("--data", help=DATA)]
Weights = Annotated[
    str,
    typer.Option(
        "--weights", help="float32 gives the model's own tokens; int8 and int4 are faster and take less memory."
    ),
]


def example(text: str) -> str:
    """The epilogue of a verb's help."""
    return f"Example: [bold]{text}[/bold]"


def emit(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def name_or_json(text: str, option: str) -> Any:
    return json_option(text, option) if text.lstrip().startswith("{") else text


def json_option(text: str | None, option: str) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text!r} is not a JSON object; write {{...}} with names and values")
    return value


def names_a_picture(path: Path) -> bool:
    from chiasm.data.containers import PICTURES

    return path.suffix.lower().removeprefix(".") in PICTURES


def require_picture_name(path: Path, option: str) -> None:
    """Refuses a file that no picture is written to, before anything is done for it."""
    from chiasm.data.containers import PICTURES

    if not names_a_picture(path):
        raise ValueError(f"{option} {str(path)!r} is no picture's name; it ends in .{', .'.join(PICTURES)}")


def require_folder(path: Path, option: str = "-o") -> None:
    """Refuses a file where a folder is written, before anything is done for it."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a file; name a folder")


def require_words(text: str, option: str, fix: str) -> None:
    """Refuses a text without words, or of bytes that are no letters, before a model is loaded for it."""
    from chiasm.data.rows import half_character

    if (fault := half_character(text)) is not None:
        raise ValueError(f"{option} {text!r} is no text: {fault}; type it in a terminal of UTF-8")
    if not text.strip():
        raise ValueError(f"{option} is {text!r}, expected words; {fix}")


def argument(path: str | Path) -> str:
    """A path as one would type it in a shell, for a line with markup."""
    return escape(shlex.quote(str(path)))


def one_line(error: BaseException | str) -> str:
    return escape(" ".join(str(error).split()))
