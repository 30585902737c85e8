"""The pictures of a batch dealt to its rows, by how they are nested or by the placeholders; or both counts are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chiasm.data.chat import IMAGE_TOKEN, Message, count_images


@dataclass(frozen=True)
class Dealt:
    """All pictures in their order, how many of them each row has, and the rows: conversations, or rendered texts."""

    pictures: list[Any]
    counts: list[int]
    rows: list[Any]


def deal_texts(images: Any, texts: list[str]) -> Dealt:
    """Rendered texts with their pictures.

    Raises:
        ValueError: not as many placeholders as pictures.
    """
    pictures, _ = flatten_images(images)
    counts = [one.count(IMAGE_TOKEN) for one in texts]
    check_count(sum(counts), len(pictures))
    return Dealt(pictures, counts, texts)


def deal_questions(images: Any, texts: list[str]) -> Dealt:
    """Each text as a user's message; where none has placeholders, as many as it has pictures come first.

    Raises:
        ValueError: not as many placeholders as pictures.
    """
    pictures, counts = flatten_images(images)
    counts = [bool(pictures)] * len(texts) if counts is None else counts
    if len(counts) == len(texts) and not any(IMAGE_TOKEN in one for one in texts):
        texts = [IMAGE_TOKEN * count + one for count, one in zip(counts, texts, strict=True)]
    return deal_messages(images, [[{"role": "user", "content": one}] for one in texts])


def deal_messages(images: Any, messages: Any) -> Dealt:
    """A conversation, or several, with their pictures.

    Raises:
        ValueError: not as many placeholders as pictures, or not as many lists of pictures as conversations.
    """
    pictures, counts = flatten_images(images)
    batch: list[list[Message]] = [messages] if isinstance(messages[0], dict) else list(messages)
    wanted = [count_images(conversation) for conversation in batch]
    if counts is None:
        check_count(sum(wanted), len(pictures))
        return Dealt(pictures, wanted, batch)
    if len(counts) != len(batch):
        raise ValueError(f"{len(batch)} conversation(s) but {len(counts)} list(s) of images; pass one list each")
    for own, count in zip(wanted, counts, strict=True):
        check_count(own, count)
    return Dealt(pictures, counts, batch)


def flatten_images(images: Any) -> tuple[list[Any], list[int] | None]:
    """A flat list of pictures, and their number for each row where the nesting tells it."""
    if images is None:
        return [], None
    if not isinstance(images, list | tuple):
        return [images], None
    if images and all(isinstance(item, list | tuple) or item is None for item in images):
        groups = [list(item or []) for item in images]
        return [image for group in groups for image in group], [len(group) for group in groups]
    return list(images), None


def check_count(placeholders: int, images: int) -> None:
    """Refuses too many or too few pictures."""
    if placeholders != images:
        raise ValueError(
            f"{placeholders} image placeholder(s) in the messages but {images} image(s) given; "
            f"write one {IMAGE_TOKEN} (or one image part) for each image"
        )


def in_groups(items: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Items in a row, each row's own together."""
    rest = iter(items)
    return [[next(rest) for _ in range(count)] for count in counts]
