"""Which tokens are learned, where a conversation has many answers."""

from collections.abc import Iterator
from typing import Any

from chiasm.data.labels import supervised


class Counted(list[tuple[int, int]]):
    """Offsets that count how often they are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for pair in super().__iter__():
            self.looks += 1
            yield pair

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return super().__getitem__(place)


def test_many_answers_are_found_in_one_pass() -> None:
    turns = 500
    offsets = Counted((place, place + 1) for place in range(20 * turns))
    answers = [(20 * turn + 10, 20 * turn + 19) for turn in range(turns)]
    ids = [7 if place % 20 == 19 else 1 for place in range(20 * turns)]
    marks = supervised(ids, offsets, answers, {7})
    assert marks == [place % 20 >= 10 for place in range(20 * turns)]
    assert offsets.looks < 5 * len(offsets)


def test_tokens_that_touch_two_answers_or_none() -> None:
    offsets = [(0, 0), (0, 3), (3, 6), (3, 6), (6, 7), (7, 9), (0, 0)]
    assert supervised([0] * 7, offsets, [(1, 4), (5, 6), (8, 9)], set()) == [False, *[True] * 3, False, True, False]
    assert supervised([0, 1, 1, 1, 2, 1, 2], offsets, [(4, 4), (5, 6), (9, 9)], {2})[2:5] == [True, True, True]
