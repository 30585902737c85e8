"""Bodies of requests, and what streams answer."""

import base64
import json
from io import BytesIO
from typing import Any

from PIL import Image

import tiny

CHAT = "/v1/chat/completions"


def data_url(picture: Image.Image | bytes | None = None, kind: str = "PNG") -> str:
    """A picture, or whatever bytes, as a data URL."""
    if not isinstance(picture, bytes):
        file = BytesIO()
        (picture or tiny.picture()).save(file, kind)
        picture = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"


def ask(*urls: str, text: str = "What is it?", **fields: Any) -> dict[str, Any]:
    """A question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"model": "tiny", "messages": [message], "max_tokens": 5, **fields}


def chunks(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose last is [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def said(text: str) -> str:
    """What a stream of one answer says in all."""
    choices = [choice for chunk in chunks(text) for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)
