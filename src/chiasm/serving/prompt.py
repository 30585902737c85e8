"""A request's messages → Chiasm's: words without special tokens, and pictures fetched, to be decoded in their turn."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from chiasm.data.chat import Message
from chiasm.serving import pictures
from chiasm.serving.body import Lease
from chiasm.serving.errors import ApiError
from chiasm.serving.messages import ImagePart
from chiasm.serving.messages import Message as Given
from chiasm.serving.plain import Plain
from chiasm.serving.served import ChatModel, Shared
from chiasm.serving.settings import Limits

ROLES = {"developer": "system"}
AT_ONCE = 16_384
"""Letters and parts of a conversation that are read at once; others do not wait for a longer one."""


@dataclass(frozen=True)
class Source:
    """Where a picture comes from: a data URL or a file's bytes, and its place in the request."""

    data: str | bytes
    param: str


@dataclass(frozen=True)
class Prompt:
    messages: list[Message]
    pictures: list[Source]


async def read_prompt(shared: Shared, model: ChatModel, given: Sequence[Given], lease: Lease) -> Prompt:
    """The conversation that a model can be asked.

    Raises:
        ApiError: too long a text, too many pictures, or one that cannot be had.
    """
    large = _check_length(given, model.characters) > AT_ONCE
    messages, urls = await asyncio.to_thread(_read, given, model.plain) if large else _read(given, model.plain)
    return Prompt(messages, await find_pictures(shared, urls, lease))


def _check_length(given: Sequence[Given], most: int) -> int:
    """Refuses what no context holds before anything goes through its letters; how much there is to go through."""
    said = [message.said for message in given]
    texts = [[one] if isinstance(one, str) else [part.words for part in one] for one in said]
    if (length := sum(len(text) for several in texts for text in several)) > most:
        message = f"a conversation of {length:,} characters is longer than the model's context; {most:,} could fit"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return length + sum(map(len, texts))


def _read(given: Sequence[Given], plain: Plain) -> tuple[list[Message], list[tuple[str, str]]]:
    """The conversation, and its pictures' addresses with their places in the request."""
    messages: list[Message] = []
    urls: list[tuple[str, str]] = []
    for number, message in enumerate(given):
        parts, found = _parts(message, f"messages[{number}].content", plain)
        urls += found
        messages.append({"role": ROLES.get(message.role, message.role), "content": parts})
    return messages, urls


def _parts(message: Given, param: str, plain: Plain) -> tuple[Any, list[tuple[str, str]]]:
    """A message's content for the chat template, and its pictures' addresses with their places in the request.

    Texts that follow each other become one, as templates join them: no special token hides in the seam.
    """
    content = message.said
    if isinstance(content, str):
        return plain(content), []
    parts: list[dict[str, str]] = []
    texts: list[str] = []
    for pictured, run in groupby(content, lambda part: isinstance(part, ImagePart)):
        words = [part.words for part in run]
        if pictured:
            parts += [{"type": "image"}] * len(words)
        else:
            texts.append("".join(words))
            parts.append({"type": "text", "text": plain(texts[-1])})
    plain.check(texts, param)
    shown = [(place, part) for place, part in enumerate(content) if isinstance(part, ImagePart)]
    return parts, [(part.image_url.url, f"{param}[{place}].image_url.url") for place, part in shown]


async def find_pictures(shared: Shared, urls: list[tuple[str, str]], lease: Lease) -> list[Source]:
    """Pictures by their addresses, each with its place in the request; none is decoded."""
    limits = shared.settings.limits
    if len(urls) > limits.images:
        raise ApiError(
            400,
            f"Too many images: {len(urls)}, but a request may have {limits.images}.",
            param=urls[limits.images][1],
            code="too_many_images",
        )
    return [Source(await _data(shared, url.strip(), param, lease), param) for url, param in urls]


def load(sources: Sequence[Source], limits: Limits, lease: Lease) -> list[Image.Image]:
    """The pictures in RGB, for which somebody has a turn."""
    return [pictures.load(source.data, limits, source.param, lease) for source in sources]


async def loaded(shared: Shared, sources: Sequence[Source], lease: Lease) -> list[Image.Image]:
    """The same in a turn of their own, for what has one line of its own behind it."""
    return await shared.prepared(shared.pictured, lease, load, sources, shared.settings.limits, lease)


async def _data(shared: Shared, url: str, param: str, lease: Lease) -> str | bytes:
    """A data URL, or what another server sends. Nobody else waits meanwhile."""
    if url[:5].lower() == "data:":
        return url
    if url.partition("://")[0].lower() not in ("http", "https"):
        raise pictures.invalid("expected a data: URL with base64 data", param)
    if not shared.settings.image_urls:
        raise ApiError(
            400,
            "Invalid image: this server fetches no addresses; send a data: URL, or start it with --image-urls.",
            param=param,
            code="image_urls_not_allowed",
        )
    return await shared.fetch(url, param, lease.take)
