"""Words of clients as words: what a model's special tokens are spelled like does nothing special."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from chiasm.serving.errors import ApiError

ROUNDS = 4
"""Times that a text is parted and read again: what parting leaves of a special token can be another one."""


class Plain:
    """Texts in which a model's special tokens are words like others: a space parts their first letter from the rest.

    So nobody's words end a turn, take another role or stand for a picture.

    Args:
        marks: that mean something beside the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *marks: str) -> None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = {*added, *tokenizer.all_special_tokens, *marks}
        self.marks = sorted((mark for mark in known if len(mark) > 1), key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, self.marks)) or "(?!)")

    def __call__(self, text: str) -> str:
        return self._found.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)

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
