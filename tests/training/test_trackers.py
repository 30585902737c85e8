"""TensorBoard, W&B and trackio get the log's numbers; a missing one is named before anything is written."""

import sqlite3
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import helpers
import pytest

from chiasm.training import trackers
from chiasm.training.log import read_log
from chiasm.training.trackers import TRACKERS, curves


def run(folder: Path, name: str) -> Path:
    data = helpers.samples(24)
    stages = [helpers.stage(steps=3, validation={"samples": 4})]
    return helpers.run(folder / "run", {"stages": stages, "logs": [name], "forgetting": {}}, data=data).output


def test_numbers_of_an_event() -> None:
    event = {"event": "step", "step": 3, "loss": 1.5, "lr": {"connector": 0.1, "a.*": 1}, "ok": True, "answers": []}
    assert curves(event) == {"loss": 1.5, "lr/connector": 0.1, "lr/a.*": 1.0}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"logs: {name} needs the package {name}.*pip install 'chiasm\[{name}\]'"):
        run(tmp_path, name)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_curves_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tmp_path, "tensorboard")
    found = EventAccumulator(str(folder / "tensorboard" / "align")).Reload()
    expected = [event["loss"] for event in read_log(folder / "log.jsonl") if event["event"] == "step"]
    assert [scalar.value for scalar in found.Scalars("align/loss")] == pytest.approx(expected)
    assert {"align/lr/connector", "align/validation/shuffled_loss", "align/forgetting/perplexity/english"} <= set(
        found.Tags()["scalars"]
    )


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_a_step_once_that_was_taken_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = {**helpers.TWO_STAGES, "logs": ["tensorboard"]}
    with helpers.killed_at(8):
        helpers.run(tmp_path / "run", recipe)
    log = read_log(helpers.run(tmp_path / "run", recipe).log)
    assert [(event["stage"], event["step"]) for event in log if event["event"] == "resume"] == [("instruct", 2)]
    for stage in ("align", "instruct"):
        found = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload().Scalars(f"{stage}/loss")
        expected = [(e["step"], e["loss"]) for e in log if e["event"] == "step" and e["stage"] == stage]
        assert [(scalar.step, scalar.value) for scalar in found] == [(step, pytest.approx(x)) for step, x in expected]


def test_wandb_knows_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[dict[str, Any]]()

    def init(**given: Any) -> MagicMock:
        opened.append(given)
        return MagicMock()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    monkeypatch.setattr(trackers, "find_spec", lambda package: True)
    recipe = {"stages": [helpers.stage()], "logs": ["wandb"]}
    with helpers.killed_at(4):
        helpers.run(tmp_path / "run", recipe)
    helpers.run(tmp_path / "run", recipe)
    helpers.run(tmp_path / "run", recipe, resume=False)
    first, second, anew = (given["id"] for given in opened)
    assert first == second != anew and {given["resume"] for given in opened} == {"allow"}


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(tmp_path, "wandb")
    written = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1 and b"align/loss" in written[0].read_bytes()


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    (tmp_path / "trackio").mkdir()
    run(tmp_path, "trackio")
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        written = str(list(database.execute("select * from metrics")))
    assert "align/loss" in written
