"""Requests for pictures: what a model that draws is asked, in training and afterwards."""

from chiasm.data.chat import Message

REQUEST = "Draw: {}"
ANYTHING = "Draw a picture."
"""The request without words. What it would draw is what classifier-free guidance leads away from (arXiv 2207.12598)."""


def request(words: str | None) -> Message:
    """A user's message that asks for a picture of something, or of anything."""
    return {"role": "user", "content": ANYTHING if words is None else REQUEST.format(words.strip())}


def drawn(words: str | None) -> list[Message]:
    """A conversation whose answer is a picture."""
    return [request(words), {"role": "assistant", "content": [{"type": "image"}]}]
