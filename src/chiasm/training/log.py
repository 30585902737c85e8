"""What a run says: `log.jsonl` always, and a progress bar, plain lines, or nothing on the terminal."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

if sys.platform != "win32":
    import resource

import torch
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from chiasm.training.errors import TrainingError
from chiasm.training.live import Dashboard
from chiasm.training.stages import FreezePlan
from chiasm.training.trackers import EVENTS, Tracker, curves

Show = Literal["auto", "bar", "plain", "quiet"]
PLAIN_SECONDS = 20.0


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


class Reporter:
    """The terminal: `auto` shows a bar where there is a terminal and a line now and then where there is none."""

    def __init__(self, show: Show = "auto", console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.show = ("bar" if self.console.is_terminal else "plain") if show == "auto" else show
        self.dashboard = Dashboard()

    def note(self, text: str) -> None:
        if self.show != "quiet":
            self.last_words(text)

    def last_words(self, text: str) -> None:
        """A line that is told however quiet the run is: why its process ends."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def plan(self, plan: FreezePlan) -> None:
        """The freeze plan as a table."""
        if self.show == "quiet":
            return
        self.console.print(plan_table(plan))

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator["Task"]:
        """Progress over `total` units of something."""
        if self.show != "bar":
            yield Task(self, name, total, done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        bar = Progress(*columns, console=self.console)
        with Live(Group(bar, self.dashboard), console=self.console, refresh_per_second=4):
            yield Task(self, name, total, done, bar)


class Task:
    def __init__(self, reporter: Reporter, name: str, total: int, done: int, bar: Progress | None = None) -> None:
        self.reporter, self.name, self.total, self.done, self.bar = reporter, name, total, done, bar
        self.started = self.said = time.monotonic()
        self.paced: tuple[float, int] | None = None
        self.id = bar.add_task(name, total=total, completed=done, text="") if bar is not None else None

    def advance(self, units: int = 1, text: str = "") -> None:
        self.done += units
        self.paced = self.paced or (time.monotonic(), self.done)
        if self.bar is not None and self.id is not None:
            self.bar.update(self.id, completed=self.done, text=text)
        elif time.monotonic() - self.said > PLAIN_SECONDS or (self.done >= self.total and self._took_long()):
            self.said = time.monotonic()
            self.reporter.note(f"{self.name} {self.done}/{self.total} {text}{self._left()}")

    def _took_long(self) -> bool:
        return time.monotonic() - self.started > 2

    def _left(self) -> str:
        """By the pace since the first units, which took what comes before all others too."""
        since, first = self.paced or (0.0, self.done)
        if self.done >= self.total or self.done == first:
            return ""
        seconds = (self.total - self.done) * (time.monotonic() - since) / (self.done - first)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left"


def plan_table(plan: FreezePlan) -> Table:
    """What is trained, a line for each part and pattern."""
    table = Table(title=f"stage {plan.stage}: what is trained", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("part", "tune"):
        table.add_column(column, overflow="fold")
    for column in ("lr", "tensors", "parameters", "share", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.label,
            row.state,
            "" if row.lr is None or not row.trainable else f"{row.lr:g}",
            f"{row.trainable_tensors}/{row.tensors}",
            f"{short(row.trainable)}/{short(row.parameters)}",
            f"{row.share:.1%}",
            f"{row.memory / 1e6:,.0f} MB",
        )
    return table


def short(count: int) -> str:
    """A count in four characters or so: 950, 1.34M, 135M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


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
