"""Progress appears on standard error only when something takes long."""

import time

import pytest

from chiasm.sources.progress import terminal_progress


def test_a_quick_step_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress(after=60.0) as report:
        report("toy: downloading", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_slow_one_shows_each_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress(after=0.0) as report:
        time.sleep(0.2)
        for done in range(3):
            report("toy: downloading", done, 3)
        report("toy: converting", 0, 0)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line for line in shown.err.splitlines() if line.strip()] == ["toy: downloading", "toy: converting"]
