"""Tokens become text piece by piece: whole characters only, and nothing of a stop string."""

import re
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

UNFINISHED = "\ufffd"
SETTLED = re.compile(r".*(?:[^ ]{3}|[^ '](?= ))", re.DOTALL)
"""Text that no clean-up joins with what follows: it takes away spaces before a mark or at most three letters."""


class TextStream:
    """The text of an answer while its tokens arrive.

    New tokens are decoded behind the last ones that gave text, which tell whether a space belongs in between; those
    before them are let go.

    Args:
        stop: strings that end the answer; text that may be the beginning of one is held back.

    Attributes:
        shown: characters that were handed out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._cleans = _cleans_up(tokenizer)
        self._tokens: list[int] = []
        self._read = 0
        self._seen = ""
        self._raw = ""
        self._held = ""
        self.shown = 0

    @property
    def arrived(self) -> int:
        """Characters so far, with those that are held back: where the next token's text begins."""
        return self.shown + len(self._held) + len(self._raw)

    def push(self, token: int) -> str:
        """The text that a token adds; `stopped` says whether a stop string has ended the answer."""
        self._tokens.append(token)
        text = self._decode()
        if text.endswith(UNFINISHED) or len(text) <= len(self._seen):
            return ""
        new = text[len(self._seen) :]
        del self._tokens[: self._read]
        self._read, self._seen = len(self._tokens), self._decode()
        return self._release(self._clean(new))

    def finish(self) -> str:
        """What was held back, when the answer is over."""
        text = self._decode()
        new = self._clean(text[len(self._seen) :], last=True)
        self._seen = text
        shown = self._release(new) + self._held
        self.shown, self._held = self.shown + len(self._held), ""
        return shown

    def fork(self) -> "TextStream":
        """The same text so far, which may go on otherwise."""
        other = copy(self)
        other._tokens = list(self._tokens)
        return other

    def _decode(self) -> str:
        return self.tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _clean(self, new: str, last: bool = False) -> str:
        """Decoded text as far as it is settled, without the spaces that the tokenizer takes away."""
        if not self._cleans:
            return new
        text = self._raw + new
        settled = SETTLED.match(text)
        end = len(text) if last else settled.end() if settled else 0
        self._raw = text[end:]
        return self.tokenizer.clean_up_tokenization(text[:end])

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        before = before_stop(text, self.stop)
        self.stopped = len(before) < len(text)
        kept = 0 if self.stopped else max((_overlap(text, stop) for stop in self.stop), default=0)
        shown = before[: len(before) - kept]
        self.shown, self._held = self.shown + len(shown), before[len(shown) :]
        return shown


class StopStrings(StoppingCriteria):
    """Ends rows of `transformers.generate` whose answer a stop string is in, wherever it is in the prompt.

    Args:
        prompt: tokens in front of the answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], prompt: int) -> None:
        self.prompt, self._empty = prompt, TextStream(tokenizer, stop)
        self._streams: dict[tuple[int, ...], TextStream] = {}

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        known, self._streams = self._streams, {}
        for answer in map(tuple, input_ids[:, self.prompt :].tolist()):
            if answer not in self._streams:
                self._streams[answer] = self._read(known, answer)
        ended = [self._streams[tuple(row)].stopped for row in input_ids[:, self.prompt :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def _read(self, known: dict[tuple[int, ...], TextStream], answer: tuple[int, ...]) -> TextStream:
        """The text of an answer, which goes on where the same one was before its last token."""
        begun = known.get(answer[:-1])
        text = (begun or self._empty).fork()
        for token in answer if begun is None else answer[-1:]:
            text.push(token)
        return text


class Trim:
    """Pieces of an answer without the space around the whole: space waits until something follows it."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def __call__(self, piece: str) -> str:
        """What can be shown now."""
        text = self._held + piece if self._begun else piece.lstrip()
        shown = text.rstrip()
        self._begun, self._held = self._begun or bool(shown), text[len(shown) :]
        return shown


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding takes spaces away: of a BPE tokenizer, transformers does so only where it is forced to."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(tokenizer.clean_up_tokenization_spaces) and (forced or type(model).__name__ != "BPE")


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """A text up to the first stop string in it."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]
