"""Checkpoints that are whole or absent: written beside their place, flushed, renamed; safetensors and JSON only.

A checkpoint holds the tensors that any stage has trained so far, the optimizer's moments, and the position. The order
of samples, the learning rate and all random numbers are functions of the recipe and the step: nothing else is needed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
STATE = "state.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 1
_UNFINISHED = ".partial-"


class TrainingError(RuntimeError):
    """A fault that stops a run, told in one line; what was saved before is intact."""


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
    position: Position
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, stages: list[str], keep: int) -> Path:
    """Writes `<stage>-<step>` into the folder and removes all but the newest `keep`.

    Args:
        stages: names of the recipe's stages in order, which tells newer from older.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints are still there.
    """
    position = checkpoint.position
    target = folder / f"{position.stage}-{position.step}"
    with whole_folder(target) as place:
        save_file(_contiguous(checkpoint.weights), place / WEIGHTS)
        save_file(_contiguous(checkpoint.optimizer), place / OPTIMIZER)
        (place / STATE).write_text(json.dumps({"format": FORMAT, **asdict(position)}))
        files = {name: _describe(place / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        (place / MANIFEST).write_text(json.dumps(files))
    for old in _in_order(folder, stages)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path, stages: list[str]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a note on each damaged one that was passed over."""
    notes: list[str] = []
    for path in reversed(_in_order(folder, stages)):
        damage = _damage(path)
        if damage is None:
            state = json.loads((path / STATE).read_text())
            if state.pop("format") != FORMAT:
                raise TrainingError(f"{path} was written by another version of Chiasm; start anew without resuming")
            return Checkpoint(Position(**state), load_file(path / WEIGHTS), load_file(path / OPTIMIZER)), notes
        notes.append(f"checkpoint {path.name} is ignored: {damage}")
    return None, notes


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], originals: dict[str, Tensor]) -> None:
    """Puts a checkpoint's weights into a model's parameters, and into the originals of frozen copies.

    Raises:
        ValueError: the model has no weight of that name, or another shape.
    """
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"the checkpoint's weight {name} {tuple(tensor.shape)} does not fit this model")
        parameters[name].data.copy_(tensor)
        if name in originals:
            originals[name].copy_(tensor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that appears as `target`, complete and on disk, or not at all.

    Raises:
        TrainingError: the disk is full or not writable.
    """
    place = target.parent / f"{_UNFINISHED}{target.name}"
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
        for path in [*(p for p in place.rglob("*") if p.is_file()), place]:
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        place.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise TrainingError(
            f"{target} is not written: {_why(error, target)}; earlier checkpoints are intact"
        ) from error
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Clears away what a killed run left half-written."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _why(error: BaseException, target: Path) -> str:
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)
    if not full:
        return " ".join(str(error).split())
    free = shutil.disk_usage(target.parent).free
    return f"the disk is full ({free / 1e6:.0f} MB free); make room and run the same command again"


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


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
