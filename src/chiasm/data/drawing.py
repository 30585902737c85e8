"""Requests for pictures: what a model that draws is asked, in training and afterwards."""

from chiasm.data.chat import Message
from chiasm.data.schema import Sample, text_of

REQUEST = "Draw: {}"
ANYTHING = "Draw a picture."
"""The request without words. What it would draw is what classifier-free guidance leads away from (arXiv 2207.12598)."""


def draws(message: Message) -> bool:
    """Whether a message is a picture, and no words."""
    content = message["content"]
    pictured = not isinstance(content, str) and any(part["type"] == "image" for part in content)
    return pictured and not text_of(content).strip()


def asked_in_words(sample: Sample) -> str | None:
    """The last question of a sample whose one picture is the answer to words; None where it is anything else."""
    if len(sample.images) != 1 or not draws(sample.messages[-1]):
        return None
    words = sample.question.strip()
    return None if words == ANYTHING else words


def request(words: str | None) -> Message:
    """A user's message that asks for a picture of something, or of anything."""
    return {"role": "user", "content": ANYTHING if words is None else REQUEST.format(words.strip())}


def drawn(words: str | None) -> list[Message]:
    """A conversation whose answer is a picture."""
    return [request(words), {"role": "assistant", "content": [{"type": "image"}]}]
