"""Which samples each step takes, as a function of the recipe and the step alone, and a thread that prepares them ahead.

A run that is continued at any step therefore meets the same batches; nothing about the data has to be saved.
"""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch

from chiasm.training.schema import Settings

MEGABATCH = 32
AHEAD = 3
WORKERS = 4
T = TypeVar("T")


class Order:
    """The order of samples in every epoch.

    Args:
        indices: usable samples.
        lengths: a length of each of them, in any unit: similar ones share a batch, within `MEGABATCH` batches.
            None leaves the order plainly random.
    """

    def __init__(self, indices: Sequence[int], lengths: Sequence[int] | None, settings: Settings, salt: int) -> None:
        self.indices, self.lengths, self.settings, self.salt = indices, lengths, settings, salt
        self.steps_per_epoch = settings.steps_per_epoch(len(indices))
        self._epoch: tuple[int, list[list[list[int]]]] | None = None

    def step(self, step: int) -> list[list[int]]:
        """Sample indices of a step: one list for each of its batches."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        return self._epoch[1][within]

    def visited(self, num_steps: int) -> list[int]:
        """Every sample that the first `num_steps` steps take, once each, in ascending order."""
        if num_steps >= self.steps_per_epoch:
            return sorted(self.indices)
        return sorted({index for step in range(num_steps) for batch in self.step(step) for index in batch})

    def _draw(self, epoch: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, self.salt, epoch))
        size, accumulate = self.settings.batch_size, self.settings.accumulate
        drawn = torch.randperm(len(self.indices), generator=generator).tolist()
        if (lengths := self.lengths) is not None:
            drawn = [
                place
                for start in range(0, len(drawn), size * MEGABATCH)
                for place in sorted(drawn[start : start + size * MEGABATCH], key=lambda p: (-lengths[p], p))
            ]
        batches = [[self.indices[p] for p in drawn[start : start + size]] for start in range(0, len(drawn), size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return [shuffled[start : start + accumulate] for start in range(0, len(shuffled), accumulate)]


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, without the collisions of a sum."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**63 - 1)
        mixed ^= mixed >> 31
    return mixed


def prefetch(make: Callable[[int], T], first: int, end: int) -> Generator[T, None, None]:
    """`make(number)` for every number, computed by a thread up to `AHEAD` numbers before they are asked for."""
    ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=AHEAD)
    stopped = threading.Event()

    def put(value: T | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.2)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for number in range(first, end):
                if stopped.is_set():
                    return
                put(make(number))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="chiasm-batches", daemon=True)
    thread.start()
    try:
        for _ in range(first, end):
            value = ready.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
