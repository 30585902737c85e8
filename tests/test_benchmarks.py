"""Every benchmark can be started: what it imports is there, and it says its options."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "measure")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_says_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0 and "--help" in capsys.readouterr().out


def test_the_table_names_every_benchmark() -> None:
    table = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    unified = (BENCHMARKS.parent / "docs" / "unified.md").read_text(encoding="utf-8")
    training = (BENCHMARKS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"{name}.py" not in table + unified + training] == []
