"""`chiasm report RUN` on a run that goes on, stopped or finished: curves, skills, forgetting and answers over time."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image
from test_run_report import Page, a_log, result_of, samples

from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.progress import forgetting_table, skill_progress
from chiasm.evaluation.retrieval import outcome, proportion
from chiasm.evaluation.run_report import report_run, status
from chiasm.training.log import read_log


def run_folder(folder: Path, finished: bool = True) -> Path:
    """A run of two stages with answers about two skills, as it lies on the disk."""
    log: list[dict[str, Any]] = [
        {
            "event": "start",
            "samples": 40,
            "device": "cpu",
            "torch": "2",
            "model": {"vision": "clip", "language": "llama"},
        },
        {"event": "forgetting", **forgetting(0.0, 1.0)},
    ]
    for stage in ("align", "instruct"):
        events = a_log(stage)
        events[0] |= {"steps": 40, "table": [{"part": "connector", "parameters": 123}]}
        for number, event in enumerate(event for event in events if event["event"] == "validation"):
            event["answers"] = [
                {**event["answers"][0], "id": f"s{i}", "skill": ("naming", "counting")[i % 2], "correct": i <= number}
                for i in range(4)
            ]
        log += [*events, {"event": "forgetting", "stage": stage, "step": 40, **forgetting(0.25, 0.9)}]
    folder.mkdir()
    lines = "".join(json.dumps(event) + "\n" for event in log)
    (folder / "log.jsonl").write_text(lines + '{"event": "step", "unfin', encoding="utf-8")
    if finished:
        (folder / "model").mkdir()
    return folder


def forgetting(change: float, cka: float) -> dict[str, Any]:
    return {
        "perplexity": {"english": 20 + change},
        "perplexity_change": {"english": change},
        "knn_overlap": cka,
        "cka": cka,
    }


def test_the_page_of_a_finished_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "mine")
    result_of("answer 1").save(run / "evaluation")
    text = Page(report_run(run, data=samples(4)).read_text(encoding="utf-8")).text
    for shown in ("mine", "finished, 40 samples", "clip", "align", "instruct", "20.25 (+0.25)", "90.0 %", "naming"):
        assert shown in text, shown
    assert "What it can do" in text and "Answers as training went on" in text
    assert "Right answers per skill" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_goes_on_and_one_that_stopped(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", finished=False)
    log = read_log(run / "log.jsonl")
    with FileLock(run / ".lock"):
        assert status(run, log) == "going on in stage instruct at step 40 of 40"
        assert "going on" in Page(report_run(run, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert status(run, log) == "stopped in stage instruct at step 40 of 40"


def test_a_run_of_one_line_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "start", "samples": 3}\n')
    assert "stopped, 3 samples" in report_run(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: there is no log\.jsonl in it"):
        report_run(tmp_path)


def test_skills_are_followed_through_the_stages(tmp_path: Path) -> None:
    progress = skill_progress(read_log(run_folder(tmp_path / "run") / "log.jsonl"))
    assert progress["naming"] == [(20, 0.5, 2), (40, 0.5, 2), (60, 0.5, 2), (80, 0.5, 2)]
    assert progress["counting"] == [(20, 0.0, 2), (40, 0.5, 2), (60, 0.0, 2), (80, 0.5, 2)]
    assert skill_progress(a_log()) == {}


def test_unchanged_is_said_in_the_forgetting_table() -> None:
    log = [{"event": "forgetting", **forgetting(0, 1)}, {"event": "forgetting", "stage": "a", **forgetting(0, 1)}]
    table = forgetting_table(log)
    assert table is not None and table["rows"] == [
        ["before", "20.00", "100.0 %", "1.0000"],
        ["a", "20.00 (unchanged)", "100.0 %", "1.0000"],
    ]
    assert forgetting_table([]) is None


def test_a_full_disk_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = run_folder(tmp_path / "mine")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"page\.html is not written: the disk is full"):
        report_run(run, tmp_path / "page.html")


def test_rows_that_are_no_samples_leave_the_other_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": "bad", "conversations": said}, {"id": "s0", "image": "a.png", "conversations": said}]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    page = report_run(run_folder(tmp_path / "mine"), data=tmp_path / "data.json").read_text(encoding="utf-8")
    without = report_run(tmp_path / "mine").read_text(encoding="utf-8")
    assert page.count("<img") > without.count("<img")


def test_what_was_found_and_drawn_has_a_page(tmp_path: Path) -> None:
    """Shares of retrieval, labels and drawings are no answers: nothing is said of them that only answers have."""
    run = run_folder(tmp_path / "run")
    summary = [proportion("by colours, recall@1", [True, False, True], [False] * 3, 1 / 3)]
    rows = [outcome({"id": "a", "sample": "a", "skill": "by colours, recall@1"}, "", "recall@1", True)]
    EvalResult(rows, summary, ["a note"], sheet=Image.new("RGB", (300, 100), "red")).save(run / "evaluation")
    assert EvalResult.load(run / "evaluation").sheet.size == (300, 100)
    html = report_run(run).read_text(encoding="utf-8")
    text = Page(html).text
    assert "66.7 %" in text and "another sample" in text and "a note" in text and "Drawn pictures" in text
    assert html.count('class="drawn"') == 1 and "Test pictures" not in text
    assert "questions" not in text.split("What it can")[1]
    elsewhere = Page(report_run(run, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert f"chiasm chat {run / 'model'} picture.jpg" in elsewhere
