"""How long an answer may become: as long as the test data expects, so that no right answer is cut."""

from typing import Any

from chiasm.data.drawing import draws
from chiasm.data.schema import Samples, text_of

LEAST, MOST = 8, 128
"""Tokens of an answer where a plan names no number."""


def answer_length(asked: int | None, samples: Samples, tokenizer: Any) -> tuple[int, list[str]]:
    """Tokens that an answer may have, and in words what is cut.

    Args:
        asked: by the plan; None takes as many as the longest expected answer has with its end, `LEAST` to `MOST`.
        samples: the questions with their expected answers.
    """
    longest = longest_answer(samples, tokenizer) + 1
    length = min(max(longest, LEAST), MOST) if asked is None else asked
    if longest <= length:
        return length, []
    return length, [
        f"expected answers have up to {longest} tokens with their end, answers up to {length} (the rest is cut); "
        f"set evaluation.max_new_tokens to {longest}"
    ]


def longest_answer(samples: Samples, tokenizer: Any) -> int:
    """Tokens of the longest answer that a sample expects, without its end."""
    texts = {text for sample in samples for text in _answers(sample)}
    return max(
        (len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts), default=0
    )


def _answers(sample: Any) -> list[str]:
    """Of every turn in words what was said, behind a space as templates write it, and what is accepted beside it."""
    said = [message for message in sample.messages if message["role"] == "assistant" and not draws(message)]
    accepted = [*(text_of(message["content"]) for message in said), *map(str, sample.meta.get("answers", []))]
    return [f" {text.strip()}" for text in accepted]
