"""What costs a cell, and what does not: failures in processes, maps, regions, budgets that do not fit it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_compare import LEAST
from transformers import T5Config, T5ForConditionalGeneration

import tiny
from chiasm.comparison import compare as comparing
from chiasm.comparison.compare import in_words
from chiasm.comparison.plan import load_plan
from chiasm.connectors import CONNECTORS
from chiasm.connectors.own import own_connectors


def test_a_cell_of_a_process_leaves_its_traceback(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a loose wire")

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with pytest.raises(ValueError, match="a loose wire"):
            comparing.compare(plan, tmp_path / "run", only=[command[command.index("--only") + 1]])
        return subprocess.CompletedProcess(command, 2, "", "one line for the user\n")

    monkeypatch.setattr(comparing, "run_cell", broken)
    monkeypatch.setattr(comparing.subprocess, "run", here)
    done = comparing.compare(plan, tmp_path / "run", jobs=1)
    assert set(done.failed.values()) == {"ValueError: a loose wire"}
    for name in done.failed:
        error = (tmp_path / "run/cells" / name / "error.txt").read_text()
        assert error.startswith("Traceback") and "in broken" in error


def test_minutes_are_not_measured_beside_other_cells(plan: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"linear-early-frozen-seed0 would get too few samples; leave out --jobs"):
        comparing.compare(plan | {"budget": {"minutes": 1}}, tmp_path / "run", jobs=2)


def test_flops_of_an_encoder_decoder(plan: dict[str, Any], tmp_path: Path) -> None:
    marks = {"pad_token_id": 258, "eos_token_id": 257, "decoder_start_token_id": 258}
    sizes = {"d_model": 36, "d_ff": 52, "d_kv": 7, "num_layers": 2, "num_heads": 5}
    T5ForConditionalGeneration(T5Config(vocab_size=261, **sizes, **marks)).save_pretrained(tmp_path / "pair")
    tiny.tokenizer().save_pretrained(tmp_path / "pair")
    plan |= {"base": plan["base"] | {"language": str(tmp_path / "pair")}, "budget": {"flops": 5e7}}
    done = comparing.compare(plan, tmp_path / "run", only=["linear-early-frozen"])
    assert done.results[0]["samples"] >= 4
    assert in_words(load_plan(plan)) == "50.0 MFLOP of training for every cell"


def test_regions_that_divide_no_cell_stop_none(plan: dict[str, Any], tmp_path: Path) -> None:
    """The encoder has 3 × 3 patches."""
    plan |= {"base": plan["base"] | {"regions": [2, 2]}}
    done = comparing.compare(plan, tmp_path / "run", only=["linear-early-frozen"])
    assert done.results[0]["choice"]["named"] is False
    assert "base.regions do not divide its tokens" in done.results[0]["notes"][0]


def test_a_map_that_cannot_be_drawn_costs_no_cell(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, told = tmp_path / "slots.py", list[str]()
    wrong = "    def attention(self, features):\n        return features @ features\n\n\nCONNECTORS"
    file.write_text(LEAST.replace("CONNECTORS", wrong, 1))
    monkeypatch.setitem(CONNECTORS, "slots", own_connectors(str(file), {})["slots"])
    plan |= {"grid": plan["grid"] | {"connector": ["slots"]}}
    done = comparing.compare(plan, tmp_path / "run", say=told.append)
    assert not done.failed and done.results[0]["attention"] is None
    assert any("slots-early-frozen: no attention map: RuntimeError" in line for line in told)
    assert "no attention map: RuntimeError" in done.report.read_text(encoding="utf-8")


@pytest.mark.parametrize("jobs", [0, 1])
@pytest.mark.parametrize(("place", "names"), [("0", ["linear"]), ("1", ["perceiver_resampler"])])
def test_processes_of_torchrun_have_a_share_of_the_cells_each(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, names: list[str], jobs: int
) -> None:
    """A cell's process is no part of their team, and keeps their device."""
    for name, value in {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    started = []

    def noting(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[command.index("--only") + 1])
        assert env["LOCAL_RANK"] == place and not {"RANK", "WORLD_SIZE"} & env.keys()
        return subprocess.CompletedProcess(command, 1, "", "a loose wire")

    monkeypatch.setattr(comparing.subprocess, "run", noting)
    comparing.compare(plan, tmp_path / "run", jobs=jobs)
    assert started == [f"{name}-early-frozen-seed0" for name in names]
    with pytest.raises(ValueError, match="leave out --jobs"):
        comparing.compare(plan | {"budget": {"minutes": 1}}, tmp_path / "other", jobs=jobs)


def test_a_process_of_torchrun_that_starts_late_leaves_no_cell_out(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = tmp_path / "run", list[str]()
    comparing.compare(plan, run, only=["linear-early-frozen"])

    def noting(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[command.index("--only") + 1])
        return subprocess.CompletedProcess(command, 1, "", "a loose wire")

    monkeypatch.setattr(comparing.subprocess, "run", noting)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    comparing.compare(plan, run, jobs=1)
    assert started == ["perceiver_resampler-early-frozen-seed0"]


def test_jobs_know_where_connectors_of_ones_own_are(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of other cells, for the plan names them all."""
    file = tmp_path / "my slots.py"
    file.write_text(LEAST)
    monkeypatch.setitem(CONNECTORS, "slots", own_connectors(str(file), {})["slots"])
    monkeypatch.setenv("CHIASM_CONNECTORS", str(file))
    plan |= {"grid": plan["grid"] | {"connector": ["linear", "slots"]}}
    choices, _ = comparing.cells_of(load_plan(plan))
    (job,) = comparing.job_list("plan.yaml", choices, tmp_path, only=["linear-early-frozen"])
    assert job.startswith(f"CHIASM_CONNECTORS='{file}' chiasm compare plan.yaml -o ")
    assert "CHIASM_CONNECTORS" not in comparing.job_list("plan.yaml", choices[:1], tmp_path)[0]
