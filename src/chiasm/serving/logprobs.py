"""Tokens in log-probabilities: their text, and their bytes where a character is spread over several tokens."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from chiasm.generation.engine import Piece


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_letters()
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Entries of `logprobs.content`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)

    def entry(self, piece: Piece, count: int) -> dict[str, Any] | None:
        """One token's entry; None for the mark that ends an answer."""
        if piece.logprob is None or piece.token in self._special:
            return None
        top = [self._named(token, logprob) for token, logprob in (piece.top or [])[:count]]
        return {**self._named(piece.token, piece.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        raw = list(text.encode()) if "\ufffd" not in text else self._bytes(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}

    def _bytes(self, token: int) -> list[int] | None:
        written = self.tokenizer.convert_ids_to_tokens(token)
        if written is None:
            return None
        if byte := BYTE_TOKEN.fullmatch(written):
            return [int(byte[1], 16)]
        return [BYTES[letter] for letter in written] if all(letter in BYTES for letter in written) else None
