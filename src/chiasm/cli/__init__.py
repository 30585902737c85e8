"""The verbs of the command line. Exit code 0; 2 for the user's mistake, with one clear line; 1 for a fault."""

import io
import os
import sys
import warnings
from typing import Any

import typer

from chiasm.cli import chat, compare, connect, convert, draw, evaluate, recipe, retrieval, serve, train
from chiasm.cli.app import app, data_app, err, one_line

__all__ = [
    "app",
    "chat",
    "compare",
    "connect",
    "convert",
    "data_app",
    "draw",
    "evaluate",
    "main",
    "recipe",
    "retrieval",
    "serve",
    "train",
]

FAULTS = ("TrainingError", "EngineBroken")
"""Faults that say in one line what happened; any other one shows its traceback."""


def main() -> None:
    """Runs a verb and turns exceptions into exit codes."""
    from chiasm.sources import SourceError

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # as the standard error is: a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")  # is an error of ours
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _say_misuse(error)
            sys.exit(2)
        known = isinstance(error, ValueError | OSError | SourceError)
        if not known and type(error).__name__ not in FAULTS:
            raise
        named = isinstance(error, OSError) and error.filename and error.strerror
        said = f"{error.filename}: {error.strerror}" if named else error  # type: ignore[attr-defined]
        err.print(f"[red]error:[/red] {one_line(said)}", soft_wrap=True, highlight=False)
        sys.exit(2 if known else 1)


def _say_misuse(error: Any) -> None:
    """Of a line that is no command: the help where no verb was given, else one line."""
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    said = one_line(error.format_message()).rstrip(".")
    err.print(f"[red]error:[/red] {said} (see {context.command_path} --help)", soft_wrap=True, highlight=False)
