"""The pictures that stand in a conversation's own parts, by the names that transformers' processors read."""

from typing import Any

from huggingface_hub import get_session

from chiasm.data.base64_pictures import DATA_URL, decoded
from chiasm.data.chat import Message
from chiasm.data.schema import ImageError, ImageRef

PICTURE_KEYS = ("image", "url", "path", "base64")
"""Where the picture of an image part is."""
WEB = ("http://", "https://")
PATIENCE = 30.0
"""Seconds that an address has to answer."""


def pictures_of(messages: list[Message]) -> list[Any]:
    """Pictures as `image`, or by a `url`, a `path` or in `base64`; of a text, wherever it stands, its beginning tells
    addresses and data URLs from paths. Addresses are fetched: it is for the caller's own conversations.

    Raises:
        ImageError: a picture is not there, or cannot be read.
    """
    pictures = []
    for part in (part for message in messages for part in message["content"] if isinstance(part, dict)):
        if part.get("type") != "image":
            continue
        given = next(((name, part[name]) for name in PICTURE_KEYS if part.get(name) is not None), None)
        if given is not None:
            pictures.append(_read(*given))
    return pictures


def _read(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith(WEB):
        answer = get_session().get(value, timeout=PATIENCE, follow_redirects=True)
        if answer.is_error:
            raise ImageError("missing picture", value, f"the answer is {answer.status_code} {answer.reason_phrase}")
        return ImageRef.of(answer.content, value).load()
    if not value.startswith(DATA_URL) and name != "base64":
        return ImageRef.of(value).load()
    try:
        return ImageRef.of(decoded(value), name).load()
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError("broken picture", name, str(error)) from None
