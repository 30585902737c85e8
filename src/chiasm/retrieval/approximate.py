"""Search by faiss where an exact scan is too slow: lists of 8-bit codes, then float32 products of what they find.

What faiss built is kept beside the segments, so it is trained once; rows that came later are added to it.
"""

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chiasm.retrieval.scan import Found, best
from chiasm.retrieval.store import Snapshot, Store

KEPT = "faiss.index"
TRAINED_ON = 64
"""Vectors a list."""
PROBED = 1 / 16
"""Share of the lists that a query looks into."""
MORE = 8
"""Candidates for each result: they are multiplied again in float32."""


def installed() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


class FaissSearch:
    """Searches one snapshot, mostly right: recall is a matter of `PROBED`.

    Args:
        folder: of the index; None keeps nothing.
    """

    def __init__(self, state: Snapshot, folder: Path | None = None) -> None:
        if not installed():
            raise ValueError("this search needs the package faiss: pip install 'chiasm[retrieval]'")
        self.state, self.folder = state, folder
        self.live = torch.from_numpy(state.live)
        self.index = self._ready()

    def prepare(self) -> None:
        """It is prepared."""

    def search(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"] | None = None) -> Found:
        """About the k nearest live rows of each query.

        Args:
            keep: rows that may be found.
        """
        faiss: Any = importlib.import_module("faiss")
        allowed = (self.live if keep is None else self.live & keep).numpy().repeat(self.state.shape[0])
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        share = max(allowed.mean(), 1e-9)
        probed = min(self.index.nlist, max(8, int(self.index.nlist * PROBED / share)))
        settings = faiss.SearchParametersIVF(sel=selector, nprobe=probed)
        wanted = min(len(allowed), MORE * k * self.state.shape[0])
        _, vectors = self.index.search(queries.float().numpy(), wanted, params=settings)
        found: Found = []
        for query, near in zip(queries.float(), vectors, strict=True):
            rows = np.unique(near[near >= 0] // self.state.shape[0])
            exact = torch.from_numpy(self.state.take(rows)) @ query
            found.append(best(torch.from_numpy(rows), exact.amax(dim=1), k))
        return found

    def _ready(self) -> Any:
        """What was kept, with newer rows added to it; built where there is nothing or segments were rewritten."""
        import faiss

        names = [segment["files"]["vectors"]["sha256"] for segment in self.state.manifest["segments"]]
        index, known = self._kept()
        if index is None or names[: len(known)] != known:
            index, known = self._trained(), []
        for part in self.state.parts[len(known) :]:
            index.add(part.reshape(-1, part.shape[2]))
        if names != known and self.folder is not None:
            said = json.dumps(names).encode() + b"\n"
            with suppress(OSError):  # a folder that cannot be written to is searched all the same
                Store(self.folder).keep(KEPT, said, faiss.serialize_index(index))
        return index

    def _kept(self) -> tuple[Any, list[str]]:
        """What is beside the segments and which of them it holds; nothing where it is not whole."""
        import faiss

        whole = None if self.folder is None else Store(self.folder).kept(KEPT)
        if whole is None:
            return None, []
        said, body = whole
        try:
            return faiss.deserialize_index(body), json.loads(said)
        except (RuntimeError, AssertionError):
            return None, []

    def _trained(self) -> Any:
        import faiss

        K, D = self.state.shape
        count = len(self.state) * K
        lists = max(1, int(4 * count**0.5))
        rows = np.random.default_rng(0).permutation(len(self.state))[: -(-lists * TRAINED_ON // K)]
        index = faiss.index_factory(D, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.train(self.state.take(np.sort(rows)).reshape(-1, D))
        return index
