"""Every benchmark can be started: what it imports is there, and it says its options."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = ("measure", "training_sides")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_says_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0 and "--help" in capsys.readouterr().out


def test_names_are_counted_that_a_tokenizer_cannot_tell_apart() -> None:
    script = runpy.run_path(str(BENCHMARKS / "emoji_names.py"))
    known = {"cat": [1], "dog": [2], "고양이": [0], "개": [0], "big cat": [3, 1]}
    tokenizer = type("Tokenizer", (), {"unk_token_id": 0, "__call__": lambda _, text, **__: {"input_ids": known[text]}})
    told = script["read_names"](tokenizer(), list(known))
    assert told == {"names": 5, "tokens": 1.2, "unknown": 2, "alike": 2}


def test_the_table_names_every_benchmark() -> None:
    pages = [BENCHMARKS / "README.md", *(BENCHMARKS.parent / "docs").glob("*.md")]
    said = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in SCRIPTS if f"{name}.py" not in said] == []
