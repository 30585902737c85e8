"""Times of a question: of every token by itself, in rounds, with how far they spread."""

import time
from typing import Any

import pytest
import torch

from chiasm.comparison.timing import timed


def test_a_tokens_time_is_its_own_and_not_a_difference_of_two_runs() -> None:
    turns: list[str] = []

    def encode() -> None:
        turns.append("encode")

    def generate(clock: Any) -> None:
        turns.append("generate")
        time.sleep(0.05 * (len(turns) % 3))  # before the first token, another time in every round
        for _ in range(1 + 4):  # the prompt, and four tokens
            clock.put(torch.zeros(1))
            time.sleep(0.01)

    found = timed(encode, generate, 4, repeats=2)
    assert turns == ["encode", "generate"] * 3
    assert 50 < found["decode_tokens_per_second"] < 101
    assert found["first_token_seconds_low"] <= found["first_token_seconds"] <= found["first_token_seconds_high"]
    assert found.get("foreign_cores", 0.0) >= 0


@pytest.mark.parametrize("repeats", [0, 1])
def test_without_repeats_the_first_round_counts(repeats: int) -> None:
    found = timed(lambda: None, None, 4, repeats)
    assert "encode_seconds" in found and "decode_tokens_per_second" not in found
