"""The live view of a terminal: the newest loss, validation and answers, drawn while a stage runs."""

from pathlib import Path
from typing import Any

import helpers
import pytest
from rich.console import Console

from chiasm.training.live import Dashboard, curve_of
from chiasm.training.reporter import Reporter


def shown(dashboard: Dashboard, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dashboard)
    return console.export_text()


def test_the_newest_events_are_drawn() -> None:
    dashboard = Dashboard()
    assert shown(dashboard).strip() == ""
    for step in range(100):
        loss = 4.0 - step / 50
        dashboard.hear(
            {
                "event": "step",
                "stage": "a",
                "step": step,
                "loss": loss,
                "lr": {"connector": 1e-3},
                "peak_memory_bytes": 2e9,
            }
        )
    answers = [{"question": "What?" * 30, "answer": "a cat", "correct": True}]
    gates = {"layers": [1], "attention_gate": [0.25], "feed_forward_gate": [0.0]}
    event = {"event": "validation", "stage": "a", "step": 99, "loss": 1.5, "shuffled_loss": 2.5}
    dashboard.hear({**event, "answers": answers, "gates": gates})
    text = shown(dashboard)
    for part in (
        "█",
        "▁ 2.020",
        "connector 1.0e-03",
        "2.00 GB",
        "1.500, with wrong pictures 2.500",
        "✓ What?",
        "+0.25",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100
    dashboard.hear({"event": "plan", "stage": "b", "step": 0})
    assert shown(dashboard).strip() == ""


def test_curves_fall_and_stay_flat() -> None:
    assert curve_of([3.0, 2.0, 1.0]) == "█▄▁" or curve_of([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve_of([1.0] * 500) == "▁" * 32 and curve_of([]) == ""


def test_a_run_on_a_terminal_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    consoles: list[Console] = []
    init = Reporter.__init__

    def on_a_terminal(self: Reporter, show: Any = "auto") -> None:
        init(self, "bar")
        self.console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        consoles.append(self.console)

    monkeypatch.setattr(Reporter, "__init__", on_a_terminal)
    helpers.run(tmp_path / "run", {"stages": [helpers.stage(validation={"samples": 4})]}, data=helpers.samples(40))
    text = consoles[0].export_text()
    assert "validation" in text and "lr connector" in text and "4/4" in text
