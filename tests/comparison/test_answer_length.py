"""Answers may be as long as the test data expects; what is cut all the same is said."""

from typing import Any

import chiasm
import tiny
from chiasm.comparison.answer_length import answer_length
from chiasm.data.schema import Sample


def asked(*answers: str, **meta: Any) -> list[Sample]:
    turns = [("user", "What?"), ("assistant", answers[0])]
    messages = [{"role": role, "content": text} for role, text in turns]
    return [Sample("a", messages, [], meta={"answers": list(answers[1:])} | meta)]


def test_the_longest_expected_answer_counts() -> None:
    words = tiny.tokenizer()
    assert answer_length(None, asked("red"), words) == (8, [])
    assert answer_length(None, asked("a red apple on a table"), words) == (24, [])
    assert answer_length(None, asked("red", "a red apple on a table"), words) == (24, [])
    length, cut = answer_length(None, asked("x" * 200), words)
    assert length == 128 and "set evaluation.max_new_tokens to 202" in cut[0]
    length, cut = answer_length(8, asked("a red apple"), words)
    assert length == 8 and "expected answers have up to 13 tokens" in cut[0]


def test_a_comparison_asks_for_whole_answers_and_says_what_it_cuts(plan: dict[str, Any], tmp_path: Any) -> None:
    told: list[str] = []
    chiasm.compare(plan, tmp_path / "run", only=["linear-early-frozen"], say=told.append)
    assert any("set evaluation.max_new_tokens to 7" in line for line in told)
    chiasm.compare(plan, tmp_path / "run")
    assert "set evaluation.max_new_tokens to 7" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
