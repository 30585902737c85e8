"""Queries per second of an index in a folder against `faiss.IndexFlatIP`, both exact, on the same vectors.

Vectors are random (Gaussian, the hardest for codes), or like embeddings: a mean, a spectrum that decays, clusters. The
peer is measured as it comes and with its threshold for matrix products lowered to 20 queries, which suits batches.
Recall is against float64 products. Memory is what the process holds after the last block, split into its own and pages
of files. With --large, more vectors than are searched exactly: the approximate search against the same exact peer.

    python benchmarks/retrieval.py [--quick] [--rows 100000 | --large 300000] [--width 512] [--threads 1 2]
        [--batches 1 64]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chiasm.retrieval import Index
from chiasm.retrieval.folder import FolderIndex
from chiasm.retrieval.store import Store
from measure import Block, Gate, Worker, foreign_text, in_turns, machine, quiet, ratio

KINDS = ("random", "embeddings")
OURS, PLAIN, BLAS = "chiasm", "faiss.IndexFlatIP", "faiss.IndexFlatIP, matrix products"
APPROXIMATE = "chiasm, approximate"
SIDES, LARGE_SIDES = (OURS, PLAIN, BLAS), (APPROXIMATE, PLAIN, BLAS)
K, QUERIES = 10, 256
HEADER = """\
| vectors | threads | at once | side | ms a query | queries/s | Chiasm is faster | recall@10 | own MB | file MB |
|---|---|---|---|---|---|---|---|---|---|"""


def vectors(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """Vectors of length 1."""
    shape, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=noise)
    if kind == "embeddings":
        spectrum = torch.arange(1, width + 1).float() ** -0.5
        turn = torch.linalg.qr(torch.randn(width, width, generator=shape))[0]
        centres = torch.randn(200, width, generator=shape)
        mean = torch.randn(width, generator=shape) * spectrum.norm() / width**0.5
        chosen = centres[torch.randint(0, len(centres), (rows,), generator=noise)]
        found = ((0.8 * found + 0.6 * chosen) * spectrum) @ turn + mean
    return torch.nn.functional.normalize(found, dim=1)


def write(folder: Path, kind: str, rows: int, width: int) -> None:
    """An index of vectors without pictures."""
    store = Store.create(folder, {"source": "benchmark", "fingerprint": ""})
    records = [{"id": str(n), "key": str(n), "path": f"/photos/{n}.jpg", "metadata": {}} for n in range(rows)]
    store.append(records, vectors(kind, rows, width, seed=0)[:, None].numpy())


def searcher(name: str, folder: Path) -> Callable[[Tensor], list[list[int]]]:
    """A function from queries to the rows that were found."""
    index = Index.open(folder, way="faiss" if name == APPROXIMATE else "exact", verify=False)
    assert isinstance(index, FolderIndex)
    if name != OURS:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    if name in (OURS, APPROXIMATE):
        index.prepare()
        return lambda queries: [[int(hit.id) for hit in hits] for hits in index.search_vectors(queries, K)]
    flat = faiss.IndexFlatIP(index.state.shape[1])
    flat.add(index.state.parts[0][:, 0])
    if name == BLAS:
        faiss.cvar.distance_compute_blas_threshold = 20
    return lambda queries: flat.search(queries.numpy(), K)[1].tolist()


def side(gate: Gate, name: str, folder: Path, kind: str, width: int, batch: int, at_least: float) -> None:
    """Blocks of so many seconds; every query is another one."""
    search, queries = searcher(name, folder), vectors(kind, QUERIES, width, seed=1)
    chunks = queries.split(batch)
    found = [rows for chunk in chunks[: max(1, 64 // batch)] for rows in search(chunk)]
    recall = 0.0
    if (folder / "truth.npy").is_file():
        truth = np.load(folder / "truth.npy")
        recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=False)]))
    while True:
        gate.wait()
        done, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < at_least:
            search(chunks[done // batch % len(chunks)])
            done += batch
        own, files = resident()
        gate.done(seconds=elapsed / done, recall=recall, own=own, files=files)


def resident() -> tuple[int, int]:
    """Bytes in memory: the process's own, and pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return sizes["RssAnon"], sizes["RssFile"]


def median(blocks: list[Block], key: str) -> float:
    return sorted(block.result[key] for block in blocks)[len(blocks) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kind of vectors, one thread, three rounds")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--large", type=int, help="so many vectors in place of --rows, searched approximately")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block, at least")
    options = parser.parse_args()
    if options.quick:
        options.kinds, options.threads, options.rounds = options.kinds[-1:], options.threads[:1], 3
    rows, sides = (options.large, LARGE_SIDES) if options.large else (options.rows, SIDES)
    print(f"{rows:,} x {options.width}; {machine(max(options.threads))}\n\n{HEADER}")
    foreign: list[Block] = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "index"
            write(folder, kind, rows, options.width)
            held = vectors(kind, rows, options.width, seed=0)
            queries = vectors(kind, QUERIES, options.width, seed=1)[:64]
            truth = torch.cat([queries.double() @ part.double().T for part in held.split(10_000)], dim=1)
            np.save(folder / "truth.npy", truth.topk(K).indices.numpy())
            for threads in options.threads:
                for batch in options.batches:
                    workers = {
                        one: Worker(side, one, folder, kind, options.width, batch, options.seconds, threads=threads)
                        for one in sides
                    }
                    blocks = in_turns(workers, options.rounds)
                    for worker in workers.values():
                        worker.stop()
                    foreign += [block for kept in blocks.values() for block in kept]
                    for one, measured in blocks.items():
                        kept = list(quiet(measured))
                        seconds = median(kept, "seconds")
                        cells = [kind, threads, batch, one, f"{seconds * 1000:.2f}", f"{1 / seconds:.0f}"]
                        faster = "" if one == sides[0] else f"**{ratio(blocks[sides[0]], measured):.2f}**"
                        cells += [faster, f"{measured[0].result['recall']:.4f}"]
                        cells += [f"{median(kept, key) / 1e6:.0f}" for key in ("own", "files")]
                        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\nothers' load: {foreign_text(foreign)}", file=sys.stdout)


if __name__ == "__main__":
    main()
