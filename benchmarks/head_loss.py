"""The head and the loss alone, forward and backward: logits where something is supervised, against logits everywhere.

Peers: transformers' `ForCausalLMLoss` on full logits, PyTorch's chunked `F.linear_cross_entropy` where this version has
it, and cut-cross-entropy's `torch_compile` where it is installed (`pip install cut-cross-entropy triton`). The matrix
is frozen, as in stage 1; `--trained` gives it a gradient too. Memory is what a step takes beyond matrix and states.

    python benchmarks/head_loss.py [--vocabularies 49152 151936] [--dtypes bfloat16 float32] [--rounds 3] [--trained]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from chiasm.language.next_token import IGNORE, next_token_loss, supervised_positions
from measure import Block, Gate, Worker, foreign_text, in_turns, machine, peak_memory, quiet, ratio, reset_peak_memory

WIDTHS = {49152: 576, 151936: 896}
"""Width of the language model by vocabulary: SmolLM2-135M and Qwen2.5-0.5B."""
ROWS, LENGTH, SHARE = 8, 160, 0.1
TARGET, TARGET_MEMORY = 9.0, 0.15
HEADER = (
    "| vocabulary | way | ms a step | memory, MiB | Chiasm is faster | Chiasm's memory to it | share of the limit | "
    "losses apart |\n|---|---|---|---|---|---|---|---|"
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def supervised_only(states: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    """Chiasm's: as `logits_at` and `next_token_loss` in the model."""
    rows, columns, targets = supervised_positions(labels)
    chosen = states.flatten(0, 1).index_select(0, rows * states.shape[1] + columns)
    return next_token_loss(F.linear(chosen, matrix), targets)


def full_logits(states: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    return ForCausalLMLoss(F.linear(states, matrix), labels, matrix.shape[0])


def chunked(states: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states[:, :-1].flatten(0, 1), matrix, labels[:, 1:].flatten(), options=options)


def cut(states: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(states, matrix, labels, shift=True, impl="torch_compile")


WAYS: dict[str, Loss] = {
    "Chiasm": supervised_only,
    "transformers, full logits": full_logits,
    "F.linear_cross_entropy": chunked,
    "cut-cross-entropy": cut,
}


def available() -> tuple[list[str], list[str]]:
    """Names of the ways that this machine has, and what the others lack."""
    lacking = {}
    if not hasattr(F, "linear_cross_entropy"):
        lacking["F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError as error:
        lacking["cut-cross-entropy"] = f"not installed ({error}): pip install cut-cross-entropy triton"
    return [way for way in WAYS if way not in lacking], [f"- {way}: {why}" for way, why in lacking.items()]


def side(gate: Gate, way: str, vocabulary: int, dtype: str, trained: bool) -> None:
    """One step a block; what is compiled is compiled before the first."""
    generator = torch.Generator().manual_seed(0)
    width, kind = WIDTHS[vocabulary], getattr(torch, dtype)
    matrix = (torch.randn(vocabulary, width, generator=generator) * 0.02).to(kind).requires_grad_(trained)
    states = torch.randn(ROWS, LENGTH, width, generator=generator).to(kind).requires_grad_(True)
    labels = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) >= SHARE] = IGNORE

    def step() -> float:
        loss = WAYS[way](states, matrix, labels)
        loss.backward()
        states.grad = matrix.grad = None
        return loss.item()

    step()
    while True:
        gate.wait()
        reset_peak_memory()
        held, started = resident(), time.perf_counter()
        loss = step()
        gate.done(seconds=time.perf_counter() - started, loss=loss, extra=peak_memory() - held)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def rows_of(vocabulary: int, dtype: str, blocks: dict[str, list[Block]]) -> list[str]:
    ours = blocks["Chiasm"]
    own = max(block.result["extra"] for block in ours)
    rows = []
    for way, made in blocks.items():
        extra = max(block.result["extra"] for block in made)
        apart = abs(made[0].result["loss"] / ours[0].result["loss"] - 1)
        times = ratio(ours, made)
        compared = "– | – | – | – |" if way == "Chiasm" else f"**{times:.1f}** | {own / extra:.2f} | "
        if way == "transformers, full logits":
            compared += f"{times * SHARE:.0%} | {apart:.0e} |"
        elif way != "Chiasm":
            compared += f"– | {apart:.0e} |"
        milliseconds = 1e3 * median(block.seconds for block in quiet(made))
        rows.append(f"| {vocabulary}, {dtype} | {way} | {milliseconds:.0f} | {extra / 2**20:.0f} | {compared}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", choices=WIDTHS, default=[49152])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained", action="store_true", help="a gradient for the matrix too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(machine(options.threads), f"{ROWS * LENGTH} places, {SHARE:.0%} supervised", sep="; ")
    print(f"aims against full logits: {TARGET:.0f} times faster, at most {TARGET_MEMORY} of the memory\n")
    print(HEADER)
    ways, notes = available()
    for vocabulary in options.vocabularies:
        for dtype in options.dtypes:
            workers = {
                way: Worker(side, way, vocabulary, dtype, options.trained, threads=options.threads) for way in ways
            }
            try:
                blocks = in_turns(workers, options.rounds)
            finally:
                for worker in workers.values():
                    worker.stop()
            print(*rows_of(vocabulary, dtype, blocks), sep="\n", flush=True)
            notes.append(
                f"- {vocabulary}, {dtype}: load by others {foreign_text([b for m in blocks.values() for b in m])}"
            )
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
