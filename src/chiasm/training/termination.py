"""SIGTERM, a cluster's word that time is up: a run that takes steps hears it, saves after the next one, and ends.

At other times SIGTERM does what it did before: all that a run has then is on the disk, or can be made again.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """Ends the process of a run that was told to stop, and has saved what it had."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.words = f"stopped by SIGTERM after a checkpoint at step {step} of stage {stage}: the same command goes on"


@contextmanager
def hears_sigterm() -> Iterator[Callable[[], bool]]:
    """While it lasts, SIGTERM is only noted; the value tells whether it has come. In a thread that is not the main one,
    which alone may handle signals, it never has."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
