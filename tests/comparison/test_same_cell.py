"""Which finished and begun cells a plan goes on with, and what two processes do with one cell."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import chiasm
from chiasm.comparison import cell
from chiasm.comparison import compare as comparing
from chiasm.comparison.choices import expand
from chiasm.comparison.plan import load_plan
from chiasm.comparison.results import read_results
from chiasm.comparison.same_cell import LENGTH, finished, identity, older_identity, taken
from chiasm.comparison.schema import Plan
from chiasm.comparison.ways import without_few_shot
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.skills import summarise

NAMES = [f"{name}-early-frozen-seed0" for name in ("linear", "perceiver_resampler")]


def stopped_after_training(plan: Any, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cell, "_evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            chiasm.compare(plan, output, only=NAMES[:1])


def test_a_cell_that_was_begun_by_another_plan_begins_anew(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = tmp_path / "run", list[str]()
    stopped_after_training(plan, run, monkeypatch)
    again = chiasm.compare(plan | {"budget": {"samples": 12}}, run, only=NAMES[:1], say=told.append)
    assert again.results[0]["samples"] == 12 and again.results[0]["training"]["steps"] == 3
    assert f"{NAMES[0]}: begins anew, since the plan has changed" in told


def test_a_cell_goes_on_where_only_its_questions_changed(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = tmp_path / "run", list[str]()
    stopped_after_training(plan, run, monkeypatch)
    other = plan | {"evaluation": plan["evaluation"] | {"limit": 5}}
    again = chiasm.compare(other, run, only=NAMES[:1], say=told.append)
    assert again.results[0]["summary"][-1]["n"] == 5 and not any("begins anew" in line for line in told)


def test_a_plan_that_is_refused_leaves_the_folder_as_it_was(plan: dict[str, Any], tmp_path: Path) -> None:
    chiasm.compare(plan, run := tmp_path / "run", only=NAMES[:1])
    with pytest.raises(ValueError, match="another plan"):
        chiasm.compare(plan | {"budget": {"samples": 12}}, run, only=NAMES[1:])
    assert load_plan(run / "plan.yaml") == load_plan(plan) and not (run / "cells" / NAMES[1]).exists()


def test_what_another_process_has_is_left_to_it(plan: dict[str, Any], tmp_path: Path) -> None:
    run, told = tmp_path / "run", list[str]()
    folder = run / "cells" / NAMES[0]
    folder.mkdir(parents=True)
    with taken(folder):
        done = comparing.compare(plan, run, say=told.append)
    assert [result["name"] for result in done.results] == NAMES[1:] and not done.failed
    assert any(line.startswith(f"{NAMES[0]}: another process is at work on ") for line in told)
    page = done.report.read_text(encoding="utf-8")
    assert "What is not finished" in page and NAMES[0] in page and "What failed" not in page
    assert len(comparing.compare(plan, run).results) == 2


def test_a_report_has_what_another_process_ended_while_it_was_written(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write, other = tmp_path / "run", comparing.write_all, ExitStack()

    def slowly(*given: Any) -> None:
        other.close()
        chiasm.compare(plan, run, only=NAMES[1:])
        write(*given)

    monkeypatch.setattr(comparing, "write_all", slowly)
    folder = run / "cells" / NAMES[1]
    folder.mkdir(parents=True)
    other.enter_context(taken(folder))
    done = comparing.compare(plan, run)
    assert [result["name"] for result in done.results] == NAMES == [one["name"] for one in read_results(run)]


def lengths(plan: dict[str, Any], *values: int | None) -> list[Plan]:
    return [load_plan(plan | {"evaluation": {"max_new_tokens": value}}) for value in values]


def test_answers_of_any_length_are_not_answers_of_eight_tokens(plan: dict[str, Any], tmp_path: Path) -> None:
    any_length, eight = lengths(plan, None, 8)
    (choice, *_), _ = expand(eight, lambda: (3, 3))
    assert identity(any_length, choice) != identity(eight, choice)
    folder = tmp_path / "cells" / choice.name
    folder.mkdir(parents=True)
    found: dict[str, Any] = {"identity": identity(eight, choice), "inputs": None, LENGTH: 8}
    (folder / "result.json").write_text(json.dumps(found))
    assert finished(eight, choice, tmp_path) == found
    with pytest.raises(ValueError, match="another plan"):
        finished(any_length, choice, tmp_path)


def test_older_results_which_do_not_say_how_long_answers_were_stay_finished(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    any_length, eight, nine = lengths(plan, None, 8, 9)
    (choice, *_), _ = expand(eight, lambda: (3, 3))
    folder = tmp_path / "cells" / choice.name
    folder.mkdir(parents=True)
    found = {"identity": older_identity(any_length, choice), "inputs": None}
    (folder / "result.json").write_text(json.dumps(found))
    assert finished(any_length, choice, tmp_path) == finished(eight, choice, tmp_path) == found
    with pytest.raises(ValueError, match="another plan"):
        finished(nine, choice, tmp_path)


def test_older_results_that_counted_few_shot_answers_are_reported_without_them(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    run, asked = tmp_path / "run", plan["evaluation"] | {"shots": 1}
    now = chiasm.compare(plan | {"evaluation": asked}, run, only=NAMES[:1]).results[0]
    folder = run / "cells" / NAMES[0]
    rows = EvalResult.load(folder / "evaluation").rows
    older = now | {"summary": summarise(rows)}
    assert older["summary"][-1]["n"] == 2 * now["summary"][-1]["n"] == len(rows)
    assert without_few_shot(older, rows)["summary"][-1] == now["summary"][-1]
    assert without_few_shot(now, rows) is now
    (folder / "result.json").write_text(json.dumps(older))
    loaded = load_plan(plan | {"evaluation": asked})
    choices, skipped = comparing.cells_of(loaded)
    comparing.write_all(run, loaded, choices, [older], skipped)
    assert read_results(run)[0]["summary"][-1]["n"] == now["summary"][-1]["n"]


def test_the_time_of_training_is_that_of_its_steps_also_after_a_stop() -> None:
    step: dict[str, Any] = {"event": "step", "samples": 4, "samples_per_second": 8.0}
    log = [{"event": "closed_form", "seconds": 3.0}, step, step, {"event": "stage_end", "seconds": 0.1}]
    assert cell._seconds(log) == 4.0
