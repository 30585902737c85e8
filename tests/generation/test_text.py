"""Tokens as text: the pieces are the whole, characters are not cut, and nothing of a stop string is shown."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import tiny
from chiasm.generation.text import TextStream, Trim, before_stop
from chiasm.language.byte_tokenizer import byte_tokenizer

LONG = "Ein größerer Satz über das Bild: 한국어도 됩니다, and 🙂 too. " * 3
TEXTS = (
    LONG,
    "가나다" * 60,
    "👩\u200d👩\u200d👧\u200d👦" * 9,
    "  a  b \n\n c",
    " ",
    "x\ufffdy",
    "He said , ' do n't ' .",
)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: spaces are letters, of which the first is left out, and what it does not know is bytes."""
    known = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghi.,'", "▁a", "▁▁"]
    vocabulary = {token: index for index, token in enumerate(known)}
    merges = [("▁", "a"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def cleaning_tokenizer() -> PreTrainedTokenizerFast:
    """It takes away spaces before marks."""
    tokenizer = tiny.tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


TOKENIZERS = (tiny.tokenizer, byte_tokenizer, pieces_tokenizer, cleaning_tokenizer)


def streamed(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, tokens), stream.finish()])


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


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_what_all_tokens_say_together(make: Callable[[], PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = make()
    tokens = tokenizer(text)["input_ids"]
    end = [tokenizer.eos_token_id]
    for asked in (tokens, [*end, *tokens, *end, *end, *tokens]):
        assert streamed(tokenizer, asked) == tokenizer.decode(asked, skip_special_tokens=True)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_an_answer_may_end_within_a_character(cut: int) -> None:
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("가🙂")["input_ids"][:-cut]
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


def test_spaces_that_a_tokenizer_takes_away() -> None:
    tokenizer, draw = cleaning_tokenizer(), random.Random(0)
    for _ in range(300):
        tokens = tokenizer("".join(draw.choices("  .,'?ntsmver가", k=40)))["input_ids"]
        assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("text", ["가나다" * 60, LONG, "a" * 200, " a" * 100])
def test_a_step_decodes_a_few_tokens(
    make: Callable[[], PreTrainedTokenizerFast], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the answer is, and where no token is a whole character."""
    tokenizer, sizes = make(), list[int]()
    tokens, decode = tokenizer(text)["input_ids"], tokenizer.decode

    def counted(tokens: list[int], **options: bool) -> str:
        sizes.append(len(tokens))
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    streamed(tokenizer, tokens)
    assert len(tokens) >= 100 and max(sizes) <= 8


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
