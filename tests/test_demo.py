"""The demo, shortened: real weights go in, a model, a log, an evaluation and a report come out."""

from pathlib import Path

import pytest

import chiasm
from chiasm.demo import run_demo


@pytest.mark.weights
def test_the_demo_leaves_a_model_that_answers(tmp_path: Path) -> None:
    summary = run_demo(tmp_path / "run", quick=True)
    assert {row["skill"] for row in summary["summary"]} == {"naming", "counting", "colour", "position", "all"}
    for name in (
        "log.jsonl",
        "recipe.yaml",
        "report.html",
        "scene.png",
        "evaluation/results.jsonl",
        "align",
        "instruct",
        "model",
    ):
        assert (tmp_path / "run" / name).exists(), name
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    vlm = chiasm.load(summary["model"])
    assert isinstance(vlm.chat(summary["scene"], "What is in the picture?", max_new_tokens=4), str)


@pytest.mark.weights
def test_a_frozen_language_model_can_be_shown_a_word() -> None:
    """The connected model still answers questions without a picture as the language model did."""
    vlm = chiasm.connect()
    assert "Paris" in vlm.chat(None, "What is the capital of France?", max_new_tokens=24)
