"""How long a question takes: encoding, the first token and every further one, in turns, and what disturbed them."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from chiasm.comparison.ways import Row, mean_of

UNSTEADY = 0.2
"""Half of the times lie farther apart than this share of the median: they are not to be compared."""
DISTURBING = 0.25
"""Cores that other programs took meanwhile."""
TIMES = ("encode_seconds", "first_token_seconds", "decode_tokens_per_second")


class _Clock(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        return


def timed(
    encode: Callable[[], Any], generate: Callable[[BaseStreamer], Any] | None, tokens: int, repeats: int
) -> dict[str, float]:
    """Medians of `TIMES`, each with its quartiles as `_low` and `_high`, and `foreign_cores`, where that is known.

    Args:
        generate: makes `tokens` tokens and tells the streamer of each.
        repeats: rounds after one that does not count; with 0 that one counts.
    """
    rounds, work, began = [], _work(), time.perf_counter()
    for _ in range(1 + repeats):
        rounds.append(_once(encode, generate, tokens))
    counted = rounds[1:] or rounds
    found = _middle("encode_seconds", [encoding for encoding, _, _ in counted])
    if generate is not None:
        found |= _middle("first_token_seconds", [first for _, first, _ in counted])
        steps = [1 / step for _, _, steps in counted for step in steps]
        found |= _middle("decode_tokens_per_second", steps)
    done = _work()
    if work is not None and done is not None:
        found["foreign_cores"] = max(0.0, (done - work) / (time.perf_counter() - began))
    return found


def _once(
    encode: Callable[[], Any], generate: Callable[[BaseStreamer], Any] | None, tokens: int
) -> tuple[float, float, list[float]]:
    """Seconds of encoding, of the first token, and of every further one."""
    began = time.perf_counter()
    encode()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    encoding = time.perf_counter() - began
    if generate is None:
        return encoding, 0.0, []
    clock, began = _Clock(), time.perf_counter()
    generate(clock)
    at = clock.at[-tokens:]
    return encoding, at[0] - began, [after - before for before, after in pairwise(at)]


def _middle(name: str, values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def _work() -> float | None:
    """Seconds that the machine's cores worked for others than this process; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *rest = map(int, fields)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def incomparable(ways: Mapping[str, Sequence[Row]]) -> list[str]:
    """Sentences on times that the machine's other work, or their own spread, makes no ground for a comparison."""
    known = {way: mean_of(cells, "measured", "foreign_cores") for way, cells in ways.items()}
    loads = {way: load for way, load in known.items() if load is not None and load > DISTURBING}
    spreads = {way: max(_spread(cell, name) for cell in cells for name in TIMES) for way, cells in ways.items()}
    unsteady = [way for way, spread in spreads.items() if spread > UNSTEADY]
    said = []
    several = len(ways) > 1
    if loads and len(loads) == len(ways) and several:
        least, most = min(loads.values()), max(loads.values())
        said.append(f"Other programs worked while all of these were timed, on {least:.1f} to {most:.1f} cores.")
    elif loads:
        told = ", ".join(f"{way} ({load:.1f})" for way, load in loads.items())
        said.append(f"Other programs worked while these were timed (cores that they took): {told}.")
    if unsteady:
        whose = "all of them" if len(unsteady) == len(ways) and several else "these"
        told = "" if whose != "these" else f": {', '.join(unsteady)}"
        said.append(f"The times of {whose} spread by more than {UNSTEADY:.0%} between repeats{told}.")
    if said:
        said.append("Times of such ways are not to be compared with others.")
    elif all(f"{name}_low" not in cell["measured"] for cells in ways.values() for cell in cells for name in TIMES):
        said.append("How far the times spread was not kept.")
    return said


def _spread(cell: Row, name: str) -> float:
    """Distance of the quartiles as a share of the median."""
    told = cell["measured"]
    return (told[f"{name}_high"] - told[f"{name}_low"]) / told[name] if f"{name}_low" in told else 0.0
