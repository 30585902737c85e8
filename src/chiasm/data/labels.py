"""Labels: which tokens are learned, and how many of them are predicted."""

from collections.abc import Sequence, Set

IGNORE = -100
Span = tuple[int, int]


def supervised(ids: Sequence[int], offsets: Sequence[Span], answers: Sequence[Span], special: Set[int]) -> list[bool]:
    """Which tokens cover an answer, or are the special token that closes it (at most two behind it).

    Args:
        ids, offsets: tokens, and the characters of the text that each covers.
        answers: the characters that answers cover, in their order.
    """
    marks, place = [False] * len(ids), 0
    for begin, end in answers:
        last = None
        while place < len(ids) and offsets[place][1] <= begin:
            place += 1
        for index in range(place, len(ids)):
            start, stop = offsets[index]
            if stop > begin and start < end:
                marks[index], last = True, index
            elif start >= end:
                break
        if last is not None:
            place = last
            for index in range(last + 1, min(last + 3, len(ids))):
                if ids[index] in special:
                    marks[last + 1 : index + 1] = [True] * (index - last)
                    break
    return marks


def last_answer(labels: list[int]) -> list[int]:
    """The last run of supervised labels: what an encoder–decoder's decoder says."""
    end = max(place for place, label in enumerate(labels) if label != IGNORE) + 1
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == IGNORE), 0)
    return labels[start:end]


def last_answers(labels: list[int], count: int) -> list[int]:
    """The same labels with the last `count` runs of supervised ones alone: what is said before is read only."""
    before = [IGNORE, *labels]
    starts = [place for place, label in enumerate(labels) if label != IGNORE and before[place] == IGNORE]
    first = [*starts, len(labels)][max(0, len(starts) - count)]
    return [IGNORE] * first + labels[first:]


def num_predicted(labels: list[int], encoder_decoder: bool) -> int:
    """Supervised tokens that are predicted: all of a decoder's that starts from a mark, else all but the first."""
    return sum(label != IGNORE for label in labels[0 if encoder_decoder else 1 :])
