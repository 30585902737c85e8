"""The exact scan: the k nearest rows by float32 products, certainly all of them.

Rows are read as they are for the first queries. When more come, they are coded with 8 bits once (`codes.py`): a query
then reads a quarter of the memory, and only rows that the codes cannot exclude are multiplied in float32.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chiasm.retrieval import codes
from chiasm.retrieval.store import Snapshot

CODES_FROM_ROWS = 8_192
CODES_FROM_QUERIES = 128
"""Coding costs about as much as so many queries in float32."""
BATCH = 64
FEW = 1 / 16
"""Below this share of the rows they are picked out and multiplied alone."""
PIECE = 8_192
SORTED = 1_024
"""So many scores are sorted without picking first."""

Found = list[tuple[Int[Tensor, " found"], Float[Tensor, " found"]]]
"""For each query the rows and their scores, best first; of equal scores the older row first."""


class ExactScan:
    """Searches one snapshot. A row is a picture of K vectors, its score the largest product with one of them."""

    def __init__(self, state: Snapshot) -> None:
        self.state, self.queries_seen = state, 0
        self.codes: codes.Codes | None = None
        self.live = torch.from_numpy(state.live)
        self.worth_coding = len(state) * state.shape[0] >= CODES_FROM_ROWS and codes.supported()

    def prepare(self) -> None:
        """Codes the rows now, for a server that expects many queries."""
        if self.codes is None and self.worth_coding:
            K, D = self.state.shape
            total = sum((part.sum(axis=(0, 1), dtype=np.float64) for part in self.state.parts), np.zeros(D))
            mean = torch.from_numpy(total / (len(self.state) * K)).float()
            self.codes = codes.Codes(self._parts(), len(self.state), self.state.shape, mean)

    def search(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"] | None = None) -> Found:
        """The k nearest live rows of each query.

        Args:
            keep: rows that may be found.
        """
        keep = self.live if keep is None else self.live & keep
        count = int(keep.sum())
        k = min(k, count)
        self.queries_seen += len(queries)
        if k == 0:
            return [(torch.empty(0, dtype=torch.long), torch.empty(0))] * len(queries)
        if self.queries_seen >= CODES_FROM_QUERIES:
            self.prepare()
        found: Found = []
        for batch in queries.float().split(BATCH):
            if count < FEW * len(keep):
                found += self._among(batch, k, keep.nonzero()[:, 0])
            elif self.codes is not None and k * codes.GROUP <= len(keep):
                found += self._coded(batch, k, None if count == len(keep) else keep)
            else:
                found += self._plain(batch, k, keep)
        return found

    def _parts(self) -> Iterator[Float[Tensor, "rows K D"]]:
        return map(torch.from_numpy, self.state.parts)

    def _plain(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"]) -> Found:
        """Every row in float32."""
        scores = torch.cat(
            [(part.flatten(0, 1) @ queries.T).view(*part.shape[:2], -1).amax(1) for part in self._parts()]
        )
        scores = scores.T.masked_fill(~keep, -torch.inf)
        return [best(torch.arange(len(keep)), row, k) for row in scores]

    def _among(self, queries: Float[Tensor, "B D"], k: int, rows: Int[Tensor, " rows"]) -> Found:
        """A few rows in float32."""
        vectors = torch.from_numpy(self.state.take(rows.numpy()))
        scores = (vectors.flatten(0, 1) @ queries.T).view(*vectors.shape[:2], -1).amax(1)
        return [best(rows, row, k) for row in scores.T]

    def _coded(self, queries: Float[Tensor, "B D"], k: int, keep: Bool[Tensor, " rows"] | None) -> Found:
        """By codes first.

        The k rows with the best codes are multiplied exactly: the worst of them is a score that the true k-th can only
        exceed. Every row whose code may reach it, by the bound, is multiplied exactly too.
        """
        assert self.codes is not None
        coded = self.codes.scan(queries, keep)
        first = coded.leaders(k)
        known = self._exact(queries, [k] * len(queries), first.flatten())
        floor = torch.stack([scores.amin() for scores in known])
        query, rows = coded.reaching(floor)
        counts = torch.bincount(query, minlength=len(queries)).tolist()
        exact = self._exact(queries, counts, rows)
        return [best(r, s, k) for r, s in zip(rows.split(counts), exact, strict=True)]

    def _exact(
        self, queries: Float[Tensor, "B D"], counts: list[int], rows: Int[Tensor, " pairs"]
    ) -> list[Float[Tensor, " rows"]]:
        """Scores in float32 of so many rows for each query."""
        found = []
        for query, mine in zip(queries, rows.split(counts), strict=True):
            pieces = [torch.from_numpy(self.state.take(piece.numpy())) @ query for piece in mine.split(PIECE)]
            found.append(torch.cat(pieces).amax(dim=1))
        return found


def best(rows: Int[Tensor, " rows"], scores: Float[Tensor, " rows"], k: int) -> tuple[Tensor, Tensor]:
    """The k best, by score and then by age: `topk` alone breaks ties as it likes."""
    if len(scores) > SORTED:
        near = (scores >= scores.topk(min(k, len(scores))).values[-1]).nonzero()[:, 0]
        rows, scores = rows[near], scores[near]
    order = scores.sort(descending=True, stable=True).indices[:k]
    return rows[order], scores[order]
