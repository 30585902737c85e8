"""A comparison end to end on tiny models: cells, resuming, refusals, the job list."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import chiasm
import tiny
from chiasm.comparison import cell
from chiasm.comparison import compare as comparing
from chiasm.comparison.compare import cells_of, job_list
from chiasm.comparison.plan import load_plan
from chiasm.comparison.quick import QUICK
from chiasm.comparison.results import read_results
from chiasm.connectors import CONNECTORS
from chiasm.connectors.own import own_connectors
from chiasm.training.log import read_log


def test_a_plan_end_to_end_and_again(plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    done = chiasm.compare(plan, run)
    assert [result["way"] for result in done.results] == ["linear-early-frozen", "perceiver_resampler-early-frozen"]
    linear, perceiver = read_results(run)
    assert (linear["closed_form"]["visual_tokens"], perceiver["closed_form"]["visual_tokens"]) == (9, 5)
    for result in (linear, perceiver):
        closed, measured = result["closed_form"], result["measured"]
        assert measured["connect_and_prefill_flops"] == pytest.approx(closed["connect_and_prefill_flops"], rel=0.02)
        assert measured["encode_flops"] == closed["encode_flops"]
        assert measured["decode_flops"] == closed["decode_flops"]
        assert measured["kv_cache_bytes_per_image"] == closed["kv_cache_bytes_per_image"]
        assert result["samples"] == 8
        assert result["training"]["curve"][-1][0] == result["training"]["steps"] == 2
        assert 0 <= result["diagnostics"]["reconstruction_error"] <= 1.5
        assert result["summary"][-1]["n"] == 12
        assert (run / "cells" / result["name"] / "attention.png").is_file()
        assert not (run / "cells" / result["name"] / "run" / "checkpoints").exists()
    assert (run / "results.csv").read_text().splitlines()[0].startswith("name,fusion,label")
    assert "linear-early-frozen-seed0" in (run / "results.md").read_text()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(cell.api, "train", refuse)
    (run / "results.jsonl").unlink()
    assert chiasm.compare(plan, run).results == done.results
    with pytest.raises(ValueError, match="another plan"):
        chiasm.compare(plan | {"budget": {"samples": 12}}, run)


def test_a_stopped_cell_goes_on(
    plan: dict[str, Any], tmp_path: Path, stop_when_trained: Callable[[dict[str, Any], Path], None]
) -> None:
    whole = chiasm.compare(plan, tmp_path / "whole", only=["linear-early-frozen"])
    assert whole.results[0]["name"] == "linear-early-frozen-seed0"
    stop_when_trained(plan, tmp_path / "run")
    again = chiasm.compare(plan, tmp_path / "run", only=["linear-early-frozen-seed0"])
    assert again.results[0]["summary"] == whole.results[0]["summary"]
    assert again.results[0]["training"]["curve"] == whole.results[0]["training"]["curve"]


@pytest.mark.parametrize("budget", [{"tokens": 400}, {"flops": 5e7}, {"minutes": 0.001}])
def test_budgets_become_samples(plan: dict[str, Any], budget: dict[str, Any], tmp_path: Path) -> None:
    done = chiasm.compare(plan | {"budget": budget}, tmp_path / "run", only=["linear-early-frozen"])
    assert done.results[0]["samples"] >= 4


@pytest.mark.parametrize(("fusion", "more"), [("intermediate", {}), ("unified", {"image_input": {"name": "patches"}})])
def test_other_fusions(plan: dict[str, Any], fusion: str, more: dict[str, Any], tmp_path: Path) -> None:
    base = plan["base"] | more | {"cross_attention": {"every": 2, "heads": 3, "head_dim": 8}}
    cells = [{"fusion": fusion, "tune": "full"}]
    cells += [cells[0] | {"weights": "random"}] if fusion == "unified" else []
    result, *fresh = chiasm.compare(plan | {"base": base, "grid": None, "cells": cells}, tmp_path / "run").results
    assert all(one["closed_form"]["parameters"] == result["closed_form"]["parameters"] for one in fresh)
    assert all(one["training"]["curve"] != result["training"]["curve"] for one in fresh)
    closed, measured = result["closed_form"], result["measured"]
    assert measured["kv_cache_bytes_per_image"] > 0
    if (
        fusion == "intermediate"
    ):  # unified fusion reads pictures in their own size, the closed form tells of the usual one
        assert measured["kv_cache_bytes_per_image"] == closed["kv_cache_bytes_per_image"]


def test_late_fusion(plan: dict[str, Any], tmp_path: Path) -> None:
    base = plan["base"] | {"text": plan["base"]["language"]}
    plan = plan | {"base": base, "grid": None, "cells": [{"fusion": "late", "connector": "linear", "tune": "frozen"}]}
    (result,) = chiasm.compare(plan, tmp_path / "run").results
    assert result["closed_form"]["visual_tokens"] == 1
    assert "1 vector" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def captions(folder: Path, count: int, shift: int) -> str:
    """LLaVA JSON with pictures of one colour each, described in a sentence."""
    folder.mkdir()
    rows = []
    for number in range(count):
        colour = tuple((97 * number + shift + 60 * channel) % 256 for channel in range(3))
        Image.new("RGB", (30, 30), colour).save(folder / f"{number}.png")
        said = f"a wall of red {colour[0]} green {colour[1]} and blue {colour[2]}"
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": said}]
        rows.append({"id": f"{folder.name}-{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


def test_captions_ask_both_fusions_for_their_pictures(plan: dict[str, Any], tmp_path: Path) -> None:
    plan["base"] |= {"text": plan["base"]["language"]}
    plan["data"] |= {"captions": captions(tmp_path / "told", 12, 0)}
    cells = [{"connector": "linear", "tune": "frozen"}, {"connector": "linear", "fusion": "late", "tune": "frozen"}]
    plan |= {"grid": None, "cells": cells}
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "plan.yaml").write_text("title: of an older plan\n")
    before = chiasm.compare(plan, tmp_path / "before", only=["linear-late-frozen"]).results[0]
    assert load_plan(tmp_path / "before" / "plan.yaml") == load_plan(plan), "processes of its cells read it"
    assert before["retrieval"] is None and "retrieval" not in before["seconds"]
    plan["data"] |= {"test_captions": captions(tmp_path / "asked", 8, 40)}
    plan["evaluation"] |= {"retrieval": 6}
    ways = {"better": "linear-late-frozen", "than": "linear-early-frozen"}
    plan["claims"] = [{"text": "Late is faster", "measure": "seconds_per_query", **ways}]
    done = chiasm.compare(plan, tmp_path / "run")
    assert [list(result["retrieval"]["places"]) for result in done.results] == [
        [f"asked-{number}" for number in (0, 1, 2, 4, 5, 6)]
    ] * 2
    logged = [read_log(tmp_path / name / "cells/linear-late-frozen-seed0/run/log.jsonl") for name in ("before", "run")]
    stages = [[event["stage"] for event in log if event["event"] == "stage_end"] for log in logged]
    assert stages == [["questions"], ["captions", "questions"]]
    page = done.report.read_text(encoding="utf-8")
    assert "Which picture does a caption describe?" in page and "a caption against" in page
    assert "recall@1_low" in (tmp_path / "run/results.csv").read_text().splitlines()[0]
    assert "recall@5 (by chance)" in (tmp_path / "run/results.md").read_text()
    with pytest.raises(ValueError, match=r"evaluation\.retrieval is 9, but data\.test_captions has 8"):
        chiasm.compare(plan | {"evaluation": {"retrieval": 9}}, tmp_path / "more")


def test_the_job_list_names_every_cell(plan: dict[str, Any], tmp_path: Path) -> None:
    choices, _ = cells_of(load_plan(plan | {"seeds": [0, 1]}))
    jobs = job_list("a plan.yaml", choices, tmp_path / "run")
    assert len(jobs) == 4
    assert jobs[0] == f"chiasm compare 'a plan.yaml' -o {tmp_path / 'run'} --here --only linear-early-frozen-seed0"
    assert json.dumps(jobs)


def test_cells_with_data_of_their_own_solved_examples_and_closed_gates(plan: dict[str, Any], tmp_path: Path) -> None:
    named = {"name": "linear", "label": "few-data"}
    few = plan["data"]["test"]
    plan |= {"grid": None, "cells": [{"fusion": "intermediate", "connector": "linear", "tune": "frozen"}]}
    plan["cells"] += [{"fusion": "intermediate", "connector": named, "tune": "frozen", "train": few}]
    plan["training"] |= {"gates": "keep", "lr": 1e-2}
    plan["evaluation"] |= {"shots": 2, "control": False}
    plan["claims"] = [{"text": "Gates open", "better": "linear-intermediate-frozen", "measure": "gates"}]
    done = chiasm.compare(plan, tmp_path / "run")
    usual, own = done.results
    assert usual["way"] == "linear-intermediate-frozen" and own["choice"]["train"] == few
    assert usual["training"]["curve"] != own["training"]["curve"]
    assert [row["skill"] for row in usual["summary"]] == ["few-shot", "all"]
    assert [row["n"] for row in usual["summary"]] == [12, 12], "what is asked again does not count twice"
    first, *_, last = usual["training"]["gates"]
    assert first == 0 and last > 0
    assert "before training" in done.report.read_text()


def test_a_cell_that_fails_is_told_with_all_it_said(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", []
    chiasm.compare(plan, run, only=["linear-early-frozen"])

    def broken(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n  in forward\nRuntimeError: a loose wire\n")

    monkeypatch.setattr(comparing.subprocess, "run", broken)
    done = comparing.compare(plan, run, jobs=1, say=said.append)
    name = "perceiver_resampler-early-frozen-seed0"
    error = run / "cells" / name / "error.txt"
    assert done.failed == {name: "RuntimeError: a loose wire"} and len(done.results) == 1
    assert said[-1] == f"{name}: failed: RuntimeError: a loose wire; all of it: {error}"
    assert error.read_text().startswith("Traceback\n  in forward")
    page = done.report.read_text()
    assert "What failed" in page and "a loose wire" in page
    done = comparing.compare(plan, run)
    assert not done.failed and len(done.results) == 2 and not error.exists()


@pytest.mark.parametrize("quick", [True, False])
def test_a_comparison_goes_on_after_a_cell_that_fails(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    """In one process; a quick one without what texts lose."""
    run_cell = comparing.run_cell

    def broken(plan: Any, choice: Any, *rest: Any) -> Any:
        if choice.connector["name"] == "linear":
            raise RuntimeError("a loose wire")
        return run_cell(plan, choice, *rest)

    monkeypatch.setattr(comparing, "run_cell", broken)
    done = comparing.compare(plan, tmp_path / "run", quick=quick)
    assert done.failed == {"linear-early-frozen-seed0": "RuntimeError: a loose wire"}
    assert [result["forgetting"] is None for result in done.results] == [quick]
    assert "a loose wire" in done.report.read_text()
    assert "a loose wire" in (tmp_path / "run/cells/linear-early-frozen-seed0/error.txt").read_text()
    with pytest.raises(RuntimeError, match="a loose wire"):
        comparing.compare(plan, tmp_path / "other", only=["linear-early-frozen"])


def test_a_quick_comparison_is_of_the_first_layers(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does all that a whole one does, keeps no model, and is not taken for the whole one."""
    monkeypatch.setitem(QUICK, "layers", 2)
    plan["base"] |= {"cross_attention": {"heads": 3, "head_dim": 8}}
    cells = [{"connector": "linear", "fusion": fusion} for fusion in ("early", "intermediate", "unified")]
    plan |= {"grid": None, "cells": cells}
    trained, train = list[Path](), cell.api.train

    def noting(*given: Any, **told: Any) -> Any:
        trained.append(given[3])
        done = train(*given, **told)
        assert not done.model.exists() and not any(folder.exists() for folder in done.stages.values())
        return done

    monkeypatch.setattr(cell.api, "train", noting)
    done = chiasm.compare(plan, tmp_path / "run", quick=True)
    assert not done.failed and len(done.results) == len(trained) == 3
    layers = tiny.language().model.layers
    cut = sum(p.numel() for p in tiny.language().parameters()) - sum(p.numel() for p in layers[2].parameters())
    for result in done.results[:2]:
        closed, measured = result["closed_form"], result["measured"]
        assert closed["parameters"]["language"] == cut
        assert measured["kv_cache_bytes_per_image"] == closed["kv_cache_bytes_per_image"]
        assert result["attention"] and result["diagnostics"] and result["summary"]
    warned = "No more than the first 2 layers of the language model took part"
    assert warned in done.report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="another plan"):
        chiasm.compare(plan, tmp_path / "run")


def test_a_quick_comparison_reads_the_language_model_once_and_shares_no_weights(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one cell trains is not what the next one begins with."""
    monkeypatch.setitem(QUICK, "layers", 2)
    read, load = list[str](), cell.load_language
    monkeypatch.setattr(cell, "load_language", lambda *given, **told: read.append(given[0]) or load(*given, **told))
    cells = [{"connector": "mlp", "tune": "full"}, {"connector": "linear", "tune": "full"}]
    both = chiasm.compare(plan | {"grid": None, "cells": cells}, tmp_path / "both", quick=True)
    assert len(both.results) == 2 and len(read) == 1
    alone = chiasm.compare(plan | {"grid": None, "cells": cells[1:]}, tmp_path / "alone", quick=True)
    assert alone.results[0]["training"]["curve"] == both.results[1]["training"]["curve"]
    assert alone.results[0]["summary"] == both.results[1]["summary"]


LEAST = """
import torch
from torch import nn

from chiasm.connectors import Connector


class Slots(Connector):
    num_tokens = 2

    def __init__(self, vision_width, language_width, grid):
        super().__init__(vision_width, language_width, grid)
        self.queries = nn.Parameter(torch.randn(2, vision_width))
        self.last = nn.Linear(vision_width, language_width)

    @property
    def output(self):
        return self.last

    def flops(self):
        return 2 * 2 * self.num_features * self.vision_width * 2 + 2 * 2 * self.vision_width * self.language_width

    def forward(self, features):
        return self.last((self.queries @ features.mT).softmax(-1) @ features)


CONNECTORS = {"slots": Slots}
"""


def test_the_least_connector_of_ones_own_and_what_a_change_of_its_file_does(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws no map, and only its own cell is run again."""
    file = tmp_path / "slots.py"
    file.write_text(LEAST)
    monkeypatch.setitem(CONNECTORS, "slots", own_connectors(str(file), {})["slots"])
    plan |= {"grid": plan["grid"] | {"connector": ["linear", "slots"]}}
    first = chiasm.compare(plan, tmp_path / "run")
    assert not first.failed and [result["attention"] is None for result in first.results] == [False, True]
    ran, run_cell = list[str](), comparing.run_cell

    def noting(plan: Any, choice: Any, *rest: Any) -> Any:
        ran.append(choice.label)
        return run_cell(plan, choice, *rest)

    monkeypatch.setattr(comparing, "run_cell", noting)
    chiasm.compare(plan, tmp_path / "run")
    assert ran == []
    file.write_text(LEAST.replace(".softmax(-1)", ".mul(3).softmax(-1)"))
    monkeypatch.setitem(CONNECTORS, "slots", own_connectors(str(file), {})["slots"])
    again = chiasm.compare(plan, tmp_path / "run")
    assert ran == ["slots"]
    assert again.results[0] == first.results[0]
    assert again.results[1]["training"]["curve"] != first.results[1]["training"]["curve"]
