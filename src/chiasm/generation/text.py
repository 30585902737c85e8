"""Tokens become text piece by piece: whole characters only, and nothing of a stop string."""

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
WINDOW = 8
"""Tokens that are decoded together; a longer answer is decoded from its last whole word on."""


class TextStream:
    """The text of an answer while its tokens arrive.

    Args:
        stop: strings that end the answer; text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._tokens: list[int] = []
        self._done = 0
        self._shown = ""
        self._held = ""

    def push(self, token: int) -> str:
        """The text that a token adds; `stopped` says whether a stop string has ended the answer."""
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens[self._done :], skip_special_tokens=True)
        if text.endswith(UNFINISHED):
            return ""
        new = text[len(self._shown) :]
        self._shown = text
        last = self.tokenizer.decode(self._tokens[-1:], skip_special_tokens=True)
        if len(self._tokens) - self._done > WINDOW and last.strip() and UNFINISHED not in last:
            self._done, self._shown = len(self._tokens) - 1, last
        return self._release(new)

    def finish(self) -> str:
        """What was held back, when the answer is over."""
        text = self.tokenizer.decode(self._tokens[self._done :], skip_special_tokens=True)
        rest = self._held + text[len(self._shown) :]
        self._held, self._shown = "", text
        return "" if self.stopped else before_stop(rest, self.stop)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        before = before_stop(text, self.stop)
        if len(before) < len(text):
            self.stopped, self._held = True, ""
            return before
        kept = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


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


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """A text up to the first stop string in it."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]
