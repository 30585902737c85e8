"""Log-probabilities of an answer are of the tokens that it shows."""

from typing import Any

import pytest

import tiny
from chiasm.generation.decoding import Decoding
from chiasm.generation.request import Request
from chiasm.generation.text import TextStream, before_stop
from chiasm.generation.ticket import Piece, Ticket


def answered(text: str, **options: Any) -> tuple[list[int], list[Piece], str | None]:
    """The tokens of a text, their pieces, and how the answer that they are ended."""
    tokenizer, decoding = tiny.tokenizer(), Decoding(logprobs=0, **options)
    prompt: Any = None
    request = Request(Ticket(1), prompt, decoding, TextStream(tokenizer, decoding.stop), None, None, [])
    added, reason = [], None
    for token in tokenizer(text)["input_ids"]:
        added.append(token)
        if reason := request.add(token, (-1.0, []), set()):
            break
    request.ticket.finish("cancelled")
    return added, list(request.ticket), reason


@pytest.mark.parametrize(
    ("text", "stop"),
    [("ab STOP cd", "STOP"), ("xaaaab", "aab"), ("x가다가나", "가나"), ("STOP", "STOP"), ("aSTSTSTOP", "STOP")],
)
def test_tokens_that_a_stop_string_cut_out_have_none(text: str, stop: str) -> None:
    tokens, pieces, reason = answered(text, stop=(stop, "###"), max_new_tokens=50)
    assert [piece.token for piece in pieces] == tokens and reason == "stop"
    assert "".join(piece.text for piece in pieces) == before_stop(text, (stop,))
    shown = [piece.token for piece in pieces if piece.logprob is not None]
    assert tiny.tokenizer().decode(shown) == before_stop(text, (stop,))
    assert all(piece.top is None for piece in pieces if piece.logprob is None)


def test_the_beginning_of_a_stop_string_is_shown_in_the_end() -> None:
    tokens, pieces, reason = answered("ab STO", stop=("STOP",), max_new_tokens=6)
    assert [piece.token for piece in pieces] == tokens and reason == "length"
    assert "".join(piece.text for piece in pieces) == "ab STO"
    assert all(piece.logprob == -1.0 for piece in pieces)


def test_pieces_wait_for_their_text_only() -> None:
    _, pieces, reason = answered("ab ST", stop=("STOP",), max_new_tokens=50)
    assert [piece.text for piece in pieces] == ["a", "b", " "] and reason is None
