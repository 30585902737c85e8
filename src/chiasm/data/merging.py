"""Several questions about one picture as one conversation, so that the picture's tokens are paid once (LLaVA's own way,
arXiv 2304.08485)."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from sys import intern
from typing import Any

from chiasm.data.schema import ByteRange, ImageError, ImageRef, Sample, SampleError, Samples
from chiasm.data.splits import Subset, ids_of


class MergedQuestions(Samples):
    """Samples of which those about the same single picture are joined, `at_most` of them in one conversation.

    The order is that of the first question about each picture. What has no picture, several, or another system prompt
    stays by itself; so does a sample that cannot be used, whose error comes when it is taken.
    """

    def __init__(self, samples: Samples, at_most: int) -> None:
        self.samples = samples
        self.groups: list[list[int]] = []
        open_groups: dict[Shown, list[int]] = {}
        for index, key in enumerate(_keys(samples)):
            group = open_groups.get(key) if key is not None else None
            if group is not None and len(group) < at_most:
                group.append(index)
                continue
            self.groups.append([index])
            if key is not None:
                open_groups[key] = self.groups[-1]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        return joined([self.samples[member] for member in self.groups[index]])

    def ids(self) -> Iterator[str]:
        """Every sample's id."""
        known = list(ids_of(self.samples))
        return ("+".join(known[member] for member in group) for group in self.groups)


def joined(samples: Sequence[Sample]) -> Sample:
    """Conversations about one picture as one, in which only the first shows it."""
    first, *others = samples
    if not others:
        return first
    messages = list(first.messages)
    for other in others:
        messages += [
            {**message, "content": _without_picture(message["content"])}
            for message in other.messages
            if message["role"] != "system"
        ]
    skill = first.skill if all(other.skill == first.skill for other in others) else None
    return Sample("+".join(sample.id for sample in samples), messages, first.images, skill, first.meta)


Shown = tuple[str | ByteRange, str]  # the only picture, and the system prompt


def _keys(samples: Samples) -> Iterator[Shown | None]:
    """What samples must have in common to be joined, None for one that stays by itself.

    Files are known by their names, other pictures by their bytes: a shard's are read only where another is as long.
    """
    shown = [_shown(samples, index) for index in range(len(samples))]
    lengths = Counter(one[0].length for one in shown if one and isinstance(one[0], ByteRange))
    for one in shown:
        if one and isinstance(one[0], ByteRange) and lengths[one[0].length] > 1:
            with suppress(ImageError):
                one = ImageRef.of(one[0]).key(), one[1]
        yield one


def _shown(samples: Samples, index: int) -> Shown | None:
    try:
        sample = samples[index]
    except SampleError:
        return None
    if len(sample.images) != 1:
        return None
    (ref,) = sample.images
    system = intern(json.dumps([message["content"] for message in sample.messages if message["role"] == "system"]))
    if isinstance(ref.source, bytes):
        return ref.key(), system
    if isinstance(ref.source, ByteRange):
        return ref.source, system
    return None if ref.path is None else (str(ref.path), system)


def _without_picture(content: Any) -> Any:
    if isinstance(content, str):
        return content
    parts = [part for part in content if part["type"] != "image"]
    if parts and parts[0]["type"] == "text":
        parts[0] = {**parts[0], "text": parts[0]["text"].lstrip()}
    return parts
