"""The processes of a run, as `torchrun` starts them: who each one is, and what they tell each other.

A fault that all of them learn of is told once, by the first; a process that dies is noticed by the others, which stop.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from chiasm.training.errors import TrainingError

TIMEOUT = "CHIASM_PROCESS_TIMEOUT"
"""Seconds after which a process that does not answer counts as lost; 600 where the environment does not say."""

T = TypeVar("T")


class Stopped(SystemExit):
    """Ends a process whose fault another one tells."""


@dataclass(frozen=True)
class Team:
    """`rank` of `size` processes. A run without others is a team of one, for which nothing here does anything."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, validates and speaks."""
        return self.rank == 0

    def share(self, indices: Sequence[int]) -> list[int]:
        """This process's part of a batch; parts differ by at most one sample."""
        return list(indices[self.rank :: self.size])

    def sums(self, values: Sequence[int | float]) -> list[float]:
        """Each number, summed over the processes."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def told(self, value: T) -> list[T]:
        """What every process has to say, in the order of ranks."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def agree(self, first_says: bool, any_says: bool) -> tuple[bool, bool]:
        """What the first process thinks of one thing, where clocks may differ, and whether any says another."""
        first, others = self.sums([self.first and first_says, any_says])
        return bool(first), bool(others)

    def stop_if_any(self, error: Exception | None) -> None:
        """Ends all processes where one has an error, which the first one raises."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        if not self.sums([float(error is not None)])[0]:
            return
        told = next(one for one in self.told(error) if one is not None)
        if self.first:
            raise told
        raise Stopped(2 if isinstance(told, ValueError | OSError) else 1)

    def first_does(self, action: Callable[[], T]) -> T | None:
        """Runs something in the first process while the others wait; they get None, and stop where it fails."""
        value, error = None, None
        if self.first:
            try:
                value = action()
            except Exception as raised:
                error = raised
        self.stop_if_any(error)
        return value

    def all_do(self, action: Callable[[], T]) -> T:
        """Runs something in every process; all of them stop where it fails in one."""
        value, error = None, None
        try:
            value = action()
        except Exception as raised:
            error = raised
        self.stop_if_any(error)
        return value  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def is_first() -> bool:
    """Whether this is the process that speaks, before it has joined the others and after it has left them."""
    return int(os.environ.get("RANK", "0")) == 0


def take_own_device() -> None:
    """Gives every process that `torchrun` started on a machine an accelerator of its own, where there are any."""
    own = os.environ.get("LOCAL_RANK")
    if own is None or not torch.accelerator.is_available():
        return
    if int(own) >= torch.accelerator.device_count():
        raise ValueError(
            f"process {own} of this machine has no device of its own: there are {torch.accelerator.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.accelerator.device_count()}"
        )
    torch.accelerator.set_device_index(int(own))


@contextmanager
def processes(device: torch.device) -> Iterator[Team]:
    """This process's place among those that `torchrun` started; a team of one without it.

    Raises:
        TrainingError: another process died, or did not answer in time.
    """
    joined = dist.is_available() and dist.is_initialized()
    if not joined and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if not joined:
        seconds = float(os.environ.get(TIMEOUT, "600"))
        fast = "" if device.type == "cpu" else f",{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group(f"cpu:gloo{fast}", timeout=timedelta(seconds=seconds))
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not _is_lost(error):
            raise
        raise TrainingError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which died or hung "
            f"({_reason(error)}); look at its output above, then run the same command again: it goes on from the last "
            "checkpoint"
        ) from error
    finally:
        if not joined:
            dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].rpartition("] ")[2][:120]
