"""A conversation about pictures in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chiasm.data.chat import user_message
from chiasm.vlm import VLM

HELP = "/image PATH adds a picture to the next question, /new starts over, /quit leaves"


def converse(vlm: VLM, images: list[Path], options: dict[str, Any], console: Console) -> None:
    """Questions and streamed answers until the end of input; earlier turns stay in the prompt.

    Args:
        options: of `VLM.stream`: decoding, and solved examples that every prompt starts with.
    """
    console.print(f"[dim]{HELP}[/dim]")
    history: list[dict[str, Any]] = []
    shown: list[Path] = []
    waiting = list(images)
    while True:
        try:
            line = console.input("[bold cyan]>[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            history, shown, waiting = [], [], []
        elif command == "/image":
            path = Path(rest.strip()).expanduser()
            if path.is_file():
                waiting.append(path)
            else:
                console.print(f"[red]no such picture:[/red] {escape(str(path))}", soft_wrap=True)
        elif command.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            pictures = [*shown, *waiting]
            try:
                answer = _answer(vlm, pictures, line, history, options, console)
            except (ValueError, OSError) as error:
                console.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
                waiting = []
                continue
            history += [*user_message(line, len(waiting)), {"role": "assistant", "content": answer}]
            shown, waiting = pictures, []


def _answer(
    vlm: VLM, pictures: list[Path], line: str, history: list[dict[str, Any]], options: dict[str, Any], console: Console
) -> str:
    pieces = []
    for piece in vlm.stream(pictures, line, history=history, **options):
        pieces.append(piece)
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return "".join(pieces).strip()
