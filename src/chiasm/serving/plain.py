"""Words of clients as words: what a model's special tokens are spelled like does nothing special."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from chiasm.serving.errors import ApiError

ROUNDS = 4
"""Times that a text is parted and read again: what parting leaves of a special token can be another one."""


class Plain:
    """Texts in which a model's special tokens are words like others: a space parts their first letter from the rest.

    So nobody's words end a turn, take another role or stand for a picture. A model may have thousands of them: a text
    is gone through once, and looked up only where two of its letters begin one.

    Args:
        marks: that mean something beside the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *marks: str) -> None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.marks = [mark for mark in {*added, *tokenizer.all_special_tokens, *marks} if len(mark) > 1]
        self._known = set(self.marks)
        lengths: dict[str, set[int]] = {}
        for mark in self.marks:
            lengths.setdefault(mark[:2], set()).add(len(mark))
        self._lengths = {begin: sorted(found, reverse=True) for begin, found in lengths.items()}
        first, second = (re.escape("".join(sorted({begin[place] for begin in lengths}))) for place in (0, 1))
        self._begin = re.compile(f"[{first}](?=[{second}])" if lengths else "(?!)")

    def __call__(self, text: str) -> str:
        pieces, end = list[str](), 0
        for start, stop in self._spans(text):
            pieces += [text[end : start + 1], " ", text[start + 1 : stop]]
            end = stop
        return "".join([*pieces, text[end:]])

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where special tokens stand: from left to right the longest one, none inside of another."""
        end = 0
        for found in self._begin.finditer(text):
            start = found.start()
            if start < end:
                continue
            lengths = self._lengths.get(text[start : start + 2], ())
            length = next((one for one in lengths if text[start : start + one] in self._known), 0)
            if length:
                end = start + length
                yield start, end

    def check(self, texts: Sequence[str], param: str) -> None:
        """Refuses texts that spell a special token together: some templates show all pictures before the words."""
        for pieces in (texts, [text.strip() for text in texts]):
            if self("".join(pieces)) != "".join(map(self, pieces)):
                message = "texts around a picture are a special token of the model together; put a space inside of it"
                raise ApiError(400, message, param=param)


class PlainTexts:
    """The same for texts that are read one by one, as a retrieval model's text tower reads them: what its tokenizer
    still finds, as one that reads capitals as small letters does, is parted too.

    A mark of the end would hide what follows from CLIP, whose vector is that of the first one.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = tokenizer = processor.tokenizer
        self._plain, self._lower = Plain(tokenizer), bool(getattr(processor, "lowercase", False))
        special = set(tokenizer.convert_tokens_to_ids(self._plain.marks))
        frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        self._special = special - ({tokenizer.unk_token_id} - frame)  # ordinary letters may be unknown

    def __call__(self, text: str) -> str:
        """A text without special tokens.

        Raises:
            ValueError: they cannot be parted.
        """
        text = self._plain(text.lower() if self._lower else text)
        if not self.tokenizer.is_fast:  # it does not say where its tokens stand
            return text
        for _ in range(ROUNDS):
            if not (seams := self._seams(text)):
                return text
            text = " ".join(text[start:stop] for start, stop in pairwise([0, *seams, len(text)]))
        raise ValueError("a text is a special token of the model, however it is read; leave it out")

    def _seams(self, text: str) -> list[int]:
        """Places behind the first letter of each special token that the tokenizer finds."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
        spans = [place for token, place in pairs if token in self._special]
        return [stop - len(text[start:stop].lstrip()) + 1 for start, stop in spans]
