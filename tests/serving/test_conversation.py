"""`chiasm chat`: commands, pictures in terminals, and an answer that is stopped."""

import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import chiasm
import tiny
from chiasm import terminal
from chiasm.conversation import converse, engine_of
from chiasm.data.readers import read
from chiasm.generation.engine import Engine
from chiasm.generation.text import TextStream


@pytest.fixture
def talk(vlm: chiasm.VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Says lines, and gives what the terminal shows."""
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b c.png"):
        tiny.picture().save(tmp_path / name)

    def say(*lines: str, images: list[Path] | None = None, colours: bool = False) -> str:
        said: Iterator[str] = iter(lines)
        console = Console(
            file=StringIO(), force_terminal=colours, width=100, color_system="truecolor" if colours else None
        )
        monkeypatch.setattr(console, "input", lambda *_: next(said))
        monkeypatch.setattr("builtins.input", lambda *_: next(said))
        with engine_of(vlm, "float32") as engine:
            converse(engine, images or [], {"max_new_tokens": 4, "temperature": 0.0}, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    return say


def test_answers_are_those_of_the_model(talk: Callable[..., str], vlm: chiasm.VLM, tmp_path: Path) -> None:
    out = talk("/image 'b c.png'", "Hello", "/save it.json", "/quit", images=[Path("a.png")])
    answer = vlm.chat([tmp_path / "a.png", tmp_path / "b c.png"], "Hello", max_new_tokens=4)
    assert answer in out and "saved in it.json" in out
    (sample,) = read(tmp_path / "it.json")
    assert len(sample.images) == 2 and sample.messages[-1]["content"] == answer
    (saved,) = json.loads((tmp_path / "it.json").read_text())
    assert saved["messages"][0]["role"] == "user"


def test_mistakes_are_one_line_each(talk: Callable[..., str]) -> None:
    out = talk(
        "/image none.png", "/save", "/save x.json", "/image 'a", "/dance", "a" * 3000, "/help", "/history", "/exit"
    )
    for words in ("no such picture: none.png", "/save needs a file", "nothing to save", "No closing quotation",
                  "no such command: /dance", "context is 1024", "/reset"):  # fmt: skip
        assert words in out


def test_pictures_outlive_a_question_that_is_too_long(talk: Callable[..., str]) -> None:
    out = talk("a" * 3000, "One?", "/history", "/quit", images=[Path("a.png")])
    assert "context is 1024" in out and "> a.png" in out and "> One?" in out


def test_a_question_that_fails_or_is_stopped_ends_alone(
    talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a picture is prepared, and memory that is not there; the picture waits for the next question."""
    submit, wrong = Engine.submit, iter([KeyboardInterrupt(), RuntimeError("out of memory")])

    def submitting(self: Engine, *given: Any) -> Any:
        if (error := next(wrong, None)) is not None:
            raise error
        return submit(self, *given)

    monkeypatch.setattr(Engine, "submit", submitting)
    out = talk("One?", "Two?", "Three?", "/history", "/quit", images=[Path("a.png")])
    assert "out of memory" in out and "> a.png" in out and "> Three?" in out
    assert "> One?" not in out and "> Two?" not in out


def test_words_do_not_control_the_terminal(talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    push = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda self, token: push(self, token) + "\x1b]52;c;aGk=\x07\x9b2J\r!\n")
    out = talk("One?", "/history", "/quit")
    assert "]52;c;aGk=2J!\n" in out and not {"\x1b", "\x07", "\x9b", "\r"} & set(out)


def test_history_and_reset(talk: Callable[..., str]) -> None:
    out = talk("One?", "/history", "/reset", "/save it.json", "/quit", images=[Path("a.png")])
    assert "> a.png" in out and "> One?" in out and "nothing to save" in out


def test_an_answer_is_stopped(talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    submit, tickets = Engine.submit, []

    class Interrupted:
        def __init__(self, ticket: Any) -> None:
            tickets.append(ticket)
            self.cancel = ticket.cancel

        def __iter__(self) -> Iterator[Any]:
            yield next(iter(tickets[-1]))
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "submit", lambda self, *given: Interrupted(submit(self, *given)))
    talk("One?", "/history", "/quit")
    assert tickets[0].cancelled


@pytest.mark.parametrize(
    ("environment", "how"),
    [({"TERM": "xterm-kitty"}, "kitty"), ({"KITTY_WINDOW_ID": "1", "TMUX": "x"}, "blocks"),
     ({"TERM": "xterm"}, "blocks"),
     ({"TERM_PROGRAM": "iTerm.app"}, "iterm"), ({"TERM_PROGRAM": "ghostty"}, "kitty"), ({}, "blocks")],
)  # fmt: skip
def test_terminals(environment: dict[str, str], how: str) -> None:
    assert terminal.protocol(environment) == how


def test_a_picture_is_shown(talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    expected = {"xterm": "▀", "xterm-kitty": "\x1b_Ga=T,f=100,c=30,m=1;iVBOR"}
    for term, mark in expected.items():
        monkeypatch.setenv("TERM", term)
        out = talk("/quit", images=[Path("a.png")], colours=True)
        assert mark.replace("▀", "▀") in out
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b]1337;File=inline=1;" in talk("/quit", images=[Path("a.png")], colours=True)
    assert "▀" not in talk("/quit", images=[Path("a.png")])
    assert terminal.cells(tiny.picture(), 48) == (30, 20)
    assert terminal.half_blocks(tiny.picture(), 30, 20).plain.count("▀") == 600
