"""What a run notes: `log.jsonl`, a line for each event, and the fields of its events."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import resource

import torch
from torch import nn

from chiasm.training.errors import TrainingError
from chiasm.training.stages import FreezePlan
from chiasm.training.trackers import EVENTS, Tracker, curves


class RunLog:
    """Appends one JSON object per line; a line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path, keep_bytes: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        """Opens the log and cuts off what a killed run wrote after its last checkpoint.

        Args:
            trackers: where the numbers go too.
        """
        self.path, self.trackers = path, trackers
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size > keep_bytes:
            os.truncate(path, keep_bytes)

    def write(self, event: str, stage: str | None = None, step: int | None = None, **fields: Any) -> None:
        place = {name: value for name, value in (("stage", stage), ("step", step)) if value is not None}
        line = {"event": event, "time": round(time.time(), 3), **place, **fields}
        self._append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        for listen in self.listeners:
            listen(line)
        if event in EVENTS and stage is not None and step is not None:
            numbers = {name if event == "step" else f"{event}/{name}": value for name, value in curves(fields).items()}
            for tracker in self.trackers:
                tracker.numbers(stage, step, numbers)

    def _append(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            reason = "the disk is full" if written < len(line) else None
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            raise TrainingError(
                f"{self.path} cannot be written: {reason}; make room and run the same command again: it goes on from "
                "the last checkpoint"
            )

    def num_bytes(self) -> int:
        """Length so far, all of it on the disk: what a checkpoint remembers."""
        if self.path.is_file():
            os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The events of a `log.jsonl`; a last line that a killed run left unfinished is ignored."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plan_fields(plan: FreezePlan) -> dict[str, Any]:
    """The freeze plan for the log: in words by part, the number of trained parameters, and the table."""
    return {
        "parts": {row.label: row.state + (f", lr {row.lr:g}" if row.lr else "") for row in plan.rows},
        "trainable": sum(row.trainable for row in plan.rows),
        "table": [asdict(row) for row in plan.rows],
    }


def gate_fields(model: nn.Module) -> dict[str, Any]:
    """For models with gated cross-attention: the layers that have a block, and how far its gates are open."""
    part = getattr(model, "cross_attention", None)
    return {} if part is None else {"gates": {"layers": list(part.settings.layers), **part.gates()}}


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the process, or of its GPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
