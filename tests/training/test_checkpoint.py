"""Checkpoints are whole or absent, and a torn one is passed over with a note."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from chiasm.training import tensor_files as module
from chiasm.training.checkpoint import Checkpoint, Position, TrainingError, newest_checkpoint, save_checkpoint
from chiasm.training.log import RunLog

STAGES = ["b", "a"]


def save(folder: Path, stage: str, step: int, keep: int = 2) -> Path:
    position = Position(stage, step, False, 10 * step, {"data": "x"})
    tensors = {"connector.weight": torch.full((3,), float(step))}
    return save_checkpoint(folder, Checkpoint(position, tensors, {"step/x": torch.tensor(1.0)}), STAGES, keep)


def step_of(folder: Path) -> tuple[str, int] | None:
    newest, _ = newest_checkpoint(folder, STAGES)
    return None if newest is None else (newest.position.stage, newest.position.step)


def test_the_newest_by_stage_and_step_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert step_of(tmp_path / "none") is None
    for stage, step in [("b", 9), ("b", 10), ("a", 1)]:
        save(tmp_path, stage, step)
        assert step_of(tmp_path) == (stage, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1", "b-10"]
    newest, notes = newest_checkpoint(tmp_path, STAGES)
    assert newest is not None and newest.position.log_bytes == 10 and notes == []
    weights = {"connector.weight": torch.zeros(3)}
    newest.read_into("weights", weights)
    assert newest.names("weights") == ["connector.weight"] and torch.equal(weights["connector.weight"], torch.ones(3))


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "manifest"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, "b", 1)
    path = save(tmp_path, "b", 2)
    weights = path / "weights.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "lose":
        weights.unlink()
    else:
        (path / "manifest.json").write_text("{")
    newest, notes = newest_checkpoint(tmp_path, STAGES)
    assert newest is not None and newest.position.step == 1
    assert len(notes) == 1 and "checkpoint b-2 is ignored" in notes[0]


def test_a_damaged_one_does_not_outlive_the_run_that_passed_it_over(tmp_path: Path) -> None:
    save(tmp_path, "b", 2)
    (save(tmp_path, "b", 6) / "weights.safetensors").write_bytes(b"torn")
    assert step_of(tmp_path) == ("b", 2)
    save(tmp_path, "b", 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["b-3"] and step_of(tmp_path) == ("b", 3)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_one_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, "b", 1)

    def full(tensors: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        TrainingError, match=r"b-2 is not written: the disk is full .* earlier checkpoints are intact"
    ) as told:
        save(tmp_path, "b", 2)
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["b-1"] and step_of(tmp_path) == ("b", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_is_one_line() -> None:
    log = RunLog(Path("/dev/full"))
    with pytest.raises(TrainingError, match="/dev/full cannot be written: No space left on device; make room") as told:
        log.write("step", "b", 1)
    log.close()
    assert "\n" not in str(told.value)


def test_nothing_on_disk_needs_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, "b", 3)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["step"] == 3
