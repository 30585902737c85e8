"""What a run says on the terminal: a progress bar, plain lines now and then, or nothing; and what it trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chiasm.training.live import Dashboard
from chiasm.training.stages import FreezePlan

Show = Literal["auto", "bar", "plain", "quiet"]
PLAIN_SECONDS = 20.0


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


@contextmanager
def progress_bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar for `progress(done, total)` callbacks; where nobody watches, a line now and then."""
    if not console.is_terminal:
        yield _Lines(what, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress as plain lines; a smaller `done` than before begins anew."""

    def __init__(self, what: str, console: Console) -> None:
        self.reporter, self.what = Reporter("plain", console), what
        self.task = Task(self.reporter, what, 0, 0)

    def __call__(self, done: int, total: int) -> None:
        if done < self.task.done or total != self.task.total:
            self.task = Task(self.reporter, self.what, total, 0)
        self.task.advance(done - self.task.done)
