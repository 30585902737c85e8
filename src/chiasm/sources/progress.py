"""Progress of a fetch on standard error, for whatever takes longer than two seconds."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with the step, and the bytes done and in all; both are 0 where that is unknown."""


@contextmanager
def terminal_progress(after: float = 2.0) -> Iterator[Progress]:
    """A bar on a terminal, a line for each step elsewhere; nothing at all if it is over before `after` seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    stream = sys.stderr
    console = Console(file=stream)
    bar = Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task("", total=None)
    visible, told = threading.Event(), threading.Lock()
    step = printed = ""

    def tell() -> None:
        nonlocal printed
        with told:
            if visible.is_set() and not console.is_terminal and step != printed:
                printed = step
                print(step, file=stream, flush=True)

    def show() -> None:
        visible.set()
        if console.is_terminal:
            bar.start()
        tell()

    def report(what: str, done: int, total: int) -> None:
        nonlocal step
        step = what
        bar.update(task, description=what, completed=done, total=total or None)
        tell()

    timer = threading.Timer(after, show)
    timer.daemon = True
    timer.start()
    try:
        yield report
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()
