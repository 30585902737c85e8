"""A conversation about pictures in the terminal."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chiasm import terminal
from chiasm.data.chat import Message, user_message
from chiasm.data.few_shot import put_first, solved
from chiasm.generation.decode import Decoding
from chiasm.generation.engine import Engine
from chiasm.generation.text import Trim
from chiasm.sources.cache import cache_folder
from chiasm.vision.pictures import to_rgb
from chiasm.vlm import VLM

COMMANDS = {
    "/image PATH...": "adds pictures to the next question; quote names with spaces",
    "/history": "shows the conversation so far",
    "/save FILE": "writes it as JSON, with its pictures' paths, which `chiasm train --data` reads",
    "/reset": "starts over",
    "/help": "shows this",
    "/quit": "leaves, and so does Ctrl-D; Ctrl-C stops an answer",
}
HISTORY_LINES = 1000


@contextmanager
def engine_of(vlm: VLM, weights: str) -> Iterator[Engine]:
    """What answers one person, with the model's own weights or with packed ones in their place."""
    engine = Engine(vlm.model, vlm.processor, max_batch=1, weights=weights, release=weights != "float32")
    try:
        yield engine
    finally:
        engine.close(finish=False)


def answer(vlm: VLM, images: list[Path], prompt: str, options: dict[str, Any], weights: str) -> Iterator[str]:
    """The pieces of one answer; packed weights are an engine's, the model's own need none.

    Args:
        options: fields of `Decoding`, and `examples`: solved ones that the prompt starts with.
    """
    if weights == "float32":
        yield from vlm.stream(images, prompt, **options)
        return
    turns, shown, decoding = _read(options)
    with engine_of(vlm, weights) as engine:
        ticket = engine.submit(put_first(turns, user_message(prompt, len(images))), [*shown, *images], decoding)
        yield from map(Trim(), (piece.text for piece in ticket))


def converse(engine: Engine, images: list[Path], options: dict[str, Any], console: Console) -> None:
    """Questions and streamed answers until the end of input; earlier turns stay in the prompt.

    Args:
        options: as `answer` takes them; the examples stand in front of every prompt.
    """
    with _typed_lines():
        Conversation(engine, options, console, images).run()


def _read(options: dict[str, Any]) -> tuple[list[Message], list[Any], Decoding]:
    """The examples' messages and pictures, and how tokens are chosen."""
    decoding = dict(options)
    turns, shown = solved(decoding.pop("examples", ()))
    return turns, shown, Decoding(**decoding)


class Conversation:
    """What was said and shown, and what the commands do with it.

    Args:
        images: pictures for the first question.
    """

    def __init__(self, engine: Engine, options: dict[str, Any], console: Console, images: list[Path]) -> None:
        self.engine, self.console = engine, console
        self.turns, self.examples, self.decoding = _read(options)
        self.history: list[Message] = []
        self.shown: list[Path] = []
        self.waiting: list[Path] = []
        self.protocol = terminal.protocol(os.environ)
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.add,
            "/history": self.recall,
            "/save": self.save,
            "/reset": self.reset,
            "/new": self.reset,
            "/help": self.help,
        }
        self.add(shlex.join(map(str, images)))

    def run(self) -> None:
        self.console.print("[dim]/help shows the commands[/dim]")
        while True:
            try:
                line = self._line().strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            command, _, rest = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if command in self.commands:
                    self.commands[command](rest.strip())
                elif command.startswith("/"):
                    self._complain(f"no such command: {command}; /help shows those that there are")
                elif line:
                    self.ask(line)
            except (ValueError, OSError, RuntimeError) as error:
                self._complain(str(error))
            except KeyboardInterrupt:  # while a picture is read; of what was asked nothing is kept
                self.console.print()

    def _line(self) -> str:
        """Readline draws the prompt itself, and must know which of its letters take no place."""
        if self.console.is_terminal and "readline" in sys.modules:
            return input("\001\x1b[1;36m\002>\001\x1b[0m\002 ")
        return self.console.input("[bold cyan]>[/bold cyan] ")

    def ask(self, line: str) -> None:
        """One question with the pictures that wait for it, and its answer as it comes."""
        asked = [*self.history, *user_message(line, len(self.waiting))]
        pictures = [*self.shown, *self.waiting]
        ticket = self.engine.submit(put_first(self.turns, asked), [*self.examples, *pictures], self.decoding)
        pieces, trim = list[str](), Trim()
        try:
            for piece in ticket:
                pieces.append(trim(terminal.printable(piece.text)))
                self.console.print(pieces[-1], end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            ticket.cancel()
        self.console.print()
        self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        self.shown, self.waiting = pictures, []

    def add(self, rest: str) -> None:
        """Shows pictures, and keeps them for the next question."""
        for name in shlex.split(rest):
            path = Path(name).expanduser()
            if not path.is_file():
                self._complain(f"no such picture: {path}")
                continue
            terminal.show(to_rgb(path), self.console, self.protocol)
            self.console.print(f"[dim]{escape(str(path))}[/dim]", soft_wrap=True, highlight=False)
            self.waiting.append(path)

    def recall(self, _: str) -> None:
        pictures = iter(self.shown)
        for message in self.history:
            parts = message["content"]
            if isinstance(parts, str):
                self.console.print(parts, markup=False, highlight=False, soft_wrap=True)
                continue
            for part in parts:
                text = f"[dim]{escape(str(next(pictures)))}[/dim]" if part["type"] == "image" else escape(part["text"])
                self.console.print(f"[bold cyan]>[/bold cyan] {text}", highlight=False, soft_wrap=True)

    def save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs a file: /save talk.json")
        if not self.history:
            raise ValueError("there is nothing to save yet; ask something first")
        path = Path(shlex.split(rest)[0]).expanduser()
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name")
        sample = {"messages": self.history, "images": [str(picture.resolve()) for picture in self.shown]}
        path.write_text(json.dumps([sample], ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self.console.print(f"[dim]saved in {escape(str(path))}[/dim]", soft_wrap=True, highlight=False)

    def reset(self, _: str) -> None:
        self.history, self.shown, self.waiting = [], [], []

    def help(self, _: str) -> None:
        for command, meaning in COMMANDS.items():
            self.console.print(f"[bold]{escape(command):16}[/bold] [dim]{escape(meaning)}[/dim]", highlight=False)

    def _complain(self, text: str) -> None:
        self.console.print(f"[red]{escape(' '.join(text.split()))}[/red]", soft_wrap=True, highlight=False)


class _typed_lines:
    """Arrow keys and earlier questions, also those of earlier conversations, where Python has readline."""

    def __enter__(self) -> None:
        self.file = cache_folder() / "chat_history"
        with suppress(ImportError, OSError):
            import readline

            readline.set_history_length(HISTORY_LINES)
            readline.read_history_file(self.file)

    def __exit__(self, *_: object) -> None:
        with suppress(ImportError, OSError):
            import readline

            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch(mode=0o600)
            readline.write_history_file(self.file)
