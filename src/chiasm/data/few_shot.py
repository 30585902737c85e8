"""Solved examples in front of a question: few-shot prompting (Flamingo, arXiv 2204.14198), which needs no training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chiasm.data.chat import Message, user_message
from chiasm.data.dice import Dice
from chiasm.data.drawing import draws
from chiasm.data.schema import Sample
from chiasm.data.splits import Subset

Example = tuple[Any, str, str]
"""A picture, a list of pictures or None; a question about them; its answer."""

MOST_CANDIDATES = 2000
"""Examples are drawn from no more samples than these, evenly spread over the data."""


def as_list(images: Any) -> list[Any]:
    """One picture, several or None as a list."""
    return [] if images is None else list(images) if isinstance(images, list | tuple) else [images]


def solved(examples: Sequence[Any]) -> tuple[list[Message], list[Any]]:
    """Examples (`Example`) as turns, a question and its answer each, and their pictures in order.

    Raises:
        ValueError: an example is not a triple.
    """
    messages: list[Message] = []
    pictures: list[Any] = []
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, list | tuple) or len(example) != 3:
            found = f"{len(example)} parts" if isinstance(example, list | tuple) else repr(example)
            raise ValueError(f"example {number} has {found}; expected three: (image or images, question, answer)")
        images, question, answer = as_list(example[0]), example[1], example[2]
        messages += [*user_message(question, len(images)), {"role": "assistant", "content": answer}]
        pictures += images
    return messages, pictures


def put_first(turns: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """Turns in front of a conversation, but behind its system message."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    return [*system, *turns, *messages[len(system) :]]


def opening(sample: Sample) -> Sample:
    """A sample's first question and answer, which need no turn before them, with its skill."""
    turns = [message for message in sample.messages if message["role"] != "system"]
    end = next((place for place, turn in enumerate(turns, start=1) if turn["role"] == "assistant"), len(turns))
    shown = sum(
        part["type"] == "image" for turn in turns[:end] if isinstance(turn["content"], list) for part in turn["content"]
    )
    listed = sample.meta.get("skills")
    first = listed[0] if isinstance(listed, list | tuple) and listed and isinstance(listed[0], str) else None
    skill = sample.skill or first
    return replace(sample, messages=turns[:end], images=sample.images[:shown], skill=skill)


def draw_examples(samples: Sequence[Sample], pool: Sequence[Sample], shots: int, seed: int = 0) -> list[list[Sample]]:
    """For every sample `shots` openings of other samples of its skill, the same ones whenever it is asked.

    Another sample has another id and none of the same pictures, and its answer is in words.

    Raises:
        ValueError: the pool has too few of them; the message has both numbers.
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}, expected 1 or more")
    if len(pool) > MOST_CANDIDATES:
        pool = Subset(pool, [place * len(pool) // MOST_CANDIDATES for place in range(MOST_CANDIDATES)])
    by_skill: dict[str | None, list[Sample]] = {None: []}
    for candidate in map(opening, pool):
        if draws(candidate.messages[-1]):
            continue
        for skill in {candidate.skill, None}:
            by_skill.setdefault(skill, []).append(candidate)
    return [_draw(sample, by_skill, shots, Dice("shots", seed, sample.id)) for sample in samples]


def _draw(sample: Sample, by_skill: Mapping[str | None, list[Sample]], shots: int, dice: Dice) -> list[Sample]:
    own = {ref.key() for ref in sample.images}
    candidates = list(by_skill.get(sample.skill, ()))
    chosen: list[Sample] = []
    while candidates and len(chosen) < shots:
        place = dice.below(len(candidates))
        candidates[place], candidate = candidates[-1], candidates[place]
        candidates.pop()
        if candidate.id != sample.id and not own & {ref.key() for ref in candidate.images}:
            chosen.append(candidate)
    if len(chosen) < shots:
        of_skill = f" of skill {sample.skill!r}" if sample.skill else ""
        raise ValueError(
            f"sample {sample.id!r} has {len(chosen)} other sample(s){of_skill} to take {shots} examples from; "
            "ask for fewer shots or name more data with shots_from"
        )
    return chosen
