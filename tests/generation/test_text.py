"""Tokens as text: the pieces are the whole, characters are not cut, and nothing of a stop string is shown."""

import pytest

import tiny
from chiasm.generation.text import TextStream, Trim, before_stop

LONG = "Ein größerer Satz über das Bild: 한국어도 됩니다, and 🙂 too. " * 3


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokenizer(text)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream.stopped


def test_pieces_are_the_text() -> None:
    found, stopped = pieces(LONG)
    assert "".join(found) == LONG and not stopped and not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("stop", ["\nUSER", "Bild", "über das Bild: 한", "zzz"])
def test_stop_strings(stop: str) -> None:
    text = f"{LONG}\nUSER: more"
    found, stopped = pieces(text, ("###", stop))
    assert "".join(found) == before_stop(text, (stop,)) and stopped == (stop in text)


def test_what_only_begins_like_a_stop_string_is_shown_in_the_end() -> None:
    found, stopped = pieces("abc ##", ("###",))
    assert found[-1] == "##" and not stopped and "".join(found) == "abc ##"


@pytest.mark.parametrize("text", ["", " ", " \n a", "a \n ", "\u3000한 국 어\u3000", "  a  b \n\nc\td  "])
def test_space_around_an_answer_is_left_out(text: str) -> None:
    for size in (1, 2, 5):
        trim = Trim()
        found = [trim(text[start : start + size]) for start in range(0, len(text), size)]
        assert "".join(found) == text.strip()
