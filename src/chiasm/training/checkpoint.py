"""Checkpoints that are whole or absent: written beside their place, flushed, renamed; safetensors and JSON only.

Tensors that are sharded over processes are written by all of them (`chiasm.training.tensor_files`).

A checkpoint holds the tensors that any stage has trained so far, the optimizer's moments, and the position. The order
of samples, the learning rate and all random numbers are functions of the recipe and the step: nothing else is needed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from chiasm.sources.errors import is_full_disk
from chiasm.sources.writing import UNFINISHED, appearing, unfinished, why
from chiasm.training.errors import TrainingError
from chiasm.training.sharding import is_sharded
from chiasm.training.team import Stopped, Team
from chiasm.training.tensor_files import names, read_into, write_shards, write_whole

__all__ = ["Checkpoint", "Position", "Saved", "TrainingError", "newest_checkpoint", "save_checkpoint", "whole_folder"]

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
STATE = "state.json"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
FORMAT = 2


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` optimizer steps of a stage are done; `finished` when the stage's weights are final."""

    stage: str
    step: int
    finished: bool
    log_bytes: int
    fingerprint: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """What is to be kept."""

    position: Position
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    position: Position

    def names(self, kind: str) -> list[str]:
        """Of the tensors that it holds: `kind` is `WEIGHTS` or `OPTIMIZER`."""
        return names(self.path, kind)

    def read_into(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Fills tensors, whole ones or shards, by name."""
        read_into(self.path, kind, tensors)


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, stages: list[str], keep: int, team: Team | None = None
) -> Path:
    """Writes `<stage>-<step>` into the folder and removes all but the newest `keep`.

    One that stands behind it is of a later step that this run has yet to take, so it was damaged and passed over; it
    goes too.

    Args:
        stages: names of the recipe's stages in order, which tells newer from older.
        team: the run's processes, which all call this; the first writes what is not sharded.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints are still there.
    """
    team = team or Team()
    target = folder / f"{checkpoint.position.stage}-{checkpoint.position.step}"
    if is_sharded(checkpoint.weights.values()):
        _save_shards(target, checkpoint, team)
    else:
        team.first_does(lambda: _save_whole(target, checkpoint))
    if team.first:
        ordered = _in_order(folder, stages)
        behind = ordered.index(target) + 1
        for old in (*ordered[:behind][:-keep], *ordered[behind:]):
            shutil.rmtree(old, ignore_errors=True)
    return target


def _save_whole(target: Path, checkpoint: Checkpoint) -> None:
    with whole_folder(target) as place:
        write_whole(place, WEIGHTS, checkpoint.weights)
        write_whole(place, OPTIMIZER, checkpoint.optimizer)
        _describe_all(place, checkpoint.position)


def _save_shards(target: Path, checkpoint: Checkpoint, team: Team) -> None:
    try:
        with whole_folder(target) if team.first else nullcontext(unfinished(target)) as place:
            team.wait()
            write_shards(place, WEIGHTS, checkpoint.weights)
            write_shards(place, OPTIMIZER, checkpoint.optimizer)
            if team.first:
                _describe_all(place, checkpoint.position)
    except (OSError, SafetensorError):
        raise Stopped(1) from None  # the first process tells
    team.wait()


def _describe_all(place: Path, position: Position) -> None:
    (place / STATE).write_text(json.dumps({"format": FORMAT, **asdict(position)}))
    files = {path.relative_to(place).as_posix(): _describe(path) for path in sorted(place.rglob("*")) if path.is_file()}
    (place / MANIFEST).write_text(json.dumps(files))


def newest_checkpoint(folder: Path, stages: list[str]) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint, and a note on each damaged one that was passed over."""
    notes: list[str] = []
    for path in reversed(_in_order(folder, stages)):
        damage = _damage(path)
        if damage is None:
            return open_checkpoint(path), notes
        notes.append(f"checkpoint {path.name} is ignored: {damage}")
    return None, notes


def open_checkpoint(path: Path) -> Saved:
    """A checkpoint that is known to be whole."""
    state = json.loads((path / STATE).read_text())
    if state.pop("format") != FORMAT:
        raise TrainingError(f"{path} was written by another version of Chiasm; start anew without resuming")
    return Saved(path, Position(**state))


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], saved: Saved, originals: dict[str, Tensor]) -> None:
    """Puts a checkpoint's weights into a model's parameters, and into the originals of frozen copies.

    Raises:
        ValueError: the model has no weight of that name, or another shape.
    """
    found = saved.names(WEIGHTS)
    strange = [name for name in found if name not in parameters]
    if strange:
        raise ValueError(f"the checkpoint's weight {strange[0]} does not fit this model, which has none of that name")
    saved.read_into(WEIGHTS, {name: originals.get(name, parameters[name].data) for name in found})
    for name in set(found) & set(originals):
        parameters[name].data.copy_(originals[name])


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that appears as `target`, complete and on disk, or not at all.

    Raises:
        TrainingError: the disk is full or not writable.
    """
    try:
        with appearing(target) as place:
            yield place
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not is_full_disk(error):
            raise
        raise TrainingError(f"{target} is not written: {why(error, target)}; earlier checkpoints are intact") from error


def remove_unfinished(folder: Path) -> None:
    """Clears away what a killed run left half-written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _in_order(folder: Path, stages: list[str]) -> list[Path]:
    """Checkpoints, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        stage, _, step = path.name.rpartition("-")
        if stage in stages and step.isdigit():
            found.append((stages.index(stage), int(step), path))
    return [path for *_, path in sorted(found)]


def _damage(path: Path) -> str | None:
    try:
        files = json.loads((path / MANIFEST).read_text())
        for name, expected in files.items():
            if _describe(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
