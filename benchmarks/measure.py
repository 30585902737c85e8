"""What all benchmarks share: sides that take turns in processes of their own, medians, peak memory, foreign load.

A side is a function of a `Gate`. It prepares itself, and then runs one timed block whenever the gate opens. Only one
side runs at a time, the others sleep: programs are compared in the same minutes on the same machine, and each has its
own peak of memory.
"""

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

FOREIGN_LIMIT = 0.10
"""Blocks during which others used more than this share of the machine are left out where enough quiet ones are left."""
FEWEST_QUIET = 3


@dataclass(frozen=True)
class Block:
    """One timed block: what the side said about it, and the share of all cores that other programs used meanwhile."""

    result: dict[str, Any]
    foreign: float

    @property
    def seconds(self) -> float:
        return self.result["seconds"]


class Gate:
    """A side's end of the line: `wait` until it is its turn, `done` when the block is over."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait(self) -> None:
        """Says that everything is prepared, and sleeps until the side is asked to run a block."""
        try:
            self._connection.send(None)
            self._connection.recv()
        except (EOFError, BrokenPipeError):
            raise SystemExit("the benchmark has ended") from None

    def done(self, **result: Any) -> None:
        """Ends a block; `seconds` is a must. The peak of the process's memory so far is added."""
        self._connection.send({**result, "peak_bytes": peak_memory()})


Side = Callable[..., None]


class SideFailed(RuntimeError):
    """A side has died; what it said is on its standard error."""


class Worker:
    """A process in which a side runs.

    Raises:
        SideFailed: it died, now or in a later block.
    """

    def __init__(self, side: Side, *args: Any, threads: int) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(theirs, side, threads, *args), daemon=True)
        self.process.start()
        theirs.close()
        self._said()

    def go(self) -> Block:
        """Runs the next block."""
        with ForeignLoad(self.process.pid or 0) as foreign:
            self._say("go")
            result = self._said()
        return Block(result, foreign.share)

    def ready(self) -> None:
        """Waits until the side is prepared for another block."""
        self._said()

    def _say(self, word: str) -> None:
        try:
            self._connection.send(word)
        except OSError:
            raise self._failure() from None

    def _said(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._failure() from None

    def _failure(self) -> SideFailed:
        self.process.join(5)
        return SideFailed(f"its process ended with status {self.process.exitcode}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, side: Side, threads: int, *args: Any) -> None:
    torch.set_num_threads(threads)
    side(Gate(connection), *args)
    connection.send(None)


def start(sides: dict[str, tuple[Any, ...]], threads: int) -> dict[str, Worker]:
    """Workers by name of those sides that could prepare themselves; the others are told of.

    Args:
        sides: each a side and its arguments.
    """
    workers = {}
    for name, side in sides.items():
        try:
            workers[name] = Worker(*side, threads=threads)
        except SideFailed as error:
            _tell(name, error)
    return workers


def _tell(name: str, error: SideFailed) -> None:
    print(f"{name} has failed and is left out: {error}", file=sys.stderr, flush=True)


def in_turns(workers: dict[str, Worker], rounds: int, every: dict[str, int] | None = None) -> dict[str, list[Block]]:
    """Blocks of all sides in the order A B C, C B A, A B C and so on; a side that fails is told of and has none.

    Args:
        every: sides that run in every n-th round only.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in workers}
    for number in range(rounds):
        names = [name for name in blocks if number % (every or {}).get(name, 1) == 0]
        for name in names if number % 2 == 0 else reversed(names):
            try:
                blocks[name].append(workers[name].go())
                workers[name].ready()
            except SideFailed as error:
                _tell(name, error)
                del blocks[name]
    return blocks


class ForeignLoad:
    """The share of all cores that programs other than this one and its workers used meanwhile, from /proc/stat."""

    def __init__(self, *workers: int) -> None:
        self.own = [os.getpid(), *workers]
        self.share = 0.0

    def __enter__(self) -> "ForeignLoad":
        self._started, self._all, self._ours = time.monotonic(), _busy_seconds(), _process_seconds(self.own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._started
        foreign = (_busy_seconds() - self._all) - (_process_seconds(self.own) - self._ours)
        self.share = max(0.0, foreign / max(1e-9, elapsed * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    """User, nice, system, interrupts and steal of all cores since boot; 0 where there is no /proc."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    return sum(int(fields[place]) for place in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")


def _process_seconds(processes: Iterable[int]) -> float:
    total = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def quiet(blocks: Sequence[Block]) -> Sequence[Block]:
    """Blocks without foreign load, or all of them if these are too few."""
    kept = [block for block in blocks if block.foreign <= FOREIGN_LIMIT]
    return kept if len(kept) >= FEWEST_QUIET else blocks


def ratio(ours: Sequence[Block], theirs: Sequence[Block]) -> float:
    """How many times faster ours is: the median over pairs of blocks that did the same work in the same round.

    Args:
        ours, theirs: aligned block by block. Pairs with foreign load are left out where enough others are left.
    """
    pairs = list(zip(ours, theirs, strict=True))
    calm = [pair for pair in pairs if max(block.foreign for block in pair) <= FOREIGN_LIMIT]
    chosen = calm if len(calm) >= FEWEST_QUIET else pairs
    return statistics.median(their.seconds / our.seconds for our, their in chosen)


def foreign_text(blocks: Sequence[Block]) -> str:
    """How loaded the machine was with other work: median and most, in per cent of all cores."""
    shares = [block.foreign for block in blocks]
    return f"{statistics.median(shares):.0%}, at most {max(shares):.0%}"


def reset_peak_memory() -> None:
    """Forgets the peak so far (Linux); elsewhere it stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """The most memory in bytes that this process held since its start or since `reset_peak_memory`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def machine(threads: int) -> str:
    """The machine in one line."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {gigabytes:.0f} GiB, {bf16} bfloat16 products; "
        f"torch {torch.__version__}, {threads} threads; load at the start {os.getloadavg()[0]:.2f}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
