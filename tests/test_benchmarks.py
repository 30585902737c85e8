"""Every benchmark can be started: what it imports is there, and it says its options."""

import importlib
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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


def _side(gate: Any, name: str, dies: int) -> None:
    for number in range(4):
        if number == dies:
            raise RuntimeError("out of memory")
        gate.wait()
        gate.done(seconds=1.0, side=name)


def test_a_side_that_dies_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("measure")
    sides = {"well": (_side, "well", 9), "late": (_side, "late", 1)}
    workers = measure.start(sides | {"never": (_side, "never", 0)}, threads=1)
    blocks = measure.in_turns(workers, rounds=3)
    for worker in workers.values():
        worker.stop()
    assert set(workers) == {"well", "late"} and {name: len(found) for name, found in blocks.items()} == {"well": 3}
    said = capfd.readouterr().err
    assert "never has failed" in said and "late has failed" in said


def test_no_server_of_the_crowd_has_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("serve")
    started = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            started.append(env)

        def wait(self) -> None: ...
        def terminate(self) -> None: ...

    monkeypatch.setattr(script.subprocess, "Popen", Process)
    with ExitStack() as stack:
        for name in ("chiasm", "transformers"):
            script.open_door(name, Path("folder"), stack, "float32", False)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["", ""] and "PATH" in started[0]
