"""TensorBoard, W&B and trackio get the log's numbers; a missing one is named before anything is written."""

import sqlite3
from importlib.util import find_spec
from pathlib import Path

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
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    expected = [event["loss"] for event in read_log(folder / "log.jsonl") if event["event"] == "step"]
    assert [scalar.value for scalar in found.Scalars("align/loss")] == pytest.approx(expected)
    assert {"align/lr/connector", "align/validation/shuffled_loss", "align/forgetting/perplexity/english"} <= set(
        found.Tags()["scalars"]
    )


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
